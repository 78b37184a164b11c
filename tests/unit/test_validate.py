"""armopt.accuracy: the metrics, the gate, and `validate` on a bundle."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from armopt import accuracy
from armopt.errors import InputError

A = torch.tensor([3.0, -4.0])


def test_figures_by_hand() -> None:
    found = accuracy.compare("y", A, torch.tensor([3.0, -3.0]))
    assert found.cosine == pytest.approx((9 + 12) / (5 * math.sqrt(18)))
    assert found.sqnr_db == pytest.approx(10 * math.log10(25 / 1))
    assert (found.max_abs, found.mean_abs, found.max_rel) == (1.0, 0.5, 0.25)
    assert found.finite


def test_equal_tensors() -> None:
    found = accuracy.compare("y", A, A.clone())
    assert (found.cosine, found.sqnr_db, found.max_abs, found.finite) == (1.0, None, 0.0, True)


@pytest.mark.parametrize(
    ("a", "b", "cosine"),
    [
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([0.0, 0.0], [1.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 1.0], 0.0),
        ([1.0, 0.0], [-2.0, 0.0], -1.0),
        ([], [], 1.0),
    ],
)
def test_degenerate_vectors(a: list[float], b: list[float], cosine: float) -> None:
    assert accuracy.compare("y", torch.tensor(a), torch.tensor(b)).cosine == pytest.approx(cosine)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_finite_in_fp32_alone_is_found(bad: float) -> None:
    found = accuracy.compare("y", torch.tensor([1.0, 2.0]), torch.tensor([1.0, bad]))
    assert not found.finite
    assert found.cosine == pytest.approx(1.0)
    report = accuracy.summary({"static": [found]}, min_cosine=0.9, reference="r")
    assert report["passed"] is False


def test_infinities_at_the_same_places_are_no_error() -> None:
    masked = torch.tensor([1.0, -math.inf])
    assert accuracy.compare("y", masked, masked).finite


@pytest.mark.parametrize("found", [-math.inf, math.nan])
def test_another_infinity_is_an_error(found: float) -> None:
    assert not accuracy.compare("y", torch.tensor([1.0, math.inf]), torch.tensor([1.0, found])).finite


def test_integers_and_halves_are_compared_in_fp64() -> None:
    assert accuracy.compare("y", torch.tensor([2**24 + 1]), torch.tensor([2**24])).max_abs == 1.0
    assert accuracy.compare("y", torch.tensor([True, False]), torch.tensor([True, True])).max_abs == 1.0


def test_another_shape_is_an_error() -> None:
    with pytest.raises(InputError, match=r"output y: shape \(1,\), the original gives \(2,\)"):
        accuracy.compare("y", A, A[:1])


def test_the_gate_takes_the_worst_of_all_buckets() -> None:
    good, bad = accuracy.compare("a", A, A), accuracy.compare("b", A, -A)
    report = accuracy.summary({"batch=1": [good], "batch=8": [good, bad]}, min_cosine=0.5, reference="r")
    assert (report["cosine"], report["max_abs"], report["passed"]) == (pytest.approx(-1.0), 8.0, False)
    assert accuracy.summary({"batch=1": [good]}, min_cosine=1.0, reference="r")["passed"] is True
    assert accuracy.summary({}, min_cosine=1.0, reference="r")["passed"] is True
    assert [entry["output"] for entry in report["outputs"]["batch=8"]] == ["a", "b"]


def test_what_is_no_tensor_is_left_out() -> None:
    assert [e.output for e in accuracy.compare_all(["n", "t"], [3, A], [3, A])] == ["t"]


def test_validate_against_the_original(mlp_bundle: Path, mlp: nn.Module) -> None:
    report = accuracy.validate(mlp_bundle, against=mlp)
    assert report["passed"] is True
    # BF16 keeps 8 bits: the noise of a rounding is -59 dB of the signal; the operands of two layers and their results
    assert 0.999 < report["cosine"] < 1.0
    assert set(report["outputs"]) == {"batch=2", "batch=64"}
    assert [entry["output"] for entry in report["outputs"]["batch=2"]] == ["logits", "hidden"]
    assert (report["inputs"], "Mlp" in report["reference"]) == ("random, seeded", True)


def test_another_model_fails_the_gate(mlp: torch.nn.Module, mlp_bundle: Path) -> None:
    torch.manual_seed(1)
    another = type(mlp)()

    assert accuracy.validate(mlp_bundle, against=another)["passed"] is False


def test_validate_with_inputs(mlp_bundle: Path, mlp_inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, scale = mlp_inputs
    report = accuracy.validate(mlp_bundle, inputs={"x": x, "scale": scale})
    assert (report["inputs"], report["passed"]) == ("given", True)
    assert "the bundle's own graph" in report["reference"]
    with pytest.raises(InputError, match="lacks scale"):
        accuracy.validate(mlp_bundle, inputs={"x": x})


@pytest.mark.parametrize("shape", [(3, 15), (16,)])
def test_inputs_of_another_shape_are_named(mlp_bundle: Path, shape: tuple[int, ...]) -> None:
    try:
        accuracy.validate(mlp_bundle, inputs={"x": torch.zeros(shape), "scale": torch.zeros(8)})
    except InputError:
        return
    raise AssertionError("not refused")
