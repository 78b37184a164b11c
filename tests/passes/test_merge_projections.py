from __future__ import annotations

import torch
from harness import Case, Contract, Forward, noise, until
from torch import fx, nn

from armopt.passes import Pass, pipeline
from armopt.passes.merge_projections import MergeProjections


def _attention(*, bias: bool = True) -> Forward:
    def forward(s: Forward, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(2, 5, 2, 4).transpose(1, 2) for layer in (s.q, s.k, s.v))
        return s.out(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 8))

    layers = {name: nn.Linear(8, 8, bias=bias or name == "k") for name in ("q", "k", "v")}
    return Forward(forward, **layers, out=nn.Linear(8, 8))


class TestMergeProjections(Contract):
    folder = "merge_projections"
    tolerance = 2**-20  # the same sums, by BLAS in another order

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, until(MergeProjections))[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return MergeProjections()

    cases = (
        Case(
            "attention",
            _attention,
            (noise(2, 5, 8),),
            ops={"armopt.linear.default": 2, "aten.narrow.default": 3},
            rewritten=3,
        ),
        Case(
            "some_without_bias",
            lambda: _attention(bias=False),
            (noise(2, 5, 8),),
            ops={"armopt.linear.default": 2},
            rewritten=3,
        ),
        Case(
            "other_widths_and_dynamic_batch",
            lambda: Forward(lambda s, x: s.a(x).sum(-1) + s.b(x).sum(-1), a=nn.Linear(6, 3), b=nn.Linear(6, 7)),
            (noise(2, 6),),
            batch=(2, 5),
            ops={"armopt.linear.default": 1},
            rewritten=2,
        ),
        Case(
            "a_fused_post_op",
            lambda: Forward(lambda s, x: s.a(x).relu() * s.b(x) * s.c(x), **{n: nn.Linear(6, 6) for n in "abc"}),
            (noise(2, 6),),
            ops={"armopt.linear.default": 2},
            skips=("its relu is fused",),
            rewritten=2,
        ),
        Case(
            "a_shared_weight",
            lambda: Forward(lambda s, x: s.a(x) * s.a(x.relu()) * s.b(x), a=nn.Linear(6, 6), b=nn.Linear(6, 6)),
            (noise(2, 6),),
            ops={"armopt.linear.default": 3},
            skips=("its weight a_weight is shared",),
            rewritten=0,
        ),
        Case(
            "other_inputs",
            lambda: Forward(lambda s, x: s.a(x) * s.b(x + 1), a=nn.Linear(6, 6), b=nn.Linear(6, 6)),
            (noise(2, 6),),
            ops={"armopt.linear.default": 2},
            rewritten=0,
        ),
    )
