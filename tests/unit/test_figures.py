"""What figures see: complex numbers, indices, errors under a large common value, single numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import armopt
from armopt import accuracy
from armopt.accuracy import Validation, columns, gates
from armopt.accuracy.gates import Figures
from armopt.accuracy.metrics import Accuracy
from armopt.errors import InputError

STEPS = torch.arange(64, dtype=torch.float32).reshape(16, 4) / 64


def judged(*entries: Accuracy, texts: tuple[str, ...] = ()) -> Validation:
    figures = {"static": Figures(entries, {})}
    return Validation("r", "i", True, 1, "ran", figures, gates.judge(gates.standard(texts), figures, ""))


def test_complex_numbers_have_an_imaginary_part() -> None:
    a = torch.complex(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0]))
    found = accuracy.compare("y", a, torch.complex(a.real, -a.imag))
    assert found.cosine == pytest.approx(0.0)  # 9 + 16 less 16 + 9
    assert found.max_abs == 8.0
    assert accuracy.compare("y", a.conj(), a.conj().clone()).cosine == pytest.approx(1.0)
    assert accuracy.compare("y", a[0], a[0].clone()).cosine == pytest.approx(1.0)  # one number without dimensions
    broken = torch.complex(a.real, torch.tensor([4.0, math.nan]))
    assert (accuracy.compare("y", a, broken).finite, accuracy.compare("y", a, broken).nan) == (False, 1)


def test_indices_are_judged_by_how_many_are_the_same() -> None:
    found = accuracy.compare("i", torch.arange(1, 41), torch.cat([torch.arange(1, 38), torch.tensor([39, 38, 40])]))
    assert (found.cosine, found.column, found.equal) == (None, None, 38 / 40)
    flags = accuracy.compare("b", torch.tensor([True, False]), torch.tensor([True, True]))
    assert (flags.cosine, flags.equal) == (None, 0.5)
    assert accuracy.compare("n", torch.tensor([2**60 + 1]), torch.tensor([2**60])).equal == 0.0


def test_indices_count_where_they_are_asked_for() -> None:
    indices = accuracy.compare("0.i", torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 900]))
    numbers = accuracy.compare("0.y", STEPS, STEPS)
    result = judged(indices, numbers, texts=("max_abs<=1", "sqnr>=10"))
    assert result.passed
    assert "75 % of the values of 0.i equal FP32's" in result.remarks[0]
    assert result.to_json()["max_abs"] == 0.0
    for text in ("equal>=0.8", "equal[0.i]>=0.8", "max_abs[0.i]<=1"):
        assert not judged(indices, numbers, texts=(text,)).passed
    with pytest.raises(InputError, match="No output holds integers or booleans"):
        judged(numbers, texts=("equal>=1",))


def test_where_nothing_is_a_number_that_is_said() -> None:
    result = judged(accuracy.compare("i", torch.tensor([1, 2]), torch.tensor([1, 3])))
    (verdict,) = result.verdicts
    assert verdict.passed
    assert verdict.to_json()["value"] is None
    assert verdict.where == "no output of floating point numbers"
    assert result.to_json()["cosine"] == 0.5
    assert result.remarks


def test_a_common_value_hides_no_error() -> None:
    """Boxes near 1000, off by up to 0.88."""
    boxes = 1000 + STEPS
    wrong = boxes.clone()
    wrong[:, 2] += torch.tensor([0.88, -0.88]).repeat(8)
    found = accuracy.compare("boxes", boxes, wrong)
    assert found.cosine == pytest.approx(1.0, abs=1e-6)
    assert found.column is not None
    assert found.column < 0.5
    assert found.column_at == "[..., 2]"
    result = judged(found)
    assert result.passed
    assert "less its mean, the cosine in boxes[..., 2] is 0." in result.remarks[0]
    assert not judged(found, texts=("column>=0.99",)).passed
    assert judged(accuracy.compare("boxes", boxes, boxes + 1e-4)).remarks == ()


def test_a_shift_of_a_column_is_an_error_too() -> None:
    found = accuracy.compare("y", 1000 + STEPS, 1000 + STEPS + torch.tensor([0.0, 0.0, 3.0, 0.0]))
    assert found.column is not None
    assert found.column < 0.2
    assert found.column_at == "[..., 2]"


@pytest.mark.parametrize(
    ("shape", "place", "where"),
    [
        ((2, 3, 8, 8), (slice(None), 1), "[:, 1]"),
        ((4, 6, 10), (..., 7), "[..., 7]"),
        ((1, 1000), (..., slice(0, 300)), ""),  # one value for each column: the whole
        ((3, 20), (..., 5), ""),  # too few values to judge a column by itself
        ((50,), (slice(0, 20),), ""),
    ],
)
def test_columns_of_every_shape(shape: tuple[int, ...], place: tuple[object, ...], where: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(shape, generator=generator, dtype=torch.float64)
    b = a.clone()
    b[place] = 3 - b[place]  # type: ignore[index]
    found = columns.worst(a + 1e4, b + 1e4)
    assert found is not None
    assert found.place == where
    assert found.cosine < 0.95
    same = columns.worst(a + 1e4, a + 1e4)
    assert same is not None
    assert same.cosine == pytest.approx(1.0)


@pytest.mark.parametrize("value", [torch.ones(20, 4), torch.zeros(3), torch.tensor(2.0), torch.empty(0, 4)])
def test_what_does_not_vary_has_no_columns(value: Tensor) -> None:
    assert columns.worst(value.double(), value.double() * 1.5) is None
    assert accuracy.compare("y", value, value).column is None


def test_masked_values_are_in_no_column() -> None:
    masked = torch.where(STEPS > 0.9, -math.inf, 100 + STEPS)
    found = accuracy.compare("y", masked, masked.clone())
    assert found.column == pytest.approx(1.0)
    assert found.finite


@pytest.mark.parametrize(("a", "b", "passed"), [(3.0, 3.01, True), (3.0, 30.0, False), (3.0, -3.0, False)])
def test_one_number_has_to_be_the_number(a: float, b: float, passed: bool) -> None:
    assert judged(accuracy.compare("y", torch.tensor([[a]]), torch.tensor([[b]]))).passed is passed


def test_noise_where_fp32_is_zero_is_noise() -> None:
    found = accuracy.compare("y", torch.zeros(4), torch.full((4,), 1e-3))
    assert (found.cosine, found.value("sqnr"), found.value("max_rel")) == (0.0, -math.inf, math.inf)
    assert not judged(found, texts=("max_rel<=0.1",)).passed
    clean = accuracy.compare("y", torch.zeros(4), torch.zeros(4))
    assert (clean.cosine, clean.value("sqnr"), clean.value("max_rel")) == (1.0, math.inf, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats(dtype: torch.dtype) -> None:
    found = accuracy.compare("y", STEPS.to(dtype), STEPS.to(dtype))
    assert (found.cosine, found.equal) == (pytest.approx(1.0), None)


class _Top(nn.Module):
    """Scores whose order BF16 changes, beside numbers that it does no harm to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 200)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.fc(x)
        return y, y.topk(20).indices, torch.complex(y, -y)


def test_indices_drive_repair_where_they_are_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _Top().eval(), torch.randn(32, 32)
    plain = armopt.optimize(model, (x,), policy="threshold=1", output=tmp_path / "plain")
    entry = next(each for each in plain.verdict.entries if each.output == "1")
    assert plain.passed
    assert plain.manifest.accuracy.repair is None
    assert entry.equal is not None
    assert 0.5 < entry.equal < 1
    assert "of the values of 1 equal FP32's" in plain.manifest.accuracy.remarks[0]
    asked = armopt.optimize(
        model, (x,), policy="threshold=1", output=tmp_path / "asked", checks=armopt.Checks(gates=("equal[1]>=1",))
    )
    assert asked.passed
    assert asked.manifest.accuracy.repair is not None
    assert asked.manifest.accuracy.remarks == ()


def test_sizes_of_one_sample_that_differ_are_said() -> None:
    wanted = iter([torch.ones(3), torch.ones(3)])
    found = iter([torch.ones(3), torch.ones(2)])
    checker = accuracy.Checker(lambda _: {"y": next(wanted)}, None, (), "none")
    (entry,) = checker.figures("static", [{}, {}], lambda _: {"y": next(found)}).outputs
    assert (entry.cosine, entry.sizes) == (0.0, "y has the sizes [2], in FP32 [3]")
