"""The accuracy check compares runs that start from the same state."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import armopt
from armopt.errors import AccuracyError, ArmoptWarning, InputError


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


# --- models in half precision, and arguments as people give them ---


class Logits(nn.Module):
    """Takes ids and a half, gives logits in FP32 as language models do, and its hidden state as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(32, 64), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.inner(self.embed(ids))) * scale
        return {"logits": self.head(hidden).float(), "hidden": hidden}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_and_its_dtypes_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Logits().eval().to(dtype)
    inputs = {"ids": torch.arange(8)[None], "scale": torch.full((1, 8, 1), 0.5, dtype=dtype)}
    with pytest.warns(armopt.ArmoptWarning, match="widened to float32, which changes no value"):
        result = armopt.optimize(model, inputs, output=tmp_path / "b", target="graviton3")
    assert result.passed
    assert {each.dtype for each in model.parameters()} == {dtype}  # it is the caller's
    with pytest.warns(armopt.ArmoptWarning, match="portable twins"):
        found = armopt.load(tmp_path / "b")(**inputs)
    assert {name: value.dtype for name, value in found.items()} == {"logits": torch.float32, "hidden": dtype}
    wide = copy.deepcopy(model).float()(inputs["ids"], inputs["scale"].float())
    for name, value in found.items():
        torch.testing.assert_close(value.float(), wide[name], atol=0.02, rtol=0.02)
    if dtype == torch.bfloat16:  # the very bits, wherever a kernel multiplies in BF16
        stored = [each for each in load_file(tmp_path / "b" / "weights.safetensors").values() if each.dtype == dtype]
        held = (model.inner.weight, model.head.weight)
        assert all(any(torch.equal(each, weight) for each in stored) for weight in held)


def test_half_precision_with_weights_that_a_hook_computes(tmp_path: Path) -> None:
    """The older weight_norm keeps a tensor with a history on the module, which refuses to be copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(64, 64)), nn.ReLU()).eval().bfloat16()
        x = torch.randn(4, 64).bfloat16()
        result = armopt.optimize(model, (x,), output=tmp_path / "b", target="host")
    assert result.passed
    assert armopt.load(tmp_path / "b")(x).dtype == torch.bfloat16


def test_inputs_in_fp32_are_taken_for_half(tmp_path: Path) -> None:
    """As the command line makes them."""
    model = nn.Sequential(nn.Linear(8, 8)).eval().bfloat16()
    with pytest.warns(armopt.ArmoptWarning, match="widened"):
        result = armopt.optimize(model, (torch.randn(2, 8),), output=tmp_path / "b")
    assert [(each.shape, each.dtype) for each in result.manifest.model.inputs] == [((2, 8), "float32")]


def test_a_tensor_is_one_input(tmp_path: Path) -> None:
    result = armopt.optimize(nn.Linear(8, 8).eval(), torch.randn(2, 8), output=tmp_path / "b")
    assert [each.shape for each in result.manifest.model.inputs] == [(2, 8)]


@pytest.mark.parametrize(
    ("batch", "said"),
    [(8, "batch is 8"), ("1,8", "batch is '1,8'"), ((0,), "0 is no size"), ((2.0,), "2.0 is no size")],
)
def test_a_batch_is_a_sequence_of_sizes(batch: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{said}.*batch=\\(8,\\)"):
        armopt.optimize(nn.Linear(8, 8).eval(), (torch.randn(2, 8),), output=tmp_path / "b", batch=batch)
    assert list(tmp_path.iterdir()) == []


def test_arrays_and_unknown_kinds_are_refused(tmp_path: Path) -> None:
    model, x = nn.Linear(8, 8).eval(), torch.randn(2, 8)
    given: Any
    for given in (x.numpy(), (x.numpy(),), {"input": x.numpy()}):
        with pytest.raises(InputError, match=r"input is a numpy.ndarray, no tensor.*torch.from_numpy\(\)"):
            armopt.optimize(model, given, output=tmp_path / "b")
    with pytest.raises(InputError, match=r"unknown kind 'modules'\. Did you mean module\?"):
        armopt.optimize(model, x, output=tmp_path / "b", kind="modules")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="checks is a dict"):
        armopt.optimize(model, x, output=tmp_path / "b", checks={"min_cosine": 0.9})  # type: ignore[arg-type]


def test_a_model_without_layers_has_no_parts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="LSTM: has no Linear and no convolution"):
        armopt.optimize(nn.LSTM(4, 4), [(torch.randn(2, 3, 4),)], output=tmp_path / "b", kind="module")


def test_a_function_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a model, found a function.*wrap a function in a module"):
        armopt.optimize(lambda x: x, (torch.randn(2, 8),), output=tmp_path / "b")  # type: ignore[arg-type]


def test_a_compiled_model_is_refused_by_name(tmp_path: Path) -> None:
    compiled = armopt.compile(nn.Linear(16, 16).eval(), target="graviton3")
    with pytest.raises(InputError, match=r"^Linear: the model comes from armopt\.compile\. Give the one"):
        armopt.optimize(compiled, (torch.ones(2, 16),), output=tmp_path / "b")
