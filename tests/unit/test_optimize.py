"""The accuracy check compares runs that start from the same state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import armopt
from armopt.errors import AccuracyError, ArmoptWarning


class Counter(torch.nn.Module):
    """Writes to its buffer on every call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)
        self.register_buffer("calls", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(torch.tensor([1.0, -3.0, 5.0, 0.0]))
        return self.fc(x) * self.calls


def test_a_model_that_counts_its_calls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Counter().eval()
    x = torch.randn(2, 4)
    written = armopt.optimize(model, (x,), output=tmp_path / "bundle", target="graviton3", batch=(2,)).manifest
    assert torch.equal(model.calls, torch.ones(4))
    # weights are rounded to 8 bits, nothing else; a run with another count would give about 0.9
    assert written.accuracy.cosine >= 0.9999
    loaded = armopt.load(tmp_path / "bundle")
    with torch.no_grad():
        for _ in range(3):  # state goes on from call to call
            torch.testing.assert_close(loaded(x), model(x), rtol=2**-7, atol=2**-7)


def test_samples_are_compared_from_the_same_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Counter().eval()
    armopt.optimize(model, (torch.randn(2, 4),), output=armopt.Output(tmp_path / "bundle", keep_reference=True))
    samples = [{"x": torch.randn(2, 4)} for _ in range(3)]
    for against in (None, model):
        found = armopt.validate(tmp_path / "bundle", against=against, inputs=samples)
        assert found["cosine"] >= 0.9999
        assert found["samples"] == 3


def test_a_bundle_that_failed_its_gate_says_so_when_loaded(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with pytest.raises(AccuracyError, match="not deployable"):
        armopt.optimize(
            torch.nn.Linear(4, 4), (torch.ones(2, 4),), output=path, checks=armopt.Checks(min_cosine=1.1)
        ).require()
    with pytest.warns(ArmoptWarning, match="not deployable"):
        armopt.load(path)
