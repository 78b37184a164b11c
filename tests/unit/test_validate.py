"""armopt.accuracy: the metrics, and `validate` on a bundle."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import armopt
from armopt import accuracy
from armopt.accuracy import Validation, gates, runs
from armopt.accuracy.gates import Figures
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
    assert (found.nan, found.inf) == ((1, 0) if math.isnan(bad) else (0, 1))
    assert found.cosine == pytest.approx(1.0)
    figures = {"static": Figures((found,), {})}
    outcome = Validation("r", "i", True, 1, "ran", figures, gates.judge(gates.standard(), figures, ""))
    assert outcome.verdicts[0].passed
    assert not outcome.passed
    assert "finite in one of FP32 and BF16 alone" in outcome.failures()


@pytest.mark.parametrize("special", [-math.inf, math.nan])
def test_infinities_and_nan_at_the_same_places_are_no_error(special: float) -> None:
    masked = torch.tensor([1.0, special, 2.0])
    found = accuracy.compare("y", masked, masked.clone())
    assert found.finite
    assert found.cosine == pytest.approx(1.0)
    assert (found.nan, found.inf, found.max_abs) == (0, 0, 0.0)


@pytest.mark.parametrize("special", [-math.inf, math.nan])
def test_a_value_that_is_finite_in_bf16_alone_is_an_error(special: float) -> None:
    """What swallows a NaN gives a number."""
    assert not accuracy.compare("y", torch.tensor([1.0, special]), torch.tensor([1.0, 0.0])).finite


@pytest.mark.parametrize("found", [-math.inf, math.nan])
def test_another_infinity_is_an_error(found: float) -> None:
    assert not accuracy.compare("y", torch.tensor([1.0, math.inf]), torch.tensor([1.0, found])).finite


def test_integers_and_halves_are_compared_in_fp64() -> None:
    assert accuracy.compare("y", torch.tensor([2**24 + 1]), torch.tensor([2**24])).max_abs == 1.0
    assert accuracy.compare("y", torch.tensor([True, False]), torch.tensor([True, True])).max_abs == 1.0


def test_another_shape_is_an_error() -> None:
    with pytest.raises(InputError, match=r"output y: shape \(1,\), the original gives \(2,\)"):
        accuracy.compare("y", A, A[:1])


@pytest.mark.parametrize(
    ("reference", "found", "exact", "ratio"),
    [
        ([1.0, 2.0], [1.0, 2.5], [1.0, 2.1], 4.0),  # off by 0.4, FP32 by 0.1
        ([1.0, 2.0], [1.0, 2.0], [1.0, 2.1], 1.0),
        ([1.0, 2.0], [1.0, 2.5], [1.0, 2.0], None),  # FP32 is exact
    ],
)
def test_errors_against_fp64(reference: list[float], found: list[float], exact: list[float], ratio: float) -> None:
    entry = accuracy.compare("y", *(torch.tensor(side, dtype=torch.float64) for side in (reference, found, exact)))
    assert entry.rmse_ratio == (None if ratio is None else pytest.approx(ratio))


def test_relative_errors_by_hand() -> None:
    found = accuracy.compare("y", torch.tensor([2.0, -4.0]), torch.tensor([2.0, -3.0]))
    assert (found.max_rel, found.mean_rel) == (1 / 4, 0.5 / 3)


def test_what_is_no_tensor_is_left_out() -> None:
    assert [e.output for e in accuracy.compare_all(["n", "t"], [3, A], [3, A])] == ["t"]


def test_validate_against_the_original(mlp_bundle: Path, mlp: nn.Module) -> None:
    report = accuracy.validate(mlp_bundle, against=mlp)
    assert report["passed"] is True
    # BF16 keeps 8 bits: the noise of a rounding is -59 dB of the signal; the operands of two layers and their results
    assert 0.999 < report["cosine"] < 1.0
    assert set(report["outputs"]) == {"batch=2", "batch=64"}
    assert [entry["output"] for entry in report["outputs"]["batch=2"]] == ["logits", "hidden"]
    assert "Mlp" in report["reference"]
    assert report["inputs"].startswith("generated: seeded random numbers, with the mean, spread and range")
    assert report["inputs_given"] is False
    assert (report["task"]["name"], report["task"]["metrics"]["batch=2"]["top1"]) == ("classification", 1.0)
    # BF16 keeps 8 bits of 24: its error is some 2^16 times FP32's
    assert all(1e3 < entry["rmse_ratio"] < 1e6 for entry in report["outputs"]["batch=64"])


def test_another_model_is_named(mlp: torch.nn.Module, mlp_bundle: Path) -> None:
    torch.manual_seed(1)
    another = type(mlp)().eval()
    with pytest.raises(
        InputError, match=r"Mlp: layer first has other weights than the bundle\. Is the bundle made from"
    ):
        accuracy.validate(mlp_bundle, against=another)
    assert accuracy.validate(mlp_bundle, against=_Renamed(mlp))["passed"] is True  # names are no matter


class _Renamed(nn.Module):
    """The same computation under another name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = self.inner(x, scale)
        return found


def test_a_reference_to_a_class_alone_is_an_error(mlp_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"--model torchvision:resnet50.*there is no --against"):
        accuracy.validate(mlp_bundle, model="torchvision:resnet50")


def test_the_bundle_is_read_once(mlp_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from armopt.bundle import files

    hashed: list[str] = []
    original = files.BundleFiles.hash

    def counting(self: files.BundleFiles, name: str) -> str:
        hashed.append(name)
        return original(self, name)

    monkeypatch.setattr(files.BundleFiles, "hash", counting)
    accuracy.validate(mlp_bundle)
    assert len(hashed) == len(set(hashed)) > 3


def test_the_reference_is_fp32_in_a_process_with_fast_math(monkeypatch: pytest.MonkeyPatch) -> None:
    """There oneDNN multiplies FP32 in BF16 (seen on the emulated core, tests/arm64/test_validation.py)."""

    def enabled() -> bool:
        return bool(torch._C._get_mkldnn_enabled())

    monkeypatch.delenv("ONEDNN_DEFAULT_FPMATH_MODE", raising=False)
    monkeypatch.delenv("DNNL_DEFAULT_FPMATH_MODE", raising=False)
    with runs.true_fp32():
        assert enabled()
    monkeypatch.setenv("DNNL_DEFAULT_FPMATH_MODE", "BF16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with runs.true_fp32():
            assert not enabled()
    assert enabled()


class _Nan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).sub(1000).sqrt()


class _SomeNan(nn.Module):
    """NaN where the input is below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + x[:, :1].sqrt()


class _NanByRounding(_SomeNan):
    """Next to nothing in FP32, of which a root can be drawn; BF16 makes some of it less than nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = (x.unsqueeze(1) * self.fc.weight).sum(2) + self.fc.bias
        return exact + (self.fc(x) - exact + 1e-4).sqrt()


@pytest.mark.parametrize("kept", [True, False])
def test_nan_in_the_same_places_is_agreement(tmp_path: Path, kept: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    x[:, 0] = torch.tensor([1.0, -1.0, 2.0, 3.0])
    output = armopt.Output(str(tmp_path / "bundle"), keep_reference=kept, report=str(tmp_path / "report.html"))
    result = armopt.optimize(_SomeNan().eval(), (x,), target="graviton3", output=output)
    assert result.passed
    assert result.manifest.accuracy.repair is None
    report = accuracy.validate(tmp_path / "bundle", inputs={"x": x}, report=tmp_path / "again.html")
    assert report["passed"]
    assert report["remarks"] == ["64 values of output are not finite, in FP32 as in BF16, and left out of the figures"]


def test_nan_on_one_side_alone_fails(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _NanByRounding().eval(), torch.randn(4, 64)
    output = armopt.Output(str(tmp_path / "bundle"))
    result = armopt.optimize(model, (x,), target="graviton3", output=output, checks=armopt.Checks(repair=False))
    assert not result.passed
    assert "values are finite in one of FP32 and BF16 alone" in result.verdict.failures()
    output = armopt.Output(str(tmp_path / "bundle"), force=True)
    assert armopt.optimize(model, (x,), target="graviton3", output=output).passed  # repaired


def test_a_model_that_gives_nan_is_an_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(InputError, match=r"_Nan: gives nothing but NaN in FP32.*: output.*--inputs"):
        armopt.optimize(_Nan().eval(), (torch.randn(4, 16),), output=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_validate_with_inputs(mlp_bundle: Path, mlp_inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, scale = mlp_inputs
    report = accuracy.validate(mlp_bundle, inputs={"x": x, "scale": scale})
    assert (report["inputs"], report["inputs_given"], report["passed"]) == ("given as tensors", True, True)
    assert list(report["outputs"]) == ["batch=2"]  # four rows are nearer to two than to 64
    many = accuracy.validate(mlp_bundle, inputs={"x": x.repeat(10, 1), "scale": scale})
    assert (list(many["outputs"]), many["node_bucket"]) == (["batch=64"], "batch=64")
    assert "the bundle's own graph" in report["reference"]
    with pytest.raises(InputError, match="lacks scale"):
        accuracy.validate(mlp_bundle, inputs={"x": x})


@pytest.mark.parametrize("shape", [(3, 15), (16,)])
def test_inputs_of_another_shape_are_named(mlp_bundle: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"input x is .* float32, the model takes batchx16 float32"):
        accuracy.validate(mlp_bundle, inputs={"x": torch.zeros(shape), "scale": torch.zeros(8)})
