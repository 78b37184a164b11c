from __future__ import annotations

import pytest
import torch
from harness import Case, Contract, Forward, noise, run_pass, storages, until
from torch import fx, nn

from armopt import capture
from armopt.ir import graph as g
from armopt.passes import Pass, pipeline
from armopt.passes.fold_constants import FoldConstants

_FAR = noise(4, 3) > 0


class TestFoldConstants(Contract):
    folder = "fold_constants"
    tolerance = 0.0  # the same operations on the same values, only earlier

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, until(FoldConstants))[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return FoldConstants()

    cases = (
        Case(
            "standardised_by_batch_norm",
            lambda: Forward(
                lambda s, x: nn.functional.conv2d(
                    x,
                    nn.functional.batch_norm(s.w.reshape(1, 4, -1), None, None, training=True).reshape(4, 3, 2, 2),
                ),
                w=nn.Parameter(noise(4, 3, 2, 2)),
            ),
            (noise(1, 3, 5, 5),),
            absent=("aten._native_batch_norm_legit.no_stats", "aten.reshape.default"),
        ),
        Case(
            "transposed_weight",
            lambda: Forward(lambda s, x: x @ s.w.t().contiguous(), w=nn.Parameter(noise(4, 3))),
            (noise(2, 3),),
            absent=("aten.t.default",),
        ),
        Case(
            "chain",
            lambda: Forward(lambda s, x: x + (s.a * 2 + s.b).relu().sum(0), a=noise(3, 3), b=noise(3)),
            (noise(2, 3),),
            ops={"aten.add.Tensor": 1},
            absent=("aten.mul.Tensor", "aten.relu.default"),
            rewritten=4,
        ),
        Case(
            "positions",
            lambda: Forward(lambda s, x: s.table(torch.arange(x.shape[1])) + x, table=nn.Embedding(8, 4)),
            (noise(2, 5, 4),),
            absent=("aten.arange.start_step", "aten.arange.default"),
        ),
        Case(
            "too_large",
            lambda: Forward(lambda s, x: x + s.row.expand(3000, 100).clone() * 1.5, row=noise(100)),
            (noise(3000, 100),),
            skips=("the result takes 1200000 bytes, more than what it is made from",),
        ),
        Case(
            "window_mask",  # as Swin makes it of its input, of which nothing but the dtype counts
            lambda: Forward(lambda s, x: x + (x.new_zeros((4, 3)) + torch.arange(3)).masked_fill(s.far, -1), far=_FAR),
            (noise(4, 3),),
            ops={"aten.add.Tensor": 1},
            absent=("aten.new_zeros.default", "aten.masked_fill.Scalar"),
        ),
        Case(
            "bias_table",  # indices that are no mask of what to take: the shape is known
            lambda: Forward(lambda s, x: x + s.table[s.place], table=noise(9), place=torch.arange(6).view(2, 3)),
            (noise(2, 3),),
            absent=("aten.index.Tensor",),
        ),
        Case(
            "dynamic_batch",
            lambda: Forward(lambda s, x: x + torch.arange(x.shape[0])[:, None] * (s.a * 2), a=noise(3)),
            (noise(2, 3),),
            batch=(1, 4),
            rewritten=1,
        ),
        Case(
            "dtype_mix",
            lambda: Forward(
                lambda s, x: x * s.mask.float() + s.index.double().sum().float(),
                mask=noise(3) > 0,
                index=torch.arange(3),
            ),
            (noise(2, 3),),
            absent=("aten._to_copy.default", "aten.to.dtype"),
        ),
    )


def test_the_bound_is_a_field() -> None:
    model = lambda: Forward(lambda s, x: x + s.row.expand(20, 100) * 2, row=noise(100))  # noqa: E731
    generous = run_pass(FoldConstants(max_growth=8000), model, noise(20, 100))
    strict = run_pass(FoldConstants(max_growth=7999), model, noise(20, 100))
    assert generous.skipped == ()
    assert [s.reason for s in strict.skipped] == ["the result takes 8000 bytes, more than what it is made from"] * 1


def test_random_numbers_are_not_folded() -> None:
    result = run_pass(FoldConstants(), lambda: Forward(lambda s, x: x + torch.rand(3)), noise(2, 3))
    a, b = result.graph_module(noise(2, 3)), result.graph_module(noise(2, 3))
    assert result.modified is False
    assert not torch.equal(a[0], b[0])


def test_a_buffer_that_the_model_writes_to_is_not_folded() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x * 0 + self.count * 10

    captured = capture.module(Counter(), (noise(3),))
    result = FoldConstants()(g.copy(captured.graph_module))
    result.graph_module.count.zero_()
    assert [result.graph_module(noise(3))[0].tolist() for _ in range(2)] == [[10.0] * 3, [20.0] * 3]


def test_a_transposed_weight_keeps_its_memory() -> None:
    model = lambda: Forward(lambda s, x: s.table(x.long()) @ s.table.weight.t(), table=nn.Embedding(8, 4))  # noqa: E731
    result = run_pass(FoldConstants(), model, noise(2).abs())
    assert result.modified
    assert storages(result.graph_module) == 1


@pytest.mark.parametrize("size", [0, 3])
def test_the_weights_left_over_are_dropped(size: int) -> None:
    result = run_pass(FoldConstants(), lambda: Forward(lambda s, x: x + s.w * 2, w=noise(size)), noise(2, size))
    assert len(list(result.graph_module.buffers())) == 1
