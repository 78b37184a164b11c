from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Case, Contract, Forward2, noise, run_pass, storages, until
from torch import Tensor, fx, nn

from armopt.models import torchvision_ops
from armopt.passes import Pass, pipeline
from armopt.passes.split_experts import SplitExperts

torchvision_ops.ensure_torchvision_if_installed()
pytest.importorskip("transformers.integrations.moe")  # its operation for sorted rows

BEFORE = until(SplitExperts)
LINEAR, BMM, MATMUL, EINSUM = "aten.linear.default", "aten.bmm.default", "aten.matmul.default", "aten.einsum.default"
SPLIT, JOIN, SORT = "armopt.split_rows.default", "armopt.join_rows.default", "aten.argsort.default"
PICK = "aten.index_select.default"
#: Experts that nothing chooses, and one that all but one row choose; negative ids count from the end.
IDS = torch.tensor([3, 0, -1, 3, 0])


def chosen(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    """A function of the input, ids and weights `a`, `b`, … of those shapes."""
    weights = {name: nn.Parameter(noise(*shape)) for name, shape in zip("abcd", shapes, strict=False)}
    return lambda: Forward2(lambda s, x, ids: function(x, ids, *(getattr(s, n) for n in weights)), **weights)


def _two(x: Tensor, ids: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """As transformers' batched experts: [out, in] with biases, gate, [out, in]."""
    y = torch.bmm(a[ids], x.unsqueeze(-1)).squeeze(-1) + b[ids]
    gate, up = y.chunk(2, dim=-1)
    return torch.bmm(c[ids], (nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1) + d[ids]


def _sorted(x: Tensor, ends: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As transformers' grouped experts."""
    y = torch.ops.transformers.grouped_mm_fallback(x, a.transpose(-2, -1), offs=ends)
    return torch.ops.transformers.grouped_mm_fallback(y.relu(), b, ends)  # type: ignore[no-any-return]


class TestSplitExperts(Contract):
    folder = "split_experts"
    # The same FP32 products, summed in another order: a few units of 2^-24 of the largest.
    tolerance = 1e-6

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, BEFORE)[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return SplitExperts()

    cases = (
        Case(
            "grouped",
            chosen(_sorted, (3, 6, 4), (3, 6, 2)),
            (noise(5, 4), torch.tensor([2, 2, 5], dtype=torch.int32)),
            ops={SPLIT: 2, LINEAR: 6, JOIN: 2, "aten._to_copy.default": 1},
            absent=("transformers.grouped_mm_fallback.default",),
            rewritten=2,
        ),
        Case(
            "grouped_not_all",
            chosen(_sorted, (3, 6, 4), (3, 6, 2)),
            (noise(5, 4), torch.tensor([1, 3, 3])),
            ops={SPLIT: 2, LINEAR: 6, JOIN: 2},
            rewritten=2,
        ),
        Case(
            "two_in_a_row",
            chosen(_two, (4, 12, 8), (4, 12), (4, 8, 6), (4, 8)),
            (noise(5, 8), IDS),
            ops={SPLIT: 2, LINEAR: 8, JOIN: 2, SORT: 2, PICK: 3},
            absent=(BMM, "aten.squeeze.dim"),
            rewritten=2,
        ),
        Case(
            "transposed",
            chosen(lambda x, ids, a: torch.bmm(x.unsqueeze(1), a[ids]).squeeze(1), (4, 8, 6)),
            (noise(5, 8), IDS),
            batch=(2, 5),
            ops={SPLIT: 1, LINEAR: 4, JOIN: 1},
            absent=(BMM, "aten.squeeze.dim"),
        ),
        Case(
            "several_of_each_row",
            chosen(lambda x, ids, a: torch.einsum("beck,bk->bec", a[ids], x), (4, 6, 8)),
            (noise(3, 8), torch.tensor([[0, 3], [3, 2], [0, 2]])),
            batch=(2, 3),
            ops={SPLIT: 1, LINEAR: 4, JOIN: 1, "aten.expand.default": 1},
            absent=(EINSUM,),
        ),
        Case(
            "spread",
            chosen(lambda x, ids, a: (a[ids] @ x[:, None, :, None])[..., 0], (4, 6, 8)),
            (noise(3, 8), torch.tensor([[0, 3], [3, 2], [0, 2]])),
            ops={SPLIT: 1, LINEAR: 4, "aten.expand.default": 1},
            absent=(MATMUL,),
        ),
        Case(
            "rows_of_each",
            chosen(lambda x, ids, a, b: torch.baddbmm(b, x, a.index_select(0, ids).mT), (4, 6, 8), (5, 1, 6)),
            (noise(5, 2, 8), IDS.abs()),
            ops={SPLIT: 1, LINEAR: 4, "aten.add.Tensor": 1},
            absent=("aten.baddbmm.default",),
        ),
        Case(
            "stacked",
            chosen(lambda x, ids, a, b: torch.bmm(torch.stack([a, b])[ids], x.unsqueeze(-1)), (6, 8), (6, 8)),
            (noise(5, 8), IDS.clamp(0, 1)),
            ops={SPLIT: 1, LINEAR: 2},
            absent=(BMM,),
        ),
        Case(
            "activations",
            chosen(lambda x, ids, a: torch.bmm(x[ids], x) + a, (1, 4, 4)),
            (noise(2, 4, 4), torch.tensor([1, 0])),
            rewritten=0,
        ),
        Case(
            "another_of_the_batch",
            chosen(lambda x, ids, a: torch.einsum("bnk,bk->bnk", a[ids], x), (4, 6, 8)),
            (noise(5, 8), IDS),
            skips=("it is not one matrix of the chosen for each row",),
            rewritten=0,
        ),
        Case(
            "doubles",
            chosen(lambda x, ids, a: torch.bmm(a.double()[ids], x.double().unsqueeze(-1)).float(), (4, 6, 8)),
            (noise(5, 8), IDS),
            skips=("works on another dtype than FP32",),
            rewritten=0,
        ),
        Case(
            "grouped_activations",
            chosen(lambda x, ends, a: torch.ops.transformers.grouped_mm_fallback(x, a * x[0, 0], ends), (3, 4, 6)),
            (noise(5, 4), torch.tensor([2, 2, 5])),
            skips=("the weight is not a constant",),
            rewritten=0,
        ),
    )


def test_matrices_that_two_products_read_are_there_once() -> None:
    model = chosen(lambda x, ids, a: torch.bmm(a[ids], torch.bmm(a[ids], x.unsqueeze(-1)).tanh()), (4, 6, 6))
    result = run_pass(SplitExperts(), model, noise(5, 6), IDS, before=BEFORE)
    assert len(result.rewritten) == 2
    matrices = [n for n in result.graph_module.graph.nodes if n.op == "get_attr" and n.meta["val"].shape == (6, 6)]
    assert len({node.target for node in matrices}) == 4
    assert storages(result.graph_module) == 3  # the stack, and two of ids


@pytest.mark.parametrize("ids", [[4, 0], [-5, 0]])
def test_an_expert_that_does_not_exist_is_an_error(ids: list[int]) -> None:
    model = chosen(lambda x, ids, a: torch.bmm(a[ids], x.unsqueeze(-1)), (4, 6, 8))
    result = run_pass(SplitExperts(), model, noise(2, 8), torch.tensor([1, 2]), before=BEFORE)
    with pytest.raises(IndexError):
        result.graph_module(noise(2, 8), torch.tensor(ids))
