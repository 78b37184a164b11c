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
from armopt.passes.convert_volume_conv import ConvertVolumeConv

LINEAR, CONV = "armopt.linear.default", "armopt.conv.default"
COPIES = ("aten.cat.default", "aten.constant_pad_nd.default", "aten.slice.Tensor")


def _pair(channels: int, hidden: int) -> list[nn.Module]:
    """Space, then time, each with its batch norm, as R(2+1)D and S3D have them."""
    space = nn.Conv3d(channels, hidden, (1, 3, 3), padding=(0, 1, 1), bias=False)
    time = nn.Conv3d(hidden, channels, (3, 1, 1), padding=(1, 0, 0), bias=False)
    return [space, nn.BatchNorm3d(hidden), nn.ReLU(), time, nn.BatchNorm3d(channels), nn.ReLU()]


def _residual(s: Any, x: torch.Tensor) -> Any:
    return (s.norm(s.conv(x)) + s.shortcut(x)).relu()


class TestConvertVolumeConv(Contract):
    folder = "convert_volume_conv"
    tolerance = 2**-19  # the same sums in another order

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, until(ConvertVolumeConv))[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return ConvertVolumeConv()

    cases = (
        Case(
            "block",
            lambda: nn.Sequential(nn.Conv3d(4, 6, 3, padding=1, bias=False), nn.BatchNorm3d(6), nn.ReLU()),
            (noise(2, 4, 4, 6, 5),),
            ops={CONV: 1, "aten.cat.default": 1, "aten.constant_pad_nd.default": 1, "aten.relu.default": 0},
            rewritten=1,
        ),
        # of four views between two layers two cancel, and none of the rest copies
        Case(
            "pairs",
            lambda: nn.Sequential(*_pair(4, 6), *_pair(4, 6)),
            (noise(2, 4, 4, 6, 5),),
            ops={CONV: 4, "aten.flatten.using_ints": 4, "aten.unflatten.int": 4},
            absent=COPIES,
            rewritten=4,
        ),
        Case(
            "residual",
            lambda: Forward(
                _residual,
                conv=nn.Conv3d(4, 6, 3, 2, 1, bias=False),
                norm=nn.BatchNorm3d(6),
                shortcut=nn.Conv3d(4, 6, 1, 2, bias=False),
            ),
            (noise(1, 4, 4, 6, 6),),
            batch=(1, 4),
            ops={CONV: 1, LINEAR: 1, "aten.add.Tensor": 0, "aten.relu.default": 0},
            rewritten=2,
        ),
        Case(
            "patches",
            lambda: nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)),
            (noise(2, 3, 5, 8, 13),),
            batch=(2, 3),
            absent=("aten.cat.default",),
            rewritten=1,
        ),
        Case(
            "patches_of_many_channels",
            lambda: nn.Sequential(nn.Conv3d(4, 8, 2, 2), nn.Conv3d(8, 6, 2, 2)),
            (noise(1, 4, 4, 4, 8),),
            ops={LINEAR: 2, CONV: 0},
            rewritten=2,
        ),
        Case("patch_of_unknown_size", lambda: nn.Conv3d(3, 8, (2, 1, 1), 2), (noise(1, 3, 4, 6, 6),), rewritten=1),
        Case(
            "branches",
            lambda: Forward(
                lambda s, x: torch.cat([s.a(x), s.b(x)], 1), a=nn.Conv3d(4, 3, 1), b=nn.Conv3d(4, 5, 1, bias=False)
            ),
            (noise(1, 4, 3, 5, 4),),
            ops={LINEAR: 2, "aten.permute.default": 3},
            rewritten=2,
        ),
        Case(
            "dilated",
            lambda: nn.Conv3d(4, 5, 3, (2, 1, 1), (2, 1, 2), (2, 1, 2)),
            (noise(1, 4, 6, 5, 7),),
            ops={CONV: 1},
            rewritten=1,
        ),
        Case(
            "transposed",
            lambda: nn.Sequential(nn.ConvTranspose3d(4, 3, 2, 2), nn.ReLU(), nn.Conv3d(3, 2, 1)),
            (noise(1, 4, 2, 3, 4),),
            ops={LINEAR: 2, CONV: 0},
            rewritten=2,
        ),
        Case("image", lambda: nn.Conv2d(3, 5, 3), (noise(1, 3, 4, 6),), rewritten=0),
        Case(
            "groups",
            lambda: nn.Conv3d(4, 4, 3, groups=2),
            (noise(1, 4, 4, 4, 6),),
            skips=("it has groups: in BF16 oneDNN has a reference alone",),
        ),
        Case(
            "transposed_groups",
            lambda: nn.ConvTranspose3d(4, 4, 2, 2, groups=2),
            (noise(1, 4, 2, 4, 6),),
            skips=("it has groups: in BF16 oneDNN has a reference alone",),
        ),
        Case(
            "transposed_dilated",
            lambda: nn.ConvTranspose3d(4, 4, 2, 2, dilation=2),
            (noise(1, 4, 2, 4, 6),),
            skips=("it is transposed",),
        ),
    )


def test_every_filter_stride_and_padding() -> None:
    """On graphs as torch.export gives them, which for so many would take a minute."""
    steps = (CanonicaliseConv(), ConvertVolumeConv())
    x, bias = noise(2, 3, 6, 5, 7), noise(4, seed=2)
    filters = ((1, 1, 1), (1, 3, 2), (3, 1, 1), (2, 3, 3), (2, 2, 2), (3, 1, 2))
    strides, paddings = ((1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2)), ((0, 0, 0), (1, 0, 0), (0, 1, 1), (2, 1, 2))
    operation = torch.ops.aten.conv3d.default
    for kernel, stride, padding, dilation in itertools.product(filters, strides, paddings, ((1, 1, 1), (2, 1, 2))):
        if sum(stride) + sum(padding) + sum(dilation) in (4, 7, 10):  # a third is enough
            continue
        weight = noise(4, 3, *kernel, seed=3)
        geometry = [list(stride), list(padding), list(dilation)]

        def build(call: Any, x: fx.Node, weight: fx.Node, bias: fx.Node, geometry: Any = geometry) -> fx.Node:
            return call(operation, x, weight, bias, *geometry)

        graph_module = by_hand(x, constants={"weight": weight, "bias": bias}, build=build)
        graph_module = pipeline.run(graph_module, steps)[0]
        assert "permute" in graph_module.code, (kernel, geometry)
        torch.testing.assert_close(
            graph_module(x)[0], operation(x, weight, bias, *geometry), rtol=1e-4, atol=1e-5, msg=str((kernel, geometry))
        )


_DIMS = {
    name: torch.export.Dim(name, min=4 if name == "batch" else 8, max=64)
    for name in ("batch", "frames", "height", "width")
}


@pytest.mark.parametrize("dynamic", [("batch", "frames"), ("batch", "frames", "height", "width")], ids=["clip", "all"])
def test_dynamic_sizes_stay_dynamic(dynamic: tuple[str, ...]) -> None:
    layers = (nn.Conv3d(4, 4, 3, (2, 1, 1), 1), nn.Conv3d(4, 4, (3, 1, 1)), nn.Conv3d(4, 4, (1, 2, 2), (1, 2, 2)))
    model = nn.Sequential(*layers, nn.Conv3d(4, 4, 1)).eval()
    places = dict(zip(("batch", "frames", "height", "width"), (0, 2, 3, 4), strict=True))
    sizes = {places[name]: _DIMS[name] for name in dynamic}
    exported = torch.export.export(model, (noise(6, 4, 8, 9, 10),), dynamic_shapes=(sizes,))
    graph_module = pipeline.run(capture.exported(exported, None, None, source="here").graph_module, PREPARE)[0]
    assert not [node for node in graph_module.graph.nodes if node.target == torch.ops.aten.conv3d.default]
    for more in (0, 2, 6):
        shape = [size + more if dim in sizes else size for dim, size in enumerate((6, 4, 8, 9, 10))]
        x = noise(*shape)
        torch.testing.assert_close(graph_module(x)[0], model(x), rtol=1e-4, atol=1e-5)


def test_a_layer_used_twice_keeps_one_weight() -> None:
    model = Forward(lambda s, x: s.a(s.a(x)), a=nn.Conv3d(3, 3, 3, padding=1, bias=False)).eval()
    captured = capture.module(model, (noise(1, 3, 4, 4, 4),), source="here")
    graph_module = pipeline.run(captured.graph_module, PREPARE)[0]
    assert list(dict(graph_module.named_buffers())) == ["a_weight_frames"]


def test_activations_in_channels_last_are_not_copied() -> None:
    """Views between the layers of blocks in space and in time: each gives the memory of the one before."""
    model = nn.Sequential(*_pair(4, 6), *_pair(4, 6)).eval()
    captured = capture.module(model, (noise(2, 4, 4, 6, 5),), source="here")
    graph_module = pipeline.run(captured.graph_module, PREPARE)[0]

    class Watched(fx.Interpreter):
        copies = 0

        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.target is torch.ops.armopt.conv.default:
                return result.contiguous(memory_format=torch.channels_last)  # as a packed kernel gives it
            sources = [self.env[source] for source in n.all_input_nodes if source.op == "call_function"]
            if n.op == "call_function" and sources and n.target is not torch.ops.aten.contiguous.default:
                self.copies += result.data_ptr() != sources[0].data_ptr()
            return result

    watched = Watched(graph_module)
    watched.run(noise(2, 4, 4, 6, 5).contiguous(memory_format=torch.channels_last_3d))
    assert watched.copies == 0
