"""The FP32 original in a bundle: what is compared with it, what a server does without it, and what memory it takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import armopt
from armopt.bundle import reader
from armopt.bundle.files import KEPT
from armopt.deploy import package
from armopt.errors import BundleError


@pytest.fixture(scope="module")
def kept(
    mlp: nn.Module, mlp_inputs: tuple[torch.Tensor, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("kept") / "bundle"
    armopt.optimize(mlp, mlp_inputs, output=armopt.Output(path, keep_reference=True), batch=(2, 64))
    return path


def copy(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "copy"))


def test_validate_compares_with_it_as_with_the_original(kept: Path, mlp: nn.Module, tmp_path: Path) -> None:
    own, original = armopt.validate(kept), armopt.validate(kept, against=mlp)
    assert "as the bundle keeps it" in own["reference"]
    for bucket, entries in original["outputs"].items():
        for entry, other in zip(entries, own["outputs"][bucket], strict=True):
            # batch norm is folded in the one and not in the other: FP32's last bits
            assert other["max_abs"] == pytest.approx(entry["max_abs"], rel=1e-3)
    assert {entry["node"]: entry["comes_from"] for entry in own["nodes"]} == {
        entry["node"]: entry["comes_from"] for entry in original["nodes"]
    }
    assert all(entry["weights"] > 0 for entry in own["nodes"])
    zipped = Path(shutil.make_archive(str(tmp_path / "bundle"), "zip", kept))
    assert armopt.validate(zipped)["outputs"] == own["outputs"]


def test_weights_are_stored_once(kept: Path) -> None:
    from safetensors import safe_open

    names = {}
    for file in ("weights.safetensors", "reference.safetensors"):
        with safe_open(kept / file, "pt") as tensors:
            names[file] = set(tensors.keys())
    assert names["weights.safetensors"].isdisjoint(names["reference.safetensors"])
    assert len(names["reference.safetensors"]) == 2  # the two that are rounded


def test_a_server_does_not_open_it(kept: Path, mlp_inputs: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    expected = armopt.load(kept)(*mlp_inputs)["logits"]
    bundle = copy(kept, tmp_path)
    for name in KEPT:
        (bundle / name).write_bytes(b"changed")
    assert torch.equal(armopt.load(bundle)(*mlp_inputs)["logits"], expected)
    for name in KEPT:
        (bundle / name).unlink()
    assert torch.equal(armopt.load(bundle)(*mlp_inputs)["logits"], expected)
    assert "own graph" in armopt.validate(bundle)["reference"]


@pytest.mark.parametrize("name", sorted(KEPT))
def test_validate_checks_its_hash(kept: Path, tmp_path: Path, name: str) -> None:
    bundle = copy(kept, tmp_path)
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match=name):
        armopt.validate(bundle)
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: is missing"):
        reader.read(bundle, reference=True)


def test_an_image_does_without_it(kept: Path, tmp_path: Path) -> None:
    zipped = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", kept))
    for number, bundle in enumerate((kept, zipped)):
        place = package.write(bundle, tmp_path / str(number), hashes=False).path / package.BUNDLE
        assert {file.name for file in place.iterdir()} == {file.name for file in kept.iterdir()} - KEPT
        armopt.load(place)


#: Validates a small bundle, to have all code loaded, then the large one; prints the most memory that was the process's
#: own (not a mapped file's) while it did, over that before.
MEMORY = """
import sys, threading, time
import armopt


def own():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def watch():
    global most
    while not stop.wait(0.002):
        most = max(most, own())


small, large = sys.argv[1:]
armopt.validate(small)
most = before = own()
stop = threading.Event()
thread = threading.Thread(target=watch)
thread.start()
armopt.validate(large)
stop.set()
thread.join()
print(most - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_two_copies_of_the_weights_are_never_held(tmp_path: Path) -> None:
    """The original's weights stay in their mapped file, a few of eight equal layers in memory at a time; those of the
    bundle, in BF16, are read."""
    layers, width = 8, 1024
    for name, size in (("small", 64), ("large", width)):
        model = nn.Sequential(*[nn.Linear(size, size) for _ in range(layers)]).eval()
        armopt.optimize(model, (torch.randn(64, size),), output=armopt.Output(tmp_path / name, keep_reference=True))
    # what is freed goes back to the system at once, so that what is counted is in use
    environ = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    arguments = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    # half for the bundle, and one layer at a time, in FP64 at most and with copies of what compares it: not both whole
    assert int(done.stdout) < 1.1 * layers * width * width * 4, int(done.stdout) / (layers * width * width * 4)
