from __future__ import annotations

import pytest
import torch
import zoo_models
from harness import Case, Contract, Forward, noise, plan_for, run_pass, storages
from torch import fx, nn

from armopt.ir.calls import call_of
from armopt.ir.operations import CONV
from armopt.passes import PREPARE, Pass, pipeline
from armopt.passes.pack_conv import PackConv

CONV_NAME, CAST = "armopt.conv.default", "aten._to_copy.default"


def _pack(graph_module: fx.GraphModule, target: str = "graviton3") -> PackConv:
    decisions = {d.node: d for d in plan_for(target, graph_module).decisions}
    return PackConv(decisions, {})


class TestPackConv(Contract):
    folder = "pack_conv"
    # As in test_pack_linear.py: three roundings to 8 bits, of at most three layers one after another.
    tolerance = 2**-5

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, PREPARE)[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return _pack(graph_module)

    cases = (
        Case(
            "dense",
            lambda: nn.Conv2d(3, 4, 3, padding=1),
            (noise(2, 3, 6, 6),),
            ops={CONV_NAME: 1, CAST: 2},
            rewritten=1,
        ),
        Case("conv1d", zoo_models.conv1d, (noise(1, 8, 40),), ops={CONV_NAME: 3}, rewritten=3),
        Case("conv3d", zoo_models.conv3d, (noise(1, 3, 6, 12, 12),), ops={CONV_NAME: 3, CAST: 4}, rewritten=3),
        Case(
            "grouped_and_dilated",
            lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 4, 3, dilation=2)),
            (noise(1, 4, 9, 9),),
            ops={CONV_NAME: 2, CAST: 2},
        ),
        Case(
            "depthwise",
            lambda: nn.Conv2d(4, 4, 3, groups=4),
            (noise(1, 4, 5, 5),),
            ops={CONV_NAME: 1, CAST: 0},
            rewritten=1,
        ),
        Case("residual", zoo_models.residual, (noise(1, 16, 12, 12),), ops={CONV_NAME: 4}, rewritten=4),
        Case(
            "transposed",
            zoo_models.conv_transpose2d,
            (noise(1, 8, 6, 6),),
            ops={CONV_NAME: 3},
            skips=("the tests want aten_conv",),
            rewritten=2,
        ),
        Case(
            "used_twice",
            lambda: Forward(lambda s, x: s.conv(s.conv(x)), conv=nn.Conv2d(3, 3, 3)),
            (noise(1, 3, 8, 8),),
            ops={CONV_NAME: 2},
            rewritten=2,
        ),
    )


KERNELS = {
    "dense": (lambda: nn.Conv2d(3, 4, 3), noise(1, 3, 6, 6), "conv_bf16"),
    "1d": (lambda: nn.Conv1d(3, 4, 3), noise(1, 3, 6), "conv_bf16"),
    "3d grouped": (lambda: nn.Conv3d(4, 4, 2, groups=2), noise(1, 4, 4, 4, 4), "conv_fp32"),
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2), noise(1, 4, 6, 6), "conv_fp32"),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, dilation=2), noise(1, 3, 6, 6), "conv_transpose_fp32"),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3, dilation=2), noise(1, 3, 6), "aten_conv"),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=2), noise(1, 4, 6, 6), "aten_conv"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_each_kind_gets_its_kernel(name: str) -> None:
    model, x, kernel = KERNELS[name]

    def step(graph_module: fx.GraphModule) -> object:
        return _pack(graph_module)(graph_module)

    result = run_pass(step, model, x, before=PREPARE)  # type: ignore[arg-type]
    (layer,) = [node for node in result.graph_module.graph.nodes if node.target is CONV]
    assert call_of(layer).kernel == kernel


def test_a_target_without_bf16_stays_in_fp32() -> None:
    def step(graph_module: fx.GraphModule) -> object:
        return _pack(graph_module, "graviton2")(graph_module)

    result = run_pass(step, zoo_models.residual, noise(1, 16, 12, 12), before=PREPARE)  # type: ignore[arg-type]
    assert len(result.rewritten) == 4
    assert {t.dtype for t in result.graph_module.buffers()} == {torch.float32}


def test_a_layer_used_twice_is_rounded_once() -> None:
    def step(graph_module: fx.GraphModule) -> object:
        return _pack(graph_module)(graph_module)

    model = lambda: Forward(lambda s, x: s.conv(s.conv(x)), conv=nn.Conv2d(3, 3, 3, bias=False))  # noqa: E731
    result = run_pass(step, model, noise(1, 3, 8, 8), before=PREPARE)  # type: ignore[arg-type]
    assert storages(result.graph_module) == 1


def test_what_the_plan_refuses_is_skipped_with_its_reason() -> None:
    def step(graph_module: fx.GraphModule) -> object:
        return _pack(graph_module)(graph_module)

    result = run_pass(step, lambda: nn.ConvTranspose1d(3, 4, 3, dilation=2), noise(1, 3, 6), before=PREPARE)  # type: ignore[arg-type]
    assert [s.reason for s in result.skipped] == ["the tests want aten_conv"]
