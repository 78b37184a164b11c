"""Figures over several samples, the FP64 anchor, and the runs that are compared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from armopt import passes
from armopt.accuracy import Checker, gates, runs
from armopt.accuracy.tasks import Outputs
from armopt.errors import InputError
from armopt.ir import graph as g
from armopt.passes import pipeline
from tests.planning import captured_from


def scores(given: Outputs) -> Outputs:
    return {"logits": given["x"]}


def noisy(given: Outputs) -> Outputs:
    """Off by a tenth of the input's first value, and its classes turned where that is negative."""
    x = given["x"]
    return {"logits": (x.roll(1, 1) if x[0, 0] < 0 else x) + 0.1 * x[0, 0]}


def test_outputs_count_by_the_worst_sample_and_tasks_over_all() -> None:
    samples = [{"x": torch.tensor([[a, 1.0, 0.0]])} for a in (0.0, 0.5, -3.0, 0.25)]
    checker = Checker(scores, None, gates.standard(("top1>=0.75",)))
    figures = checker.figures("static", samples, noisy)
    (entry,) = figures.outputs
    assert entry.max_abs == pytest.approx(4.3)  # the third sample: -3 for 1, and 0.3 less
    assert entry.similarity < 0
    assert figures.task["top1"] == 0.75
    assert checker.evidence["static"].inputs is samples[0]
    assert [verdict.passed for verdict in checker.verdicts({"static": figures})] == [False, True]


def test_what_the_original_gives_is_kept_for_other_candidates() -> None:
    calls: list[float] = []

    def counting(given: Outputs) -> Outputs:
        calls.append(float(given["x"].sum()))
        return scores(given)

    samples = [{"x": torch.eye(3)}, {"x": -torch.eye(3)}]
    for keep, count in ((True, 2), (False, 4)):
        calls.clear()
        checker = Checker(counting, None, (), keep=keep)
        first, second = (checker.figures("static", samples, noisy) for _ in range(2))
        assert first == second
        assert len(calls) == count


def test_an_anchor_that_does_not_run_is_given_up_with_its_reason() -> None:
    def broken(given: Outputs) -> Outputs:
        raise RuntimeError("no FP64 here\nand more")

    checker = Checker(scores, broken, gates.standard(("rmse_ratio<=1e5",)))
    figures = {"static": checker.figures("static", [{"x": torch.eye(3)}] * 2, noisy)}
    assert checker.no_anchor == "no FP64 here"
    assert figures["static"].outputs[0].rmse_ratio is None
    with pytest.raises(InputError, match=r"rmse_ratio<=100000 bounds an output that was not measured"):
        checker.verdicts(figures)


def test_other_outputs_than_the_originals_are_named() -> None:
    checker = Checker(scores, None, (), source="model.pt2")
    with pytest.raises(InputError, match=r"model\.pt2: gives logits, the bundle y\. Is the bundle made from"):
        checker.figures("static", [{"x": torch.eye(3)}], lambda given: {"y": given["x"]})


class Several(nn.Module):
    """Operations that name dtypes, make their own tensors, or write to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 8)
        self.tokens, self.attention = nn.Embedding(10, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.LayerNorm(8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        self.calls.add_(1.0)
        y = self.norm(self.conv(x)).relu().mean((2, 3))
        z = self.tokens(ids) + torch.arange(ids.shape[1], dtype=y.dtype)[None, :, None] / 7
        z, _ = self.attention(z, z, z, need_weights=False)
        total = torch.nn.functional.gelu(self.fc(y + torch.full((8,), 0.1, dtype=y.dtype))).unsqueeze(1) + self.last(z)
        return total * self.calls


def test_fp64_is_the_model_in_fp64() -> None:
    torch.manual_seed(0)
    model = Several().eval()
    x, ids = torch.randn(2, 3, 6, 6), torch.randint(0, 10, (2, 5))
    captured = captured_from(model, x, ids)
    prepared, _ = pipeline.run(g.copy(captured.graph_module), passes.PREPARE)
    with torch.no_grad():
        expected = Several().eval().double()
        expected.load_state_dict(model.state_dict())
        exact = expected(x.double(), ids)
    for graph_module, tolerance in ((captured.graph_module, 1e-12), (prepared, 1e-6)):
        # the graph as captured to FP64's last bits; batch norm and other constants are folded in FP32
        for _ in range(2):  # its buffer stays as it was
            (found,) = runs.run(graph_module, [x, ids], runs.InFp64)
            assert found.dtype == torch.float64
            assert float((found - exact).abs().max()) <= tolerance * float(exact.abs().max())
    assert float(captured.graph_module.calls) == 0.0
