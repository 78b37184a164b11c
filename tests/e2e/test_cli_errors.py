"""Bad input: one line that says what, where and the next step; the right exit code; nothing left behind."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from e2e_helpers import Cli, Models, armopt, listing

from tests.sampling import sampled

NET = ("--model", "mynets.nets:net")
X = ("--input", "x=1x3x16x16")

#: Arguments of `armopt optimize`, and words that its message must hold. {m}: folder of good models, {b}: of bad ones.
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # files
    "missing file": (("{m}/none.pt",), ("{m}/none.pt", "no such file")),
    "no model at all": ((), ("--model",)),
    "empty file": (("{b}/empty.pt",), ("{b}/empty.pt", "empty")),
    "folder": (("{b}",), ("{b}", "folder")),
    "text": (("{b}/text.pt",), ("text.pt", "no model file")),
    "ONNX": (("{b}/model.onnx",), ("model.onnx", ".pt2")),
    "zip without a model": (("{b}/other.zip",), ("other.zip", "without a model")),
    "bundle": (("{b}/net.armopt",), ("net.armopt", "armopt inspect")),
    "zipped bundle": (("{b}/net.zip",), ("net.zip", "armopt inspect")),
    "unreadable kind of link": (("{b}/loop.pt",), ("loop.pt",)),
    # trust
    "pickle without --trust-pickle": (("{m}/module.pt",), ("module.pt", "--trust-pickle")),
    "pickle of something else": (("{b}/object.pt", "--trust-pickle"), ("object.pt", "not an nn.Module")),
    "pickle whose class is gone": (("{b}/gone.pt", "--trust-pickle"), ("gone.pt", "imported", "gonepackage")),
    "pickle without inputs": (("{m}/module.pt", "--trust-pickle"), ("--input", "x")),
    # state dicts
    "state dict without --model": (("{m}/state.pt",), ("state.pt", "--model")),
    "safetensors without --model": (("{m}/state.safetensors",), ("state.safetensors", "--model")),
    "state dict of another model": (("{m}/two.pt", *NET, *X), ("two.pt", "mynets.nets:net")),
    "state dict of another variant": (("{b}/wide.pt", *NET, *X), ("wide.pt", "head.weight", "(7, 64)", "(10, 64)")),
    "list": (("{b}/list.pt", *NET, *X), ("list.pt", "state dict")),
    "unknown torchvision model": (("--model", "torchvision:resnet51"), ("resnet51", "Did you mean", "resnet50")),
    "unknown module": (("--model", "nonesuch.nets:net", *X), ("nonesuch", "folder")),
    "unknown factory": (("--model", "mynets.nets:nett", *X), ("nett", "net")),
    "factory that isn't one": (("--model", "mynets.nets:torch", *X), ("mynets.nets:torch", "factory")),
    "reference without a colon": (("--model", "resnet50"), ("resnet50", "torchvision:NAME")),
    # inputs
    "no inputs for a state dict": (("{m}/state.pt", *NET), ("--input", "x")),
    "no inputs for TorchScript": (("{m}/script.pt",), ("script.pt", "--input", "x")),
    "unknown name": (("{m}/state.pt", *NET, "--input", "y=1x3x16x16"), ("'y'", "x")),
    "unknown name for a pt2": (("{m}/static.pt2", "--input", "y=1x3x16x16"), ("'y'", "x")),
    "wrong shape": (("{m}/state.pt", *NET, "--input", "x=1x3x9x9"), ("state.pt", "4096", "--input")),
    "wrong shape for a pt2": (("{m}/static.pt2", "--input", "x=1x3x9x9"), ("[1, 3, 9, 9]", "[1, 3, 16, 16]")),
    "wrong rank for a pt2": (("{m}/static.pt2", "--input", "x=3x16x16"), ("[3, 16, 16]", "[1, 3, 16, 16]")),
    "wrong shape for TorchScript": (("{m}/script.pt", "--input", "x=1x3x9x9"), ("script.pt",)),
    "wrong dtype": (("{m}/state.pt", *NET, "--input", "x=1x3x16x16:int64"), ("--input",)),
    "wrong dtype for a pt2": (("{m}/static.pt2", "--input", "x=1x3x16x16:int64"), ("int64", "float32")),
    "unknown dtype": (("{m}/static.pt2", "--input", "x=1x3x16x16:float33"), ("float33", "float32")),
    "no shape": (("{m}/static.pt2", "--input", "x"), ("'x'", "NAME=1x3x224x224:float32")),
    "commas for a shape": (("{m}/static.pt2", "--input", "x=1,3,16,16"), ("1,3,16,16", "NAME=")),
    "too many inputs": (("{m}/state.pt", *NET, "--input", "1x3x16x16", "--input", "1x3"), ("too many inputs: 2", "x")),
    "an input given twice": (("{m}/state.pt", *NET, *X, "--input", "1x3"), ("state.pt", "multiple values", "'x'")),
    "missing samples": (("{m}/static.pt2", "--inputs", "{b}/none.npz"), ("none.npz", "no such file")),
    "truncated samples": (("{m}/static.pt2", "--inputs", "{b}/cut.safetensors"), ("cut.safetensors",)),
    "samples of unknown kind": (("{m}/static.pt2", "--inputs", "{b}/text.csv"), ("text.csv", ".safetensors")),
    "samples with code in them": (("{m}/static.pt2", "--inputs", "{m}/module.pt"), ("module.pt",)),
    "empty samples": (("{m}/static.pt2", "--inputs", "{b}/none.safetensors"), ("--input",)),
    # options
    "unknown target": (("{m}/static.pt2", "--target", "gravitom3"), ("gravitom3", "graviton3")),
    "unknown policy": (("{m}/static.pt2", "--policy", "fastest"), ("fastest", "threshold")),
    "--batch 0": (("{m}/dynamic.pt2", "--batch", "0"), ("--batch", "'0'", "1,8,32")),
    "--batch x": (("{m}/dynamic.pt2", "--batch", "1,x"), ("--batch", "'x'", "1,8,32")),
    "--batch for a static pt2": (("{m}/static.pt2", "--batch", "1,8"), ("static.pt2", "dynamic_shapes")),
    "--batch for TorchScript": (("{m}/script.pt", *X, "--batch", "1,8"), ("script.pt", "--batch")),
    # dtypes
    "fp64 pt2": (("{b}/float64.pt2",), ("float64.pt2", "weight", "float64", ".float()")),
    "fp64 state dict": (("{b}/float64.pt", *NET, *X), ("float64.pt", "float64", ".float()")),
    "fp64 pickle": (("{b}/float64-module.pt", "--trust-pickle", "--input", "x=8x8"), ("float64", ".float()")),
    "fp64 TorchScript": (("{b}/float64-script.pt", "--input", "x=8x8"), ("float64", ".float()")),
    "int8 pickle": (("{b}/int8.pt", "--trust-pickle", "--input", "x=1x8"), ("int8.pt", "quantized", "FP32")),
    "int8 TorchScript": (("{b}/int8-script.pt", "--input", "input=1x8"), ("int8-script.pt", "quantized", "FP32")),
    "int8 pt2": (("{b}/int8.pt2",), ("int8.pt2", "weight", "int8", "FP32")),
    # places
    "parent is missing": (("{m}/static.pt2", "-o", "none/b"), ("none", "mkdir -p")),
    "parent is a file": (("{m}/static.pt2", "-o", "{b}/text.pt/b"), ("text.pt", "-o")),
    "unwritable": (("{m}/static.pt2", "-o", "/proc/b"), ("/proc", "-o")),
    "unwritable zip": (("{m}/static.pt2", "-o", "/proc/b.zip"), ("/proc", "-o")),
    "is there already": (("{m}/static.pt2", "-o", "{b}/net.armopt"), ("net.armopt", "already", "--force")),
    "no bundle to replace": (("{m}/static.pt2", "-o", "{b}/kept", "--force"), ("kept", "not a bundle")),
    "no file to replace": (("{m}/static.pt2", "-o", "{b}/text.pt", "--force"), ("text.pt", "not a bundle")),
}
for _kind in ("static.pt2", "script.pt", "module.pt", "state.pt", "legacy.pt", "state.safetensors"):
    for _part in ("half", "first 4 bytes of", "all but the end of"):
        CASES[f"{_part} {_kind}"] = (
            (f"{{b}}/{_part.replace(' ', '-')}-{_kind}", "--trust-pickle", *NET, *X),
            (f"{{b}}/{_part.replace(' ', '-')}-{_kind}",),
        )


@pytest.fixture(scope="module")
def bad(models: Models, bundle: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that armopt must refuse."""
    import onnx
    from mynets import nets
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("bad")
    with (package / "mynets" / "nets.py").open("a") as file:
        file.write('\n\ndef half():\n    return of_dtype("float16")\n')
    for kind in ("static.pt2", "script.pt", "module.pt", "state.pt", "legacy.pt", "state.safetensors"):
        data = models[kind].read_bytes()
        (folder / f"half-{kind}").write_bytes(data[: len(data) // 2])
        (folder / f"first-4-bytes-of-{kind}").write_bytes(data[:4])
        (folder / f"all-but-the-end-of-{kind}").write_bytes(data[:-30])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("import torch\n" * 9)
    (folder / "text.csv").write_text("1,2\n")
    (folder / "loop.pt").symlink_to("loop.pt")
    (folder / "kept").mkdir()
    (folder / "kept" / "precious.txt").write_text("not armopt's")
    shutil.make_archive(str(folder / "other"), "zip", folder / "kept")
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])), folder / "model.onnx")
    shutil.copytree(bundle, folder / "net.armopt")
    shutil.make_archive(str(folder / "net"), "zip", bundle)

    torch.save(argparse.Namespace(model=1), folder / "object.pt")
    torch.save([torch.ones(2), torch.ones(2)], folder / "list.pt")
    (folder / "gone.pt").write_bytes(models["module.pt"].read_bytes())
    _rename_class_in_pickle(models["module.pt"], folder / "gone.pt")
    state = models.net.state_dict()
    torch.save(state | {"head.weight": torch.ones(7, 64)}, folder / "wide.pt")
    torch.save({name: tensor.double() for name, tensor in state.items()}, folder / "float64.pt")
    save_file({"x": torch.ones(64, 64)}, folder / "cut.safetensors")
    os.truncate(folder / "cut.safetensors", 1000)
    save_file({}, folder / "none.safetensors")

    for name in ("float64", "float16", "bfloat16", "complex64"):
        model = nets.of_dtype(name)
        torch.export.save(torch.export.export(model, (torch.ones(8, 8),)), folder / f"{name}.pt2")
    torch.save(nets.of_dtype("float64"), folder / "float64-module.pt")
    torch.jit.save(torch.jit.trace(nets.of_dtype("float64"), torch.ones(8, 8)), folder / "float64-script.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear = torch.nn.Sequential(torch.nn.Linear(8, 8))
        quantized = torch.ao.quantization.quantize_dynamic(linear, {torch.nn.Linear}, dtype=torch.qint8)
    torch.save(quantized, folder / "int8.pt")
    torch.jit.save(torch.jit.trace(quantized, torch.ones(1, 8)), folder / "int8-script.pt")
    integer = nets.of_dtype("float32")
    integer.weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    torch.export.save(torch.export.export(integer, (torch.ones(8, 8),)), folder / "int8.pt2")
    return folder


def _rename_class_in_pickle(source: Path, path: Path) -> None:
    """The same module, of a class in a package that is not installed."""
    import zipfile

    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):  # a pickle's global is a line with the module's name
                data = data.replace(b"cmynets.nets\n", b"cgonepackage.nets\n")
            new.writestr(entry.filename, data)


def check_message(err: str, *words: str) -> None:
    """One line from armopt, and nothing else on stderr, that holds these words and a next step."""
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("armopt: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("name", sampled(CASES, 3))
def test_optimize_refuses(name: str, models: Models, bad: Path, cli: Cli, tmp_path: Path) -> None:
    arguments, words = (
        [text.replace("{m}", str(models.folder)).replace("{b}", str(bad)) for text in texts] for texts in CASES[name]
    )
    if "-o" not in arguments:
        arguments += ["-o", "b"]
    before = listing(bad), listing(models.folder)
    done = cli("optimize", *arguments, cwd=tmp_path)
    check_message(done.err, *words)
    # A next step follows what happened: a second sentence, or an option to give.
    assert ". " in done.err.split(": ", 1)[1] or "--" in done.err, "the message names no next step"
    assert done.code == 2
    assert done.out == ""
    assert listing(tmp_path) == {}
    assert (listing(bad), listing(models.folder)) == before


@pytest.mark.parametrize("name", ["missing file", "unknown target", "pickle without --trust-pickle", "wrong dtype"])
def test_plan_refuses_alike(name: str, models: Models, bad: Path, cli: Cli, tmp_path: Path) -> None:
    arguments, words = (
        [text.replace("{m}", str(models.folder)).replace("{b}", str(bad)) for text in texts] for texts in CASES[name]
    )
    done = cli("plan", *arguments, "--json", cwd=tmp_path)
    check_message(done.err, *words)
    assert done.code == 2
    assert done.out == ""
    assert listing(tmp_path) == {}


def test_from_a_shell_too(models: Models, tmp_path: Path) -> None:
    """As above in a process of its own, where torch's warnings at import would show."""
    done = armopt("optimize", models["module.pt"], "-o", "b", cwd=tmp_path, check=False)
    check_message(done.err, "--trust-pickle")
    assert done.code == 2


def test_usage_errors_are_bad_input(cli: Cli, tmp_path: Path) -> None:
    for arguments in (("optimize",), ("optimise",), ("optimize", "--min-cosine", "high", "-o", "b"), ("run",)):
        done = cli(*arguments, cwd=tmp_path)
        assert done.code == 2, arguments
        assert "Traceback" not in done.err
    assert listing(tmp_path) == {}


def test_an_accuracy_gate_that_fails(models: Models, cli: Cli, tmp_path: Path) -> None:
    done = cli("optimize", models["static.pt2"], "-o", "b", "--min-cosine", "1.1", "--json", cwd=tmp_path)
    assert done.code == 4
    check_message(done.err, "cosine", "1.1", "report.json")
    assert done.json["accuracy"]["passed"] is False
    found = cli("inspect", "b", "--json", cwd=tmp_path)  # written whole, and marked
    assert found.code == 0
    assert found.json["accuracy"]["passed"] is False
    assert "NOT deployable" in cli("inspect", "b", cwd=tmp_path).out
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    done = cli("validate", "b", "--min-cosine", "1.1", cwd=tmp_path)
    assert done.code == 4
    check_message(done.err, "1.1", "--min-cosine")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        warnings.warn(f"NOT TESTED: a full disk, as mount fails here: {mounted.stderr.strip()}", stacklevel=2)
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("free", [1_000_000, 300_000, 20_000, 0])
@pytest.mark.parametrize("name", ["b", "b.zip"])
def test_full_disk(name: str, free: int, disk: Path, models: Models, cli: Cli, tmp_path: Path) -> None:
    """It fills up while the weights, the zip or the first small file are written."""
    (disk / "filler").write_bytes(b"x" * (1_000_000 - free))
    before = listing(disk)
    done = cli("optimize", models["static.pt2"], "-o", disk / name, "--json", cwd=tmp_path)
    if free == 1_000_000 and name == "b":  # 0.54 MB: fits once, not twice
        assert done.code == 0, done.err
        return
    check_message(done.err, str(disk / name), "space")
    assert done.code == 2
    assert done.out == ""
    assert listing(disk) == before
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_full_disk_keeps_the_bundle_that_is_there(disk: Path, models: Models, cli: Cli, tmp_path: Path) -> None:
    done = cli("optimize", models["static.pt2"], "-o", disk / "b", cwd=tmp_path)
    assert done.code == 0, done.err
    before = listing(disk)
    done = cli("optimize", models["static.pt2"], "-o", disk / "b", "--force", "--target", "graviton2", cwd=tmp_path)
    check_message(done.err, "space")
    assert done.code == 2
    assert listing(disk) == before
    assert cli("inspect", disk / "b", "--json", cwd=tmp_path).json["target"] == "graviton3"


def test_read_only_disk(disk: Path, models: Models, cli: Cli, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = cli("optimize", models["static.pt2"], "-o", disk / "b", cwd=tmp_path)
    check_message(done.err, str(disk), "-o")
    assert done.code == 2


class TestBundles:
    """What is no bundle, or not the one that was written."""

    @pytest.mark.parametrize("command", ["inspect", "validate", "env", "run"])
    @pytest.mark.parametrize("name", ["none", "kept", "text.pt", "other.zip", "empty.pt"])
    def test_no_bundle(self, command: str, name: str, bad: Path, cli: Cli, tmp_path: Path) -> None:
        rest = ("--", "true") if command == "run" else ()
        done = cli(command, bad / name, *rest, cwd=tmp_path)
        check_message(done.err, str(bad / name))
        assert done.code == 2
        assert done.out == ""

    def test_every_changed_file_is_named(self, bundle: Path, cli: Cli, tmp_path: Path) -> None:
        copy = tmp_path / "b"
        for file in sorted(bundle.iterdir()):
            data = file.read_bytes()
            flipped = bytes([data[0] ^ 1]) + data[1:]
            at_end = data[:-1] + bytes([data[-1] ^ 0x80])
            for changed in (flipped, at_end, data[:-1], data + b"\n", b"", None):
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(bundle, copy)
                if changed is None:
                    (copy / file.name).unlink()
                else:
                    (copy / file.name).write_bytes(changed)
                done = cli("inspect", copy, cwd=tmp_path)
                check_message(done.err, file.name)
                assert done.code == 2

    def test_an_extra_file_is_named(self, bundle: Path, cli: Cli, tmp_path: Path) -> None:
        shutil.copytree(bundle, tmp_path / "b")
        (tmp_path / "b" / "model.pkl").write_bytes(b"x")
        for command in ("inspect", "validate"):
            done = cli(command, "b", cwd=tmp_path)
            check_message(done.err, "model.pkl")
            assert done.code == 2

    def test_unknown_format(self, bundle: Path, cli: Cli, tmp_path: Path) -> None:
        done = cli("env", bundle, "--format", "fish", cwd=tmp_path)
        check_message(done.err, "fish", "systemd")
        assert done.code == 2

    def test_unknown_command(self, bundle: Path, cli: Cli, tmp_path: Path) -> None:
        done = cli("run", bundle, "--", "nonesuch", "--help", cwd=tmp_path)
        check_message(done.err, "nonesuch")
        assert done.code == 2

    def test_validate_against_another_model(self, bundle: Path, models: Models, cli: Cli, tmp_path: Path) -> None:
        done = cli("validate", bundle, "--against", models["two.pt2"], cwd=tmp_path)
        check_message(done.err, "two.pt2")
        assert done.code == 2
