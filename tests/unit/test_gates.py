"""Gates as text, and what becomes of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armopt import accuracy
from armopt.accuracy import gates
from armopt.accuracy.gates import Figures, Gate
from armopt.errors import InputError

A = torch.tensor([3.0, -4.0])
GOOD, BAD = accuracy.compare("a", A, A), accuracy.compare("b", A, -A)


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("top1>=0.995", Gate("top1", ">=", 0.995)),
        (" sqnr > 30 ", Gate("sqnr", ">", 30.0)),
        ("max_abs<=1e-3", Gate("max_abs", "<=", 1e-3)),
        ("cosine[0.logits]>=0.9", Gate("cosine", ">=", 0.9, "0.logits")),
        ("nan<1", Gate("nan", "<", 1.0)),
        ("cosine>=0.9999999999", Gate("cosine", ">=", 0.9999999999)),
    ],
)
def test_reading(text: str, gate: Gate) -> None:
    assert gates.parse(text) == gate
    assert gates.parse(str(gate)) == gate


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("top1", r'can.t read .top1.*"top1>=0.995"'),
        ("", "can.t read"),
        ("top1=0.9", "can.t read"),
        ("top1>=", "can.t read"),
        ("top1>=high", "'high' in 'top1>=high' is no number"),
        ("top1>=nan", "is no number"),
        ("top1>=inf", "is no number"),
        ("cosin>=0.9", "unknown metric 'cosin'.*Did you mean cosine.*Known are cosine"),
        ("top1<=0.9", "more is better.*Write top1>=0.9"),
        ("max_abs>=0.1", "less is better.*Write max_abs<=0.1"),
    ],
)
def test_what_can_not_be_read(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        gates.parse(text)


@given(st.sampled_from(sorted(gates.metrics())), st.floats(allow_nan=False, allow_infinity=False))
def test_text_and_back(name: str, bound: float) -> None:
    gate = Gate(name, ">=" if gates.metrics()[name].higher else "<=", float(f"{bound:g}"))
    assert gates.parse(str(gate)) == gate


def test_the_worst_of_all_buckets_counts() -> None:
    figures = {"batch=1": Figures((GOOD,), {"top1": 1.0}), "batch=8": Figures((GOOD, BAD), {"top1": 0.5})}
    cosine, top1, largest = gates.judge(gates.standard(("top1>=0.5", "max_abs<=7.9"), 0.5), figures, "classification")
    assert (cosine.value, cosine.where, cosine.passed) == (pytest.approx(-1.0), "batch=8, b", False)
    assert (top1.value, top1.where, top1.passed) == (0.5, "batch=8", True)
    assert (largest.value, largest.passed) == (8.0, False)


def test_one_output_alone() -> None:
    figures = {"static": Figures((GOOD, BAD), {})}
    (verdict,) = gates.judge([gates.parse("cosine[a]>=0.99")], figures, "")
    assert verdict.passed
    with pytest.raises(
        InputError, match=r"cosine\[c\]>=0.99 bounds an output that was not measured\. Outputs are a, b"
    ):
        gates.judge([gates.parse("cosine[c]>=0.99")], figures, "")


def test_a_task_that_was_not_measured() -> None:
    with pytest.raises(
        InputError, match=r"miou>=0.9 was not measured: the task is none.*belongs to the task segmentation"
    ):
        gates.judge([gates.parse("miou>=0.9")], {"static": Figures((GOOD,), {})}, "")


def test_a_figure_that_needs_more_inputs() -> None:
    with pytest.raises(InputError, match=r"ranking>=0.9 can.t be measured on so few inputs\. Give more inputs"):
        gates.judge([gates.parse("ranking>=0.9")], {"static": Figures((GOOD,), {"embedding_cosine": 1.0})}, "embedding")


def test_no_noise_is_infinite_sqnr_and_nan_holds_nothing() -> None:
    (verdict,) = gates.judge([gates.parse("sqnr>=200")], {"static": Figures((GOOD,), {})}, "")
    assert verdict.passed
    assert verdict.to_json()["value"] is None
    assert not Gate("cosine", ">=", 0.0).holds(math.nan)
    assert Gate("cosine", ">=", 0.0).shortfall(math.nan) == math.inf


def test_nothing_to_compare_passes() -> None:
    (verdict,) = gates.judge(gates.standard(), {"static": Figures((), {})}, "")
    assert verdict.passed
