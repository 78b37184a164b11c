from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from armopt.capture import inputs, sample_files
from armopt.errors import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=1x3x224x224:float32", inputs.InputOption("x", (1, 3, 224, 224), torch.float32)),
        ("1x3", inputs.InputOption("", (1, 3), torch.float32)),
        ("ids=1x128:int64:30522", inputs.InputOption("ids", (1, 128), torch.int64, 30522)),
        ("context.gate=8", inputs.InputOption("context.gate", (8,), torch.float32)),
        ("mask=2x1:bool", inputs.InputOption("mask", (2, 1), torch.bool)),
        ("s=scalar:int32", inputs.InputOption("s", (), torch.int32)),
    ],
)
def test_parse(text: str, expected: inputs.InputOption) -> None:
    assert inputs.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "x=", "x=1,3", "x=1x", "x=1x3:float32:a", "=1x3", "x=1x-1", "1x3:float32:5:6", "x=1xmax"]
)
def test_another_form_says_how_to_write_it(text: str) -> None:
    with pytest.raises(InputError, match=r"--input: can't read .*Write NAME="):
        inputs.parse(text)


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(InputError, match=r"unknown dtype 'float31' .*Known are float32"):
        inputs.parse("x=1:float31")
    with pytest.raises(InputError, match="a size is 0 in 'x=0x8'"):
        inputs.parse("x=0x8")


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        option = inputs.parse(text)
    except InputError:
        return
    assert all(isinstance(size, str) or size >= 0 for size in option.shape)


def test_generated_tensors_are_seeded_and_within_their_bound() -> None:
    options = [inputs.parse(t) for t in ("2x3", "ids=50:int64:7", "m=50:bool", "h=2:float16")]
    generated = inputs.generate(options)
    named = generated.named
    assert torch.equal(generated.positional[0], inputs.generate(options).positional[0])
    assert [t.dtype for t in named.values()] == [torch.int64, torch.bool, torch.float16]
    assert (int(named["ids"].min()), int(named["ids"].max())) == (0, 6)
    assert set(named["m"].tolist()) == {True, False}


def test_files(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(2, 3), "ids": torch.arange(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **{name: t.numpy() for name, t in tensors.items()})
    torch.save(tensors, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.npz", "a.pt"):
        found = sample_files.read(tmp_path / name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    torch.save(tensors["x"], tmp_path / "one.pt")
    assert list(sample_files.read(tmp_path / "one.pt")) == [""]


def test_bad_files_are_named(tmp_path: Path) -> None:
    save_file({"x": torch.randn(2, 3)}, tmp_path / "cut.safetensors")
    data = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-4])
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "x.csv").write_text("1")
    torch.save({"x": [1]}, tmp_path / "list.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "pickle.pt")
    for name in ("cut.safetensors", "text.npz", "text.pt", "x.csv", "list.pt", "pickle.pt", "missing.pt"):
        with pytest.raises(InputError) as found:
            sample_files.read(tmp_path / name)
        assert found.value.where == str(tmp_path / name)


def test_bind_follows_the_signature() -> None:
    a, b, c = (torch.zeros(i) for i in range(3))
    assert inputs.bind(["x", "y", "z"], [a], {"y": b, "z": c}, "m") == ((a, b, c), {})
    args, kwargs = inputs.bind(["x", "y", "z"], [a], {"z": c}, "m")
    assert (args, kwargs) == ((a,), {"z": c})
    assert inputs.bind(["x"], [], {"": a}, "m") == ((a,), {})
    with pytest.raises(InputError, match=r"takes no input 'w'.*Its inputs are: x, y"):
        inputs.bind(["x", "y"], [], {"w": a}, "m")
    with pytest.raises(InputError, match="too many inputs: 2"):
        inputs.bind(["x"], [a, b], {}, "m")
    assert inputs.bind(["x"], [a], {"more": b}, "m", open_ended=True) == ((a,), {"more": b})
