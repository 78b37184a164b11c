from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from harness import Case, Contract, Forward, by_hand, noise, until
from torch import fx, nn

from armopt import capture
from armopt.passes import PREPARE, Pass, pipeline
from armopt.passes.canonicalise_conv import CanonicaliseConv
from armopt.passes.convert_transposed_conv import ConvertTransposedConv

CONV = "armopt.conv.default"


class TestConvertTransposedConv(Contract):
    folder = "convert_transposed_conv"
    tolerance = 2**-20  # the same sums in another order

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, until(ConvertTransposedConv))[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return ConvertTransposedConv()

    cases = (
        Case(
            "mask_head",
            lambda: nn.Sequential(nn.ConvTranspose2d(6, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 3, 1)),
            (noise(2, 6, 5, 4),),
            ops={CONV: 2, "aten.slice.Tensor": 0, "aten.relu.default": 0},
            rewritten=1,
        ),
        Case(
            "generator",
            lambda: nn.Sequential(nn.ConvTranspose2d(6, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
            (noise(2, 6, 5, 4),),
            batch=(2, 3),
            ops={CONV: 1, "aten.slice.Tensor": 2},
            rewritten=1,
        ),
        Case("output_padding", lambda: nn.ConvTranspose2d(3, 5, 3, 2, 1, 1), (noise(1, 3, 4, 6),), rewritten=1),
        Case(
            "unequal",
            lambda: nn.ConvTranspose2d(3, 5, (3, 5), (1, 3), (1, 0)),
            (noise(1, 3, 4, 6),),
            ops={"aten.flatten.using_ints": 1},
            rewritten=1,
        ),
        Case(
            "stride_of_one",
            lambda: nn.ConvTranspose2d(3, 5, 3, 1, 1),
            (noise(1, 3, 4, 6),),
            ops={CONV: 1},
            absent=("aten.unflatten.int", "aten.slice.Tensor"),
            rewritten=1,
        ),
        Case("vocoder", lambda: nn.ConvTranspose1d(6, 4, 16, 8, 4), (noise(1, 6, 7),), rewritten=1),
        Case(
            "residual",
            lambda: Forward(lambda s, x: (s.a(x[:, :, :4, :6]) + x[:, :1]).relu(), a=nn.ConvTranspose2d(3, 1, 2, 2)),
            (noise(1, 3, 8, 12),),
            ops={"aten.add.Tensor": 1, "aten.relu.default": 1},
            rewritten=1,
        ),
        Case("convolution", lambda: nn.Conv2d(3, 5, 2, 2), (noise(1, 3, 4, 6),), rewritten=0),
        Case(
            "grouped",
            lambda: nn.ConvTranspose2d(4, 4, 2, 2, groups=2),
            (noise(1, 4, 4, 6),),
            skips=("it has groups",),
        ),
        Case(
            "dilated",
            lambda: nn.ConvTranspose2d(4, 4, 2, 2, dilation=2),
            (noise(1, 4, 4, 6),),
            skips=("it has a dilation",),
        ),
        Case(
            "volume",
            lambda: nn.ConvTranspose3d(4, 3, (2, 3, 4), (2, 1, 2), (0, 1, 1)),
            (noise(1, 4, 3, 4, 5),),
            ops={CONV: 1},
            rewritten=1,
        ),
    )


def _sizes() -> list[tuple[int, int, int, int]]:
    every = itertools.product((1, 2, 3, 4, 5), (1, 2, 3), (0, 1, 2, 3), (0, 2))
    return [(k, s, p, o) for k, s, p, o in every if o < s and 4 * s - 2 * p + k + o > 0]


@pytest.mark.parametrize(
    ("operation", "spatial"),
    [
        (torch.ops.aten.conv_transpose1d.default, 1),
        (torch.ops.aten.conv_transpose2d.input, 2),
        (torch.ops.aten.conv_transpose3d.input, 3),
    ],
    ids=["1d", "2d", "3d"],
)
def test_every_filter_stride_and_padding(operation: Any, spatial: int) -> None:
    """On graphs as torch.export gives them, which for so many would take a minute."""
    steps = (CanonicaliseConv(), ConvertTransposedConv())
    x, bias = noise(2, 3, *[5] * spatial), noise(4, seed=2)
    for filters, stride, padding, output_padding in _sizes():
        weight = noise(3, 4, *[filters] * spatial, seed=3)
        size = [[stride] * spatial, [padding] * spatial, [output_padding] * spatial]

        def build(call: Any, x: fx.Node, weight: fx.Node, bias: fx.Node, size: Any = size) -> fx.Node:
            return call(operation, x, weight, bias, *size)

        graph_module = by_hand(x, constants={"weight": weight, "bias": bias}, build=build)
        graph_module = pipeline.run(graph_module, steps)[0]
        assert "phases" in graph_module.code, size
        torch.testing.assert_close(
            graph_module(x)[0], operation(x, weight, bias, *size), rtol=1e-4, atol=1e-5, msg=str(size)
        )


def test_a_layer_used_twice_keeps_one_weight() -> None:
    model = Forward(lambda s, x: s.a(s.a(x)), a=nn.ConvTranspose2d(3, 3, 2, 2)).eval()
    captured = capture.module(model, (noise(1, 3, 4, 4),), source="here")
    graph_module = pipeline.run(captured.graph_module, PREPARE)[0]
    assert sorted(dict(graph_module.named_buffers())) == ["a_bias_phases", "a_weight_phases"]


def test_an_image_of_dynamic_size_stays_dynamic() -> None:
    layer = nn.ConvTranspose2d(3, 4, 4, 2, 1).eval()
    sizes = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    exported = torch.export.export(layer, (noise(1, 3, 8, 16),), dynamic_shapes=(sizes,))
    graph_module = pipeline.run(capture.exported(exported, None, None, source="here").graph_module, PREPARE)[0]
    assert "phases" in graph_module.code
    for shape in ((5, 7), (16, 2)):
        x = noise(1, 3, *shape)
        torch.testing.assert_close(graph_module(x)[0], layer(x), rtol=1e-4, atol=1e-5)
