from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo_models
from harness import Case, Contract, Forward, Forward2, by_hand, noise, run_pass, storages, until
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from armopt.passes import Pass, pipeline
from armopt.passes.canonicalise_conv import CanonicaliseConv

aten = torch.ops.aten
BEFORE = until(CanonicaliseConv)
CONV = "armopt.conv.default"


class TestCanonicaliseConv(Contract):
    folder = "canonicalise_conv"
    # The same FP32 convolution through another entry point, which may pick another algorithm: sums of at most 72 terms
    # in another order, a few units of 2^-24 of the largest.
    tolerance = 2e-6

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, BEFORE)[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return CanonicaliseConv()

    cases = (
        Case("conv1d", zoo_models.conv1d, (noise(1, 8, 40),), ops={CONV: 3}, absent=("aten.conv1d.default",)),
        Case(
            "conv2d_strided",
            lambda: nn.Conv2d(3, 4, 3, stride=(2, 1), padding=(1, 0)),
            (noise(2, 3, 7, 7),),
            ops={CONV: 1},
        ),
        Case("conv3d", zoo_models.conv3d, (noise(1, 3, 6, 12, 12),), ops={CONV: 3}),
        Case("grouped", lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False), (noise(1, 4, 5, 5),), ops={CONV: 1}),
        Case("depthwise", lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (noise(1, 4, 5, 5),), ops={CONV: 1}),
        Case("dilated", lambda: nn.Conv2d(3, 4, 3, dilation=(2, 3), padding=2), (noise(1, 3, 9, 9),), ops={CONV: 1}),
        Case("transposed", zoo_models.conv_transpose2d, (noise(1, 8, 6, 6),), ops={CONV: 3}),
        Case("transposed_1d", zoo_models.conv_transpose1d, (noise(1, 8, 10),), ops={CONV: 3}),
        Case("transposed_3d", zoo_models.conv_transpose3d, (noise(1, 8, 4, 4, 4),), ops={CONV: 3}),
        Case(
            "same_odd",
            lambda: nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(2, 1)),
            (noise(1, 3, 8, 8),),
            ops={CONV: 1},
        ),
        Case(
            "same_even_but_dilated",
            lambda: nn.Conv1d(3, 4, 4, padding="same", dilation=2),
            (noise(1, 3, 9),),
            ops={CONV: 1},
        ),
        Case("valid", lambda: nn.Conv3d(2, 3, 2, padding="valid"), (noise(1, 2, 4, 4, 4),), ops={CONV: 1}),
        Case(
            "same_even",
            lambda: nn.Conv2d(3, 4, (3, 4), padding="same"),
            (noise(1, 3, 8, 8),),
            skips=("padding='same' with an even kernel pads one side more",),
            rewritten=0,
        ),
        Case(
            "one_value_for_all_dimensions",
            lambda: Forward(
                lambda s, x: (
                    aten.convolution(x, s.w, None, [2], [1], [1], False, [0], 1)
                    + aten.convolution(x, s.w, s.b, [2, 2], [1, 1], [1, 1], False, [0, 0], 1)
                ),
                w=nn.Parameter(noise(4, 3, 3, 3)),
                b=nn.Parameter(noise(4)),
            ),
            (noise(1, 3, 6, 6),),
            ops={CONV: 2},
            absent=("aten.convolution.default",),
        ),
        Case(
            "general_transposed",
            lambda: Forward(
                lambda s, x: aten.convolution(x, s.w, None, [2], [1], [1], True, [1], 3),
                w=nn.Parameter(noise(3, 2, 3, 3)),
            ),
            (noise(1, 3, 6, 6),),
            ops={CONV: 1},
        ),
        Case(
            "used_twice",
            lambda: Forward(lambda s, x: s.conv(s.conv(x).relu()), conv=nn.Conv2d(3, 3, 3, padding=1)),
            (noise(1, 3, 6, 6),),
            ops={CONV: 2},
        ),
        Case("dynamic_batch", lambda: nn.Conv2d(3, 4, 3, padding=1), (noise(2, 3, 6, 6),), batch=(1, 4), ops={CONV: 1}),
        Case(
            "unbatched",
            lambda: nn.Conv2d(3, 4, 3),
            (noise(3, 6, 6),),
            skips=("the input has no batch dimension",),
            rewritten=0,
        ),
        Case(
            "double",
            lambda: Forward(lambda s, x: F.conv2d(x.double(), s.w).float(), w=noise(4, 3, 3, 3).double()),
            (noise(1, 3, 6, 6),),
            skips=("works on float64 and float64, not FP32",),
            rewritten=0,
        ),
    )


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.conv2d(x, y)


def test_a_weight_given_as_input_is_refused() -> None:
    result = run_pass(CanonicaliseConv(), TwoInputs, noise(1, 3, 6, 6), noise(4, 3, 3, 3), before=BEFORE)
    assert [(s.node, s.reason) for s in result.skipped] == [("conv2d", "the weight is not a constant")]


def test_a_bias_given_as_input_is_refused() -> None:
    model = lambda: Forward2(lambda s, x, y: F.conv2d(x, s.w, y), w=nn.Parameter(noise(4, 3, 3, 3)))  # noqa: E731
    result = run_pass(CanonicaliseConv(), model, noise(1, 3, 6, 6), noise(4), before=BEFORE)
    assert [s.reason for s in result.skipped] == ["the bias is not a constant"]


@pytest.mark.parametrize(
    ("shape", "weight", "op"),
    [
        ((3, 6), (4, 3, 3), aten.conv1d.default),
        ((3, 6, 6), (4, 3, 3, 3), aten.conv2d.default),
        ((3, 6, 6, 6), (4, 3, 3, 3, 3), aten.conv3d.default),
        ((4, 6), (4, 3, 3), aten.conv_transpose1d.default),
    ],
    ids=["1d", "2d", "3d", "transposed"],
)
def test_an_input_without_a_batch_dimension_is_refused(
    shape: tuple[int, ...], weight: tuple[int, ...], op: object
) -> None:
    graph_module = by_hand(
        noise(*shape), constants={"weight": noise(*weight)}, build=lambda call, x, weight: call(op, x, weight)
    )
    result = CanonicaliseConv()(graph_module)
    assert [s.reason for s in result.skipped] == ["the input has no batch dimension"]
    assert result.modified is False


def test_padding_that_depends_on_the_input_is_refused() -> None:
    def build(call: Any, x: fx.Node, weight: fx.Node) -> fx.Node:
        return call(aten.conv1d.default, x, weight, None, [1], [call(aten.sym_size.int, x, 0)])

    graph_module = by_hand(noise(1, 3, 6), constants={"weight": noise(4, 3, 3)}, build=build)
    result = CanonicaliseConv()(graph_module)
    assert [s.reason for s in result.skipped] == ["its padding depends on the input"]


def test_arguments_that_fit_no_schema_are_refused() -> None:
    graph_module = by_hand(
        noise(1, 3, 6),
        constants={"weight": noise(4, 3, 3)},
        build=lambda call, x, weight: call(aten.conv1d.default, x, weight),
    )
    node = next(node for node in graph_module.graph.nodes if node.op == "call_function")
    node.args = (*node.args, None, [1], [0], [1], 1, "surplus")
    result = CanonicaliseConv()(graph_module)
    assert [s.reason for s in result.skipped] == ["its arguments don't fit the schema"]


def test_a_layer_used_twice_keeps_one_weight() -> None:
    model = lambda: Forward(lambda s, x: s.conv(s.conv(x)), conv=nn.Conv2d(3, 3, 1, bias=False))  # noqa: E731
    result = run_pass(CanonicaliseConv(), model, noise(1, 3, 4, 4), before=BEFORE)
    assert len(result.rewritten) == 2
    assert storages(result.graph_module) == 1
