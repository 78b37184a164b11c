from __future__ import annotations

from harness import Case, Contract, Forward, noise, until
from torch import fx, nn

from armopt.passes import Pass, pipeline
from armopt.passes.convert_pixel_conv import ConvertPixelConv

LINEAR, CONV = "armopt.linear.default", "armopt.conv.default"


class TestConvertPixelConv(Contract):
    folder = "convert_pixel_conv"
    tolerance = 2**-20  # the same sums, by BLAS in another order

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, until(ConvertPixelConv))[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return ConvertPixelConv()

    cases = (
        Case(
            "squeeze_and_excitation",
            lambda: Forward(
                lambda s, x: x * s.b(s.a(x.mean((2, 3), keepdim=True)).relu()).sigmoid(),
                a=nn.Conv2d(6, 2, 1),
                b=nn.Conv2d(2, 6, 1, bias=False),
            ),
            (noise(2, 6, 4, 4),),
            ops={LINEAR: 2, CONV: 0, "aten.flatten.using_ints": 1},
            rewritten=2,
        ),
        Case(
            "dynamic_batch",
            lambda: Forward(lambda s, x: s.a(x.mean((2, 3), keepdim=True)), a=nn.Conv2d(6, 4, 1)),
            (noise(2, 6, 4, 4),),
            batch=(1, 4),
            ops={LINEAR: 1},
            rewritten=1,
        ),
        Case("image", lambda: nn.Conv2d(4, 4, 1), (noise(1, 4, 5, 5),), ops={LINEAR: 0}, rewritten=0),
        Case(
            "larger_filter",
            lambda: nn.Conv2d(4, 4, 3, padding=1),
            (noise(2, 4, 1, 1),),
            skips=("transposed, grouped, padded, or of a larger filter",),
        ),
        Case(
            "groups",
            lambda: nn.Conv2d(4, 4, 1, groups=2),
            (noise(2, 4, 1, 1),),
            skips=("transposed, grouped, padded, or of a larger filter",),
        ),
        Case(
            "residual",
            lambda: Forward(lambda s, x: s.a(x) + x, a=nn.Conv2d(4, 4, 1)),
            (noise(2, 4, 1, 1),),
            skips=("an addition is fused",),
        ),
    )
