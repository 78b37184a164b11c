"""Example inputs and images that are damaged, lie about their size, or have no values."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import armopt
from armopt import capture
from armopt.accuracy import images
from armopt.capture import sample_files
from armopt.errors import InputError


def npy(shape: tuple[int, ...], data: bytes, descr: str = "<f4", order: bool = False) -> bytes:
    header = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape!r}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + data


def npz(path: Path, content: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.npy", content)
    return path


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch pwned",))


def pickled() -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Evil()], dtype=object), allow_pickle=True)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (npy((1 << 40,), b"1234"), "of shape"),
        (npy((1 << 20, 1 << 20, 1 << 20), b""), "of shape"),
        (npy((-1,), b""), "can't be read"),
        (npy((1,), b"12345678", "|O"), "not numbers"),
        (npy((1,), b"1234", [("a", "<f4")]), "can't be read|not numbers"),  # type: ignore[arg-type]
        (npy((1,), b"1234", "<U1"), "can't be read"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "can't be read"),
        (b"\x93NUMPY\x09\x00\x10\x00", "can't be read"),
        (npy((2,), b"1234"), "are missing"),
        (b"", "can't be read"),
        (pickled(), "not numbers"),
    ],
)
def test_an_array_is_as_large_as_what_is_stored_of_it(
    content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        sample_files.read(npz(tmp_path / "x.npz", content))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_real_arrays_are_read(tmp_path: Path, method: int) -> None:
    x = np.arange(6, dtype=">f4").reshape(2, 3)
    held = io.BytesIO()
    np.save(held, np.asfortranarray(x))
    found = sample_files.read(npz(tmp_path / "x.npz", held.getvalue(), method))
    assert torch.equal(found["x"], torch.arange(6.0).reshape(2, 3))
    np.savez_compressed(tmp_path / "y.npz", ids=np.arange(3), flag=np.array(True))
    assert {name: tensor.tolist() for name, tensor in sample_files.read(tmp_path / "y.npz").items()} == {
        "ids": [0, 1, 2],
        "flag": True,
    }


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".pth", ".safetensors"])
def test_samples_are_regular_files(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"x{suffix}")
    with pytest.raises(InputError, match="is no regular file"):
        sample_files.read(tmp_path / f"x{suffix}")


def test_samples_that_are_pickled_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"posix\.system"):
        sample_files.read(tmp_path / "x.pt")
    assert not (tmp_path / "pwned").exists()


# --- images ---


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says how large it is, whatever is in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(10_000, 9_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (1 << 20, 1), (1, 1 << 20), (0, 5)]
)
def test_image_bombs_are_refused_before_they_are_decoded(width: int, height: int, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(width, height))
    with pytest.raises(InputError, match="is no image that can be read"):
        images.open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("keep", [0, 1, 10, 60, -1])
@pytest.mark.parametrize("suffix", images.SUFFIXES)
def test_an_image_cut_short_is_one_error(suffix: str, keep: int, tmp_path: Path) -> None:
    path = tmp_path / f"image{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    assert images.open_image(path).size == (64, 64)
    path.write_bytes(path.read_bytes()[: keep if keep >= 0 else path.stat().st_size // 2])
    with pytest.raises(InputError, match="is no image that can be read"):
        images.open_image(path)


def test_an_image_is_of_a_kind_that_its_name_may_have(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.tiff")
    (tmp_path / "a.tiff").rename(tmp_path / "a.png")
    with pytest.raises(InputError, match="is no image that can be read"):
        images.open_image(tmp_path / "a.png")


# --- inputs without values ---


def test_a_meta_tensor_is_refused_wherever_it_is_given(tmp_path: Path, mlp_bundle: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.zeros(2, 4)
    for run in (
        lambda: armopt.optimize(model, (x.to("meta"),), output=tmp_path / "b"),
        lambda: armopt.optimize(model, {"input": x.to("meta")}, output=tmp_path / "b"),
        lambda: armopt.optimize(nn.Linear(4, 4, device="meta"), (x,), output=tmp_path / "b"),
        lambda: capture.exported(torch.export.export(model, (x,)), (x.to("meta"),), source="program"),
    ):
        with pytest.raises(InputError, match="is on the device meta"):
            run()
    with torch.no_grad(), pytest.raises(RuntimeError, match="meta"):
        armopt.compile(model)(x.to("meta"))
    assert not (tmp_path / "b").exists()


@pytest.mark.filterwarnings("ignore::armopt.errors.ArmoptWarning")
def test_a_bundle_refuses_a_meta_tensor(mlp_bundle: Path, mlp_inputs: tuple[torch.Tensor, ...]) -> None:
    loaded = armopt.load(mlp_bundle)
    with pytest.raises(InputError, match="is on the device meta, and a bundle runs on the CPU"):
        loaded(*(tensor.to("meta") for tensor in mlp_inputs))
    loaded(*mlp_inputs)
