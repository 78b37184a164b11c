"""Models in half precision that aren't modules to be exported: programs, TorchScript, and models that are compiled."""

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
from armopt.dynamo import graphs
from armopt.errors import InputError

SAID = "widened to float32, which changes no value"


class Logits(nn.Module):
    """Casts as language models do, and gives FP32 and half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(32, 64), nn.Linear(64, 64), nn.Linear(64, 32)
        self.register_buffer("shift", torch.full((64,), 0.25))

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.relu(self.inner(self.embed(ids)) + self.shift)
        hidden = (hidden.float() * 0.5).to(scale.dtype) * scale + torch.ones(64, dtype=scale.dtype)
        return self.head(hidden).float(), hidden


def example(dtype: torch.dtype) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return Logits().eval().to(dtype), (torch.arange(8)[None], torch.full((1, 8, 1), 0.5, dtype=dtype))


def check(model: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor], found: Any, dtype: torch.dtype) -> None:
    """Against the model in FP32; what half precision makes of it is further off."""
    wide = copy.deepcopy(model).float()(inputs[0], inputs[1].float())
    assert [each.dtype for each in found] == [torch.float32, dtype]
    for value, expected in zip(found, wide, strict=True):
        torch.testing.assert_close(value.float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("program", torch.float16), ("program", torch.bfloat16), ("pt2", torch.bfloat16), ("trace", torch.float16)),
        *(("script", torch.bfloat16), ("script-file", torch.bfloat16)),
    ],
)
def test_programs_are_widened(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = example(dtype)
    given: Any
    if kind in ("program", "pt2"):
        given = torch.export.export(model, inputs)
    else:
        given = torch.jit.trace(model, inputs) if kind == "trace" else torch.jit.script(model)
    if kind == "pt2":
        torch.export.save(given, tmp_path / "model.pt2")
        given = tmp_path / "model.pt2"
    elif kind == "script-file":
        given.save(tmp_path / "model.pt")
        given = tmp_path / "model.pt"
    with pytest.warns(armopt.ArmoptWarning, match=f"bfloat16|float16: {SAID}"):
        result = armopt.optimize(given, inputs, output=tmp_path / "b", target="graviton3")
    result.require()
    assert result.manifest.model.inputs[1].dtype == str(dtype).removeprefix("torch.")
    with pytest.warns(armopt.ArmoptWarning, match="portable twins"):
        bundle = armopt.load(tmp_path / "b")
    check(model, inputs, bundle(*inputs), dtype)
    assert {each.dtype for each in model.parameters()} == {dtype}
    if dtype == torch.bfloat16:  # the very bits
        stored = [each for each in load_file(tmp_path / "b" / "weights.safetensors").values() if each.dtype == dtype]
        assert any(torch.equal(each, model.get_parameter("inner.weight")) for each in stored)
    if kind in ("program", "pt2"):  # against the model in FP32 as well
        armopt.validate(tmp_path / "b", against=tmp_path / "model.pt2" if kind == "pt2" else model)


@pytest.mark.parametrize(("dtype", "release"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)])
def test_compiled_models_are_widened(dtype: torch.dtype, release: bool) -> None:
    model, inputs = example(dtype)
    before = copy.deepcopy(model)
    with pytest.warns(armopt.ArmoptWarning, match=SAID):
        compiled = armopt.compile(model, inputs, target="graviton3", release_original=release)
    check(before, inputs, compiled(*inputs), dtype)
    explained = compiled.forward.explain()  # type: ignore[operator]
    assert [each.precision for each in explained.layers] == ["bf16-weights"] * 2
    assert {each.dtype for each in compiled.parameters()} == {dtype}  # the model's own, not copies
    freed = {n for n, each in model.named_parameters() if graphs.is_released(each)}
    assert bool(freed) == (release and dtype == torch.bfloat16)


def test_the_first_call_checks_against_fp32() -> None:
    model, inputs = example(torch.bfloat16)
    with pytest.warns(armopt.ArmoptWarning, match=SAID):
        compiled = armopt.compile(model, target="graviton3", checks=armopt.Checks(first_call=True))
    check(model, inputs, compiled(*inputs), torch.bfloat16)
    outcome = compiled.forward.outcome  # type: ignore[union-attr]
    assert outcome is not None
    assert outcome.validation.passed


def test_the_backend_widens() -> None:
    model, inputs = example(torch.bfloat16)
    compiled = torch.compile(model, backend="armopt", options={"target": "graviton3"})
    with torch.no_grad(), pytest.warns(armopt.ArmoptWarning, match="kernels take them as float32"):
        check(model, inputs, compiled(*inputs), torch.bfloat16)
    assert len(armopt.explain(model).layers) == 2


class Bits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).view(torch.int16)


def test_what_means_something_else_in_fp32_is_left_alone(tmp_path: Path) -> None:
    model, x = Bits().eval().bfloat16(), torch.randn(2, 64).bfloat16()
    with pytest.raises(armopt.CaptureError, match=r"aten.view.dtype is called in half precision.*model.float\(\)"):
        armopt.optimize(torch.export.export(model, (x,)), output=tmp_path / "b")
    with torch.no_grad(), pytest.warns(armopt.ArmoptWarning, match="view.dtype is called in half precision"):
        assert torch.equal(torch.compile(model, backend="armopt")(x), model(x))


class Counter(nn.Module):
    """Writes into a cache that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache[:, :2] = self.inner(x)
        return cache.sum(1)


def test_what_is_written_stays_in_half_precision() -> None:
    model, x = Counter().eval().bfloat16(), torch.randn(1, 2, 64).bfloat16()
    cache, other = torch.ones(1, 4, 64).bfloat16(), torch.ones(1, 4, 64).bfloat16()
    with pytest.warns(armopt.ArmoptWarning, match=SAID):
        compiled = armopt.compile(model, target="graviton3", checks=None)
    found, expected = compiled(x, cache), model(x, other)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(cache, other, atol=0.02, rtol=0.02)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)


class Branch(nn.Module):
    """Decides on a value, so that only its parts can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x) if x.sum() > 0 else x


def test_parts_are_widened_and_it_is_said_once(tmp_path: Path) -> None:
    model, x = Branch().eval().bfloat16(), torch.randn(2, 64).bfloat16()
    with pytest.warns(armopt.ArmoptWarning) as said:
        armopt.optimize(model, [(x,), (-x,)], output=tmp_path / "b", kind="module", target="host").require()
    assert len([each for each in said if SAID in str(each.message)]) == 1
    taken = copy.deepcopy(model)
    found = armopt.load(tmp_path / "b", model=taken)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, model(x), atol=0.02, rtol=0.02)
    assert armopt.validate(tmp_path / "b", against=model)["passed"]
    with pytest.raises(InputError, match="no original any more"):
        armopt.validate(tmp_path / "b", against=taken)


class Naming(nn.Module):
    """Names half precision in its forward, so that it can't run with weights in FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64).half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).half()).float()  # type: ignore[no-any-return]


def test_a_forward_that_names_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Naming().eval(), torch.randn(4, 64)
    with torch.no_grad():
        expected = model(x)
    with pytest.warns(armopt.ArmoptWarning, match="in float16: widened") as said:
        armopt.optimize(model, (x,), output=tmp_path / "bundle", target="graviton3").require()
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", armopt.ArmoptWarning)
        found = armopt.load(tmp_path / "bundle")(x)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)  # BF16
    with pytest.warns(armopt.ArmoptWarning, match="Naming was not compared with FP32: PyTorch can't run it in FP32"):
        made = armopt.compile(model, (x,), target="graviton3")
    torch.testing.assert_close(made(x), expected, atol=0.02, rtol=0)
