"""TorchScript from Python: example inputs by position, an object, the sizes and the names that it has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import armopt
from armopt.cli.app import app
from armopt.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::armopt.ArmoptWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(torch.relu(self.fc(x)))
        return result


X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def made(how: str) -> torch.jit.ScriptModule:
    torch.manual_seed(0)
    model = Net().eval()
    script: torch.jit.ScriptModule = torch.jit.trace(model, (X,)) if how == "trace" else torch.jit.script(model)  # type: ignore[no-untyped-call]
    return script


@pytest.mark.parametrize("how", ["trace", "script"])
@pytest.mark.parametrize("given", ["sequence", "tensor", "mapping"])
def test_a_file_and_an_object_with_inputs_given_in_any_way(tmp_path: Path, how: str, given: str) -> None:
    script = made(how)
    torch.jit.save(script, tmp_path / "m.pt")  # type: ignore[no-untyped-call]
    inputs = {"sequence": (X,), "tensor": X, "mapping": {"x": X}}[given]
    for number, model in enumerate((script, tmp_path / "m.pt")):
        armopt.optimize(model, inputs, output=tmp_path / f"b{number}").require()  # type: ignore[arg-type]
        loaded = armopt.load(tmp_path / f"b{number}")
        assert [(spec.name, spec.shape) for spec in loaded.manifest.model.inputs] == [("x", (2, 8))]
        torch.testing.assert_close(loaded(x=X), script(X), atol=2e-2, rtol=0)
        with pytest.raises(InputError, match="input x: expected shape 2x8, found 5x8"):
            loaded(torch.randn(5, 8))


def test_names_and_sizes_in_what_is_shown_and_said(tmp_path: Path) -> None:
    torch.jit.save(made("script"), tmp_path / "m.pt")  # type: ignore[no-untyped-call]
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "m.pt"), "--input", "x=2x8", "--text"]).output
    assert "x: f32[2,8] = input" in shown
    error = str(CliRunner().invoke(app, ["plan", str(tmp_path / "m.pt"), "--input", "x=2x9"]).exception)
    assert "the model fails on the example inputs: RuntimeError: " in error
    assert "mat1 and mat2 shapes" in error
    fixed = ["plan", str(tmp_path / "m.pt"), "--input", "x=rowsx8", "--at", "rows=2"]
    assert "TorchScript converts with fixed shapes" in str(CliRunner().invoke(app, fixed).exception)
    with pytest.raises(InputError, match="TorchScript converts with fixed shapes"):
        armopt.optimize(made("trace"), (X,), batch=(1, 8), output=tmp_path / "b")
    with pytest.raises(InputError, match="needs example inputs"):
        armopt.optimize(made("trace"), output=tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_modules_keep_their_weights_as_constants(dtype: torch.dtype, tmp_path: Path) -> None:
    """torch.jit.freeze leaves no parameters and no mode, as models that were made for serving come."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval().to(dtype),
        torch.randn(2, 8).to(dtype),
    )
    frozen = torch.jit.freeze(torch.jit.trace(model, x))
    armopt.optimize(frozen, (x,), output=tmp_path / "b").require()
    found = armopt.load(tmp_path / "b")(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, model(x), atol=2e-2, rtol=0)
