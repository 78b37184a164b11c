from __future__ import annotations

import pytest
import torch
from harness import Case, Contract, Forward, noise, until
from torch import fx, nn

from armopt import capture
from armopt.passes import PREPARE, Pass, pipeline
from armopt.passes.fold_stride import FoldStride


class TestFoldStride(Contract):
    folder = "fold_stride"
    tolerance = 2**-20  # the same sums in another order

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, until(FoldStride))[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return FoldStride()

    cases = (
        Case(
            "stem",
            lambda: nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU()),
            (noise(2, 3, 20, 16),),
            ops={"armopt.conv.default": 1, "aten.stack.default": 1, "aten.unbind.int": 7},
            rewritten=1,
        ),
        Case("odd_image", lambda: nn.Conv2d(3, 4, 5, 2, 1, bias=False), (noise(1, 3, 21, 18),), rewritten=1),
        Case("cropped", lambda: nn.Conv2d(1, 4, 6, 2), (noise(1, 1, 13, 15),), rewritten=1),
        Case(
            "patches_dynamic_batch",
            lambda: nn.Conv2d(3, 16, 8, 8),
            (noise(2, 3, 16, 24),),
            batch=(2, 3),
            ops={"armopt.conv.default": 1, "aten.stack.default": 0},
            absent=("aten.constant_pad_nd.default",),
            rewritten=1,
        ),
        Case("stem_dynamic_batch", lambda: nn.Conv2d(3, 4, 7, 2, 3), (noise(2, 3, 9, 9),), batch=(2, 3), rewritten=1),
        Case("many_channels", lambda: nn.Conv2d(4, 8, 7, 2, 3), (noise(1, 4, 9, 9),), rewritten=0),
        Case("frames", lambda: nn.Conv2d(9, 4, 5, 2, 2), (noise(2, 9, 8, 8),), rewritten=1),
        Case("patches_of_frames", lambda: nn.Conv2d(9, 4, 8, 8), (noise(1, 9, 16, 16),), rewritten=0),
        Case("small_filter", lambda: nn.Conv2d(3, 8, 3, 2, 1), (noise(1, 3, 9, 9),), rewritten=0),
        Case("one_dimension", lambda: nn.Conv1d(3, 8, 7, 2), (noise(1, 3, 19),), rewritten=0),
        Case(
            "dilated",
            lambda: nn.Conv2d(3, 8, 5, 2, 1, dilation=2),
            (noise(1, 3, 19, 19),),
            skips=("unequal strides or a dilation",),
            rewritten=0,
        ),
        Case(
            "grouped",
            lambda: Forward(lambda s, x: s.conv(x), conv=nn.Conv2d(3, 6, 5, 2, groups=3)),
            (noise(1, 3, 19, 19),),
            skips=("a transposed or grouped convolution",),
            rewritten=0,
        ),
    )


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 7, 2, 3), nn.Conv2d(3, 4, 8, 8)], ids=["stem", "patches"])
def test_a_dynamic_batch_stays_dynamic(layer: nn.Module) -> None:
    captured = capture.module(layer.eval(), (noise(2, 3, 16, 16),), batch=(2, 5), source="here")
    graph_module = pipeline.run(captured.graph_module, PREPARE)[0]
    assert "folded" in graph_module.code
    for size in (1, 2, 5, 7):
        x = noise(size, 3, 16, 16)
        torch.testing.assert_close(graph_module(x)[0], layer(x), rtol=1e-5, atol=1e-5)


def test_an_image_of_dynamic_size_is_refused() -> None:
    size = torch.export.Dim("size", min=16, max=64)
    exported = torch.export.export(nn.Conv2d(3, 4, 7, 2, 3).eval(), (noise(1, 3, 32, 16),), dynamic_shapes=({2: size},))
    before = PREPARE[: [type(step) for step in PREPARE].index(FoldStride)]
    graph_module = pipeline.run(capture.exported(exported, None, None, source="here").graph_module, before)[0]
    assert [skip.reason for skip in FoldStride()(graph_module).skipped] == ["the size of the image is dynamic"]
