from __future__ import annotations

import torch
from harness import Case, Contract, Forward, noise, until
from torch import fx, nn

from armopt.passes import Pass, pipeline
from armopt.passes.pack_embedding import PackEmbedding


def _indices(s: Forward, x: torch.Tensor) -> torch.Tensor:
    return s.table(x.abs().long()) * 2


class TestPackEmbedding(Contract):
    folder = "pack_embedding"
    tolerance = 2**-8  # a table rounded to 8 bits

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, until(None))[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return PackEmbedding({}, least=1000)

    cases = (
        Case(
            "table",
            lambda: Forward(_indices, table=nn.Embedding(32, 8)),
            (noise(2, 5),),
            ops={"aten.embedding.default": 1, "aten._to_copy.default": 2},  # the indices are made of the input
            rewritten=1,
        ),
        Case("dynamic_batch", lambda: Forward(_indices, table=nn.Embedding(32, 8)), (noise(2, 5),), batch=(2, 4)),
        Case(
            "small_table",
            lambda: Forward(_indices, table=nn.Embedding(31, 8)),
            (noise(2, 5),),
            skips=("the table has fewer than 1000 bytes",),
        ),
        Case(
            "no_constant",
            lambda: Forward(lambda s, x: nn.functional.embedding(torch.arange(3), x * 2)),
            (noise(40, 8),),
            rewritten=0,
        ),
    )
