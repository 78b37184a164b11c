from __future__ import annotations

import torch
from harness import Case, Contract, Forward, noise, until
from torch import fx

from armopt.passes import Pass, pipeline
from armopt.passes.fill_empty import FillEmpty

PERMUTATION = torch.tensor([2, 0, 1])


def in_parts(s: object, x: torch.Tensor) -> torch.Tensor:
    """As DeepSeek joins its keys."""
    y = x.new_empty(3, 6)
    y[..., :4].copy_(x)
    y[..., 4:].copy_(x[:, :1].expand(-1, 2))
    return y


class TestFillEmpty(Contract):
    folder = "fill_empty"
    # The same values.
    tolerance = 0.0

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, until(FillEmpty))[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return FillEmpty()

    cases = (
        Case(
            "index_put",
            lambda: Forward(lambda s, x: torch.empty_like(x).index_put((s.p,), x), p=PERMUTATION),
            (noise(3, 4),),
            ops={"aten.zeros_like.default": 1},
            absent=("aten.empty_like.default",),
            rewritten=1,
        ),
        Case(
            "of_a_size",
            lambda: Forward(
                lambda s, x: torch.empty(3, 4).index_copy(0, s.p, x) + x.new_empty(3, 4).index_copy(0, s.p, x),
                p=PERMUTATION,
            ),
            (noise(3, 4),),
            ops={"aten.zeros.default": 1, "aten.new_zeros.default": 1},
            absent=("aten.empty.memory_format", "aten.new_empty.default"),
            rewritten=2,
        ),
        Case(
            "in_parts",
            lambda: Forward(in_parts),
            (noise(3, 4),),
            ops={"aten.new_zeros.default": 1},
            absent=("aten.new_empty.default",),
            rewritten=1,
        ),
        Case(
            "a_part_is_read",
            lambda: Forward(lambda s, x: x[:2] + torch.empty_like(x)[:2].mul(0).nan_to_num(0)),
            (noise(3, 4),),
            skips=("what its memory holds is read, not only written over",),
            rewritten=0,
        ),
        Case(
            "read",
            lambda: Forward(lambda s, x: x + torch.empty_like(x).mul(0).nan_to_num(0)),
            (noise(3, 4),),
            skips=("what its memory holds is read, not only written over",),
            rewritten=0,
        ),
    )
