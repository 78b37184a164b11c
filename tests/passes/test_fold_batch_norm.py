from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo_models
from harness import Case, Contract, Forward, Forward2, by_hand, noise, run_pass, storages, until
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812

from armopt.ir.calls import LinearCall
from armopt.ir.operations import LINEAR
from armopt.passes import Pass, pipeline
from armopt.passes.canonicalise_conv import CanonicaliseConv
from armopt.passes.canonicalise_linear import CanonicaliseLinear
from armopt.passes.fold_batch_norm import FoldBatchNorm
from armopt.passes.fuse_pointwise import FusePointwise

aten = torch.ops.aten
BEFORE = until(FoldBatchNorm)
NORM = "aten._native_batch_norm_legit_no_training.default"


def _shared(norms: int) -> nn.Module:
    return Forward(
        lambda s, x: s.norm0(s.conv(x)) + (s.norm1 if norms == 2 else s.norm0)(s.conv(x * 2)),
        conv=nn.Conv2d(3, 4, 3),
        norm0=nn.BatchNorm2d(4),
        norm1=nn.BatchNorm2d(4, eps=0.1),
    )


class TestFoldBatchNorm(Contract):
    folder = "fold_batch_norm"
    # W' and b' are rounded to FP32 once, and the sum is scaled before it is taken rather than after: a few units of
    # 2^-24 of the largest term, which the batch norm's shift can make several times larger than the result.
    tolerance = 5e-6

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, BEFORE)[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return FoldBatchNorm()

    cases = (
        Case(
            "conv", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (noise(1, 3, 6, 6),), absent=(NORM,)
        ),
        Case(
            "conv_without_bias",
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
            (noise(1, 3, 6, 6),),
            absent=(NORM,),
        ),
        Case(
            "not_affine",
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False, eps=0.5)),
            (noise(1, 3, 6, 6),),
            absent=(NORM,),
        ),
        Case(
            "grouped",
            lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)),
            (noise(1, 4, 6, 6),),
            absent=(NORM,),
        ),
        Case(
            "depthwise_1d",
            lambda: nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.BatchNorm1d(4)),
            (noise(1, 4, 6),),
            absent=(NORM,),
        ),
        Case(
            "conv3d",
            lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)),
            (noise(1, 2, 3, 3, 3),),
            absent=(NORM,),
        ),
        Case(
            "transposed",
            lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)),
            (noise(1, 3, 4, 4),),
            absent=(NORM,),
        ),
        Case("linear", zoo_models.linear_norm, (noise(2, 32),), absent=(NORM,)),
        Case(
            "dynamic_batch",
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
            (noise(2, 3, 6, 6),),
            batch=(1, 4),
            absent=(NORM,),
        ),
        Case("shared_conv_same_norm", lambda: _shared(1), (noise(1, 3, 6, 6),), absent=(NORM,), rewritten=2),
        Case(
            "shared_conv_other_norm",
            lambda: _shared(2),
            (noise(1, 3, 6, 6),),
            ops={NORM: 2},
            skips=(
                "conv_weight is shared with conv_1, which has another batch norm",
                "conv_weight is shared with conv, which has another batch norm",
            ),
            rewritten=0,
        ),
        Case(
            "norm_first",
            lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)),
            (noise(1, 3, 6, 6),),
            ops={NORM: 1},
            rewritten=0,
        ),
        Case(
            "used_elsewhere",
            lambda: Forward(lambda s, x: s.norm(y := s.conv(x)) * y, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)),
            (noise(1, 3, 6, 6),),
            skips=("conv is used by 2 nodes",),
            rewritten=0,
        ),
        Case(
            "grouped_transposed",
            lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)),
            (noise(1, 4, 4, 4),),
            skips=("a grouped transposed convolution",),
            rewritten=0,
        ),
        Case(
            "linear_3d",
            lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(4)),
            (noise(2, 4, 6),),
            skips=("it normalises another dimension than the Linear's features",),
            rewritten=0,
        ),
    )


def test_statistics_that_are_computed_are_refused() -> None:
    def model() -> nn.Module:
        return Forward2(lambda s, x, y: F.batch_norm(s.conv(x), y, y.abs() + 1), conv=nn.Conv2d(3, 4, 3))

    result = run_pass(FoldBatchNorm(), model, noise(1, 3, 6, 6), noise(4), before=BEFORE)
    assert [s.reason for s in result.skipped] == ["its statistics are not constants"]


def test_a_layer_with_a_post_op_is_refused() -> None:
    model = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))  # noqa: E731
    result = run_pass(FoldBatchNorm(), model, noise(1, 3, 6, 6), before=(*BEFORE, FusePointwise()))
    assert [s.reason for s in result.skipped] == ["_0 has a fused post-op"]


def _batch_norm(*arguments: Any) -> Callable[..., Any]:
    def build(call: Any, x: Any, weight: Any, **statistics: Any) -> Any:
        y = call(aten.linear.default, x, weight)
        named = [
            statistics.get(argument, argument) if isinstance(argument, str) else argument for argument in arguments
        ]
        return call(aten.batch_norm.default, y, *named)

    return build


STATISTICS = {"gamma": noise(5), "beta": noise(5, seed=2), "mean": noise(5, seed=3), "var": noise(5).abs() + 1}


def test_the_whole_operation_is_folded_too() -> None:
    """aten.batch_norm, which torch.export decomposes today."""
    x = noise(3, 4)
    build = _batch_norm("gamma", "beta", "mean", "var", False, 0.1, 1e-3, False)
    graph_module = by_hand(x, constants={"weight": noise(5, 4), **STATISTICS}, build=build)
    expected = graph_module(x)[0]
    graph_module, _ = pipeline.run(graph_module, (CanonicaliseLinear(),))
    result = FoldBatchNorm()(graph_module)
    assert result.modified
    # FP32 sums of four terms in another order
    torch.testing.assert_close(result.graph_module(x)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("gamma", "beta", "mean", "var", True, 0.1, 1e-5, False), "not a batch norm at inference"),
        (("gamma", "beta", None, None, False, 0.1, 1e-5, False), "it has no running statistics"),
        (("gamma", "beta", "mean", None, False, 0.1, 1e-5, False), "it has no running statistics"),
    ],
)
def test_a_batch_norm_of_another_kind_is_refused(arguments: tuple[Any, ...], reason: str) -> None:
    """By hand: torch.export gives a batch norm in training another operation."""
    build = _batch_norm("gamma", "beta", "mean", "var", False, 0.1, 1e-5, False)
    graph_module = by_hand(noise(3, 4), constants={"weight": noise(5, 4), **STATISTICS}, build=build)
    graph_module, _ = pipeline.run(graph_module, (CanonicaliseLinear(),))
    norm = next(node for node in graph_module.graph.nodes if node.target is aten.batch_norm.default)
    held = {str(node.target): node for node in graph_module.graph.nodes if node.op == "get_attr"}
    norm.args = (norm.args[0], *[held[a] if isinstance(a, str) else a for a in arguments])
    result = FoldBatchNorm()(graph_module)
    assert [(s.node, s.reason) for s in result.skipped] == [(norm.name, reason)]


def test_a_norm_whose_statistics_are_read_is_refused() -> None:
    def build(call: Any, x: Any, weight: Any, **held: Any) -> Any:
        y = call(aten.linear.default, x, weight)
        return call(aten._native_batch_norm_legit_no_training.default, y, *held.values(), 0.1, 1e-5)

    graph_module = by_hand(noise(3, 4), constants={"weight": noise(5, 4), **STATISTICS}, build=build)
    graph_module, _ = pipeline.run(graph_module, (CanonicaliseLinear(),))
    assert [s.reason for s in FoldBatchNorm()(graph_module).skipped] == ["not a batch norm at inference"]


def test_a_shared_layer_stays_shared() -> None:
    result = run_pass(FoldBatchNorm(), lambda: _shared(1), noise(1, 3, 6, 6), before=BEFORE)
    assert len(result.rewritten) == 2
    assert storages(result.graph_module) == 2  # W' and b'


def test_layers_that_share_a_weight_but_not_a_bias_still_share_it() -> None:
    def build() -> nn.Module:
        norm = nn.BatchNorm1d(4)
        model = Forward(
            lambda s, x: s.norm(s.a(x)) + s.norm(s.b(x * 2)), a=nn.Linear(3, 4), b=nn.Linear(3, 4), norm=norm
        )
        model.b.weight = model.a.weight
        return model

    result = run_pass(FoldBatchNorm(), build, noise(2, 3), before=BEFORE)
    assert len(result.rewritten) == 2
    assert storages(result.graph_module) == 3


def test_the_fold_is_computed_in_fp64() -> None:
    """Within half a unit of FP32 of the exact product, which FP32 arithmetic in three steps is not."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16))
    result = run_pass(FoldBatchNorm(), lambda: model, noise(2, 8), before=BEFORE)
    norm = model[1]
    exact = model[0].weight.double() * (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt())[:, None]
    layer = next(node for node in result.graph_module.graph.nodes if node.target is LINEAR)
    folded = getattr(result.graph_module, LinearCall.of(layer).weight_name)
    assert torch.equal(folded, exact.float())


def test_canonical_forms_come_first() -> None:
    assert {CanonicaliseConv, CanonicaliseLinear} <= {type(step) for step in BEFORE}
