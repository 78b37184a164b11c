from __future__ import annotations

from harness import Case, Contract, Forward, noise, until
from torch import fx

from armopt.passes import Pass, pipeline
from armopt.passes.canonicalise_split import CanonicaliseSplit

SPLITS = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int")


class TestCanonicaliseSplit(Contract):
    folder = "canonicalise_split"
    tolerance = 0.0  # nothing is computed

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, until(CanonicaliseSplit))[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return CanonicaliseSplit()

    cases = (
        Case(
            "split",
            lambda: Forward(lambda s, x: x.split(3, dim=-1)[0].sum() + x.split(3, dim=-1)[2]),
            (noise(2, 8),),
            ops={"aten.narrow.default": 2},
            absent=SPLITS,
            rewritten=2,
        ),
        Case(
            "sizes_and_chunks",
            lambda: Forward(lambda s, x: x.split([1, 7], 1)[-1].sum() + x.chunk(2, 1)[1]),
            (noise(2, 8),),
            ops={"aten.narrow.default": 2},
            absent=SPLITS,
            rewritten=2,
        ),
        Case(
            "unbind",
            lambda: Forward(lambda s, x: x.unbind(1)[0] * x.unbind(1)[-1]),
            (noise(2, 3, 4),),
            ops={"aten.select.int": 2},
            absent=SPLITS,
        ),
        Case(
            "dynamic_batch",
            lambda: Forward(lambda s, x: x.chunk(2, 1)[0] * 2),
            (noise(2, 8),),
            batch=(2, 6),
            ops={"aten.narrow.default": 1},
        ),
        Case("nothing_to_do", lambda: Forward(lambda s, x: x[:, 1:] * 2), (noise(2, 8),), rewritten=0),
    )
