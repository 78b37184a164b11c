from __future__ import annotations

from typing import Any

import torch
from harness import Case, Contract, Forward, noise, until
from torch import fx, nn

from armopt.passes import Pass, pipeline
from armopt.passes.merge_shortcut import MergeShortcut


def _block(stride: int = 1, *, relu: bool = True, bias: bool = True, **shortcut: Any) -> Forward:
    """The end of a residual block as ResNet has it."""

    def forward(s: Forward, x: torch.Tensor) -> torch.Tensor:
        total = s.last(s.inner(x)) + s.shortcut(x)
        return total.relu() if relu else total

    options = {"kernel_size": 1, "stride": stride, **shortcut}
    return Forward(
        forward,
        inner=nn.Conv2d(4, 6, 3, stride, padding=1),
        last=nn.Conv2d(6, 8, 1, bias=bias),
        shortcut=nn.Conv2d(4, 8, bias=bias, **options),
    )


def _shared() -> Forward:
    return Forward(lambda s, x: s.a(x.sin()) + s.a(x), a=nn.Conv2d(4, 8, 1))


def _read_twice() -> Forward:
    def forward(s: Forward, x: torch.Tensor) -> torch.Tensor:
        shortcut = s.b(x)
        return (s.a(x.sin()) + shortcut) * shortcut

    return Forward(forward, a=nn.Conv2d(4, 8, 1), b=nn.Conv2d(4, 8, 1))


_IMAGES = (noise(2, 4, 6, 6),)


class TestMergeShortcut(Contract):
    folder = "merge_shortcut"
    tolerance = 2**-20  # the same sums, in another order

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, until(MergeShortcut))[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return MergeShortcut()

    cases = (
        Case("block", _block, _IMAGES, ops={"armopt.conv.default": 2, "aten.cat.default": 1}, rewritten=1),
        Case(
            "strided_without_bias",
            lambda: _block(2, relu=False, bias=False),
            (noise(2, 4, 7, 6),),
            batch=(2, 5),
            ops={"armopt.conv.default": 2, "aten.slice.Tensor": 2},
            rewritten=1,
        ),
        Case(
            "wider_shortcut",
            lambda: _block(kernel_size=3, padding=1),
            _IMAGES,
            ops={"armopt.conv.default": 3},
            skips=("shortcut is not 1x1",),
        ),
        Case(
            "groups",
            lambda: _block(groups=2),
            _IMAGES,
            ops={"armopt.conv.default": 3},
            skips=("shortcut has groups or is transposed",),
        ),
        Case("shared_weight", _shared, _IMAGES, ops={"armopt.conv.default": 2}, skips=("a_1 shares its weight",)),
        Case(
            "read_twice",
            _read_twice,
            _IMAGES,
            ops={"armopt.conv.default": 2},
            skips=("b is used elsewhere, or has a post-op",),
        ),
    )
