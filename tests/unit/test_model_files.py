from __future__ import annotations

import copy
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from armopt.capture import files, inputs
from armopt.errors import ArmoptWarning, InputError

MODEL = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
X = torch.randn(2, 4)


def factory() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())


def write(kind: str, path: Path) -> Path:
    if kind == "pt2":
        torch.export.save(torch.export.export(MODEL, (X,)), path)
    elif kind == "torchscript":
        torch.jit.trace(MODEL, (X,)).save(str(path))
    elif kind == "module":
        torch.save(MODEL, path)
    elif kind == "state":
        torch.save(MODEL.state_dict(), path)
    elif kind == "old state":
        torch.save(MODEL.state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        # the header's length decides the first byte: see test_any_length_of_a_safetensors_header
        save_file(MODEL.state_dict(), path, metadata={"format": "pt", "note": "x" * 24})
    return path


KINDS = {
    "pt2": "pt2",
    "torchscript": "torchscript",
    "module": "torch.save",
    "state": "torch.save",
    "old state": "torch.save",
    "safetensors": "safetensors",
}
INPUT = (inputs.parse("2x4"),)


def options(kind: str, **changes: Any) -> files.Options:
    reference = "" if kind in ("pt2", "torchscript", "module") else f"{__name__}:factory"
    given = () if kind == "pt2" else INPUT
    return files.Options(**{"model": reference, "inputs": given, "trust_pickle": kind == "module", **changes})


@pytest.fixture(scope="module", params=KINDS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, write(request.param, tmp_path_factory.mktemp("models") / "model.bin")


def test_the_kind_is_found_from_the_content(file: tuple[str, Path]) -> None:
    kind, path = file
    assert files.find_kind(path) == KINDS[kind]


def test_each_kind_gives_the_same_model(file: tuple[str, Path]) -> None:
    kind, path = file
    captured = files.open_model(path, options(kind))
    (found,) = captured.graph_module(X)
    # TorchScript keeps no more than FP32: the same operations on the same weights
    assert torch.allclose(found, MODEL(X), rtol=0, atol=1e-6)
    assert captured.source == str(path)


def test_any_length_of_a_safetensors_header(tmp_path: Path) -> None:
    for extra in range(0, 256, 8):
        save_file(MODEL.state_dict(), tmp_path / "a.safetensors", metadata={"note": "x" * extra})
        assert files.find_kind(tmp_path / "a.safetensors") == "safetensors"


def test_fixed_sizes_of_torchscript_are_numbers(tmp_path: Path) -> None:
    captured = files.open_model(write("torchscript", tmp_path / "m.pt"), options("torchscript"))
    assert [spec.shape[1] for spec in captured.input_specs] == [4]


@pytest.mark.parametrize("keep", [0, 1, 20, 0.5, -8])
def test_a_truncated_file_is_one_clear_error(file: tuple[str, Path], keep: float, tmp_path: Path) -> None:
    kind, path = file
    data = path.read_bytes()
    cut = tmp_path / "cut.bin"
    cut.write_bytes(data[: int(len(data) * keep) if 0 < keep < 1 else int(keep)])
    with pytest.raises(InputError) as found:
        files.open_model(cut, options(kind))
    assert found.value.where == str(cut)
    assert found.value.what
    assert "\n" not in str(found.value)


def _zip(**files: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "."), text)
    return held.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello world, this is text", "is no model file that armopt knows.*Known are"),
        (b"PK\x03\x04 and then nothing", "is truncated or damaged"),
        (_zip(readme__txt="x"), "is a zip file without a model in it"),
        (_zip(manifest__json="{}", graph__json="{}"), "is a bundle already.*armopt inspect"),
        (b"\x80\x02 no pickle", "damaged|pickled"),
        (b"\xff" * 64, "is no model file"),
    ],
)
def test_what_is_no_model_says_what_it_is(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        files.open_model(path, files.Options())


def test_missing_files_and_folders(tmp_path: Path, mlp_bundle: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        files.find_kind(tmp_path / "missing.pt")
    with pytest.raises(InputError, match="is a folder"):
        files.find_kind(tmp_path)
    with pytest.raises(InputError, match=r"is a folder.*a bundle already"):
        files.find_kind(mlp_bundle)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("module", {"trust_pickle": False}, "unpickling runs code.*--trust-pickle"),
        ("module", {"inputs": ()}, "needs example inputs .*--input"),
        ("torchscript", {"inputs": ()}, "keeps no example inputs .*--input"),
        ("torchscript", {"batch": (1, 8)}, "fixed shapes.*one size with --batch"),
        ("state", {"model": ""}, "doesn't say what model it is.*--model"),
        ("safetensors", {"model": ""}, "doesn't say what model it is.*--model"),
        ("state", {"model": "torchvision:resnet18"}, "shape|fit"),
        ("pt2", {"batch": (8,)}, "shapes are fixed"),
        ("pt2", {"inputs": (inputs.parse("y=2x4"),)}, "takes no input 'y'"),
        ("pt2", {"inputs": (inputs.parse("2x5"),)}, "the model takes"),
        ("pt2", {"inputs": (inputs.parse("2x4:int64"),)}, "the model takes"),
    ],
)
def test_what_is_missing_is_named(kind: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path / "model.pt")
    with pytest.raises(InputError, match=message) as found:
        files.open_model(path, options(kind, **changes))
    assert found.value.hint


def test_a_pickle_runs_no_code_unless_trusted(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "was-here"), "w"))

    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="--trust-pickle"):
        files.open_model(tmp_path / "evil.pt", options("state"))
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_state_dict_of_another_dtype_is_refused(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in MODEL.state_dict().items()}
    path = tmp_path / f"model.{kind}"
    if kind == "pt":
        torch.save(state, path)
    elif dtype.is_complex:
        pytest.skip("safetensors of this version may not hold complex tensors")
    else:
        save_file(state, path)
    with pytest.raises(InputError, match=str(dtype).removeprefix("torch.") + ", not float32"):
        files.open_model(path, options("state"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_state_dict_in_half_precision_is_widened(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in MODEL.state_dict().items()}
    path = tmp_path / f"model.{kind}"
    torch.save(state, path) if kind == "pt" else save_file(state, path)
    with pytest.warns(ArmoptWarning, match="widened to float32, which changes no value"):
        captured = files.open_model(path, options("state"))
    wide = copy.deepcopy(MODEL).to(dtype).float()
    assert torch.equal(captured.graph_module(X)[0], wide(X))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.module."])
def test_a_prefix_of_all_names_is_left_out(prefix: str, tmp_path: Path) -> None:
    torch.save({"ema": {f"{prefix}{name}": tensor for name, tensor in MODEL.state_dict().items()}}, tmp_path / "m.pt")
    with pytest.warns(ArmoptWarning, match=f"has the prefix '{prefix}' in all names"):
        captured = files.open_model(tmp_path / "m.pt", options("state"))
    assert torch.equal(captured.graph_module(X)[0], MODEL(X))


def test_what_a_wrapper_has_beside_the_model_is_left_out(tmp_path: Path) -> None:
    """Lightning keeps the weights of losses, torch's AveragedModel a count."""
    wrapped = {f"module.{name}": tensor for name, tensor in MODEL.state_dict().items()}
    torch.save({"n_averaged": torch.tensor(5), **wrapped, "loss.weight": torch.ones(3)}, tmp_path / "m.pt")
    with pytest.warns(ArmoptWarning, match=r"prefix 'module.' .* so is what has none: n_averaged, loss.weight"):
        captured = files.open_model(tmp_path / "m.pt", options("state"))
    assert torch.equal(captured.graph_module(X)[0], MODEL(X))


def test_a_prefix_of_some_names_is_not(tmp_path: Path) -> None:
    first, *others = MODEL.state_dict().items()
    torch.save(dict([(f"module.{first[0]}", first[1]), *others]), tmp_path / "m.pt")
    with pytest.raises(InputError, match="doesn't fit"):
        files.open_model(tmp_path / "m.pt", options("state"))


def test_training_checkpoints_hold_their_state_one_level_down(tmp_path: Path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}
    for key in ("state_dict", "params", "generator"):  # the likeliest one, and any where it is the only one
        torch.save({"epoch": 3, key: MODEL.state_dict(), "optimizer": optimizer}, tmp_path / "checkpoint.pt")
        with pytest.warns(ArmoptWarning, match=f"those under '{key}' are taken"):
            captured = files.open_model(tmp_path / "checkpoint.pt", options("state"))
        assert torch.equal(captured.graph_module(X)[0], MODEL(X))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "config": {}}, "holds a dict of epoch, config, not a state dict"),
        ({}, "holds an empty dict"),
        ([MODEL.state_dict()], "holds a list"),
        ({**MODEL.state_dict(), "scale": None}, "a dict in which 'scale' is no tensor but a NoneType"),
        ({**MODEL.state_dict(), 7: torch.ones(1)}, "a dict in which 7 is no name but a int"),
        ({"student": MODEL.state_dict(), "teacher": MODEL.state_dict()}, "several state dicts: student, teacher"),
    ],
)
def test_what_is_no_state_dict_says_what_it_is(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=message):
        files.open_model(tmp_path / "checkpoint.pt", options("state"))


def test_a_whole_model_is_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m\.pt2: is of format pt2, no state dict\. Save model\.state_dict\(\)"):
        files.open_divided(write("pt2", tmp_path / "m.pt2"), options("state"))


def test_a_state_of_another_variant_names_the_parameter(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(5, 3)).state_dict(), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"0\.weight has shape \(3, 5\).*another variant"):
        files.open_model(tmp_path / "a.pt", options("state"))
    torch.save(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).state_dict(), tmp_path / "b.pt")
    with pytest.raises(InputError, match=r"doesn't fit .*: it has also 1\.weight, 1\.bias\."):
        files.open_model(tmp_path / "b.pt", options("state"))
