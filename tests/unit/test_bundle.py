from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from armopt.bundle import codec, manifest, reader, writer
from armopt.bundle.program import Part
from armopt.errors import BundleError, InputError

FILES = ("env.sh", "graph.json", "manifest.json", "report.json", "requirements.txt", "weights.safetensors")


def positions(size: int) -> list[int]:
    """The ends, the middle, and places between."""
    return sorted({0, 1, 7, size // 3, size // 2, size - 2, size - 1} & set(range(size)))


@pytest.fixture
def bundle(mlp_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(mlp_bundle, tmp_path / "bundle"))


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return path


def check_refused(path: Path, name: str) -> None:
    """Found in the folder and in a zip of it, with the file's name and the next step."""
    for place in (path, zipped(path)):
        with pytest.raises(BundleError) as found:
            reader.read(place)
        assert found.value.where.endswith(name)
        assert found.value.hint


def test_it_holds_these_files(mlp_bundle: Path) -> None:
    assert sorted(p.name for p in mlp_bundle.iterdir()) == sorted(FILES)
    read = reader.read(mlp_bundle)
    assert set(read.manifest.files) == set(FILES) - {"manifest.json"}
    assert [p.bucket for p in read.programs] == [{"batch": 2}, {"batch": 64}]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    for position in positions(len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x20
        (bundle / name).write_bytes(bytes(changed))
        check_refused(bundle, name)


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_extra_byte_is_found(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    for changed in (b"", data[:1], data[: len(data) // 2], data[:-1], data + b"\n", b" " + data):
        (bundle / name).write_bytes(changed)
        check_refused(bundle, name)


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_a_missing_file_is_found(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    check_refused(bundle, name)


@pytest.mark.parametrize("name", ["extra.bin", "weights.safetensors.bak", ".hidden"])
def test_an_extra_file_is_found(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"")
    check_refused(bundle, name)


def test_an_extra_folder_is_found(bundle: Path) -> None:
    (bundle / "folder").mkdir()
    with pytest.raises(BundleError, match="folder: does not belong"):
        reader.read(bundle)


def test_a_flipped_byte_of_a_zip_is_found(bundle: Path) -> None:
    path = zipped(bundle)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        starts = {info.filename: info.header_offset + 30 + len(info.filename) for info in archive.infolist()}
    for name, start in starts.items():
        changed = bytearray(data)
        changed[start + 5] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(BundleError, match=name):
            reader.read(path)


@pytest.mark.parametrize("keep", [10, 0.3, 0.9, -1])
def test_a_truncated_zip_is_found(bundle: Path, keep: float) -> None:
    path = zipped(bundle)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(BundleError, match="neither a bundle folder nor a bundle zip"):
        reader.read(path)


def test_what_is_no_bundle_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no such bundle"):
        reader.read(tmp_path / "nothing")
    with pytest.raises(BundleError, match="no manifest"):
        reader.read(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"text")
    with pytest.raises(BundleError, match="neither"):
        reader.read(tmp_path / "model.pt")


def test_a_zip_reads_like_its_folder(bundle: Path) -> None:
    a, b = reader.read(bundle), reader.read(zipped(bundle))
    assert a.manifest == b.manifest
    x = torch.randn(2, 16), torch.randn(8)
    for p, q in zip(a.programs, b.programs, strict=True):
        assert codec.encode(p) == codec.encode(q)
        assert all(torch.equal(m, n) for m, n in zip(p.graph_module(*x), q.graph_module(*x), strict=True))


def test_buckets_share_their_weights(mlp_bundle: Path) -> None:
    from safetensors import safe_open

    read = reader.read(mlp_bundle)
    held = [{p.weights[own]: t.data_ptr() for own, t in p.graph_module.named_buffers()} for p in read.programs]
    shared = held[0].keys() & held[1].keys()
    assert shared
    assert all(held[0][name] == held[1][name] for name in shared)
    with safe_open(mlp_bundle / "weights.safetensors", "pt") as file:
        assert set(file.keys()) == set(held[0]) | set(held[1])


def _parts(path: Path) -> tuple[manifest.Manifest, tuple[Part, ...], dict[str, str]]:
    read = reader.read(path)
    texts = {name: (path / name).read_text() for name in ("env.sh", "requirements.txt", "report.json")}
    return read.manifest, read.parts, texts


def test_writing_twice_gives_the_same_bytes(mlp_bundle: Path, tmp_path: Path) -> None:
    writer.write(tmp_path / "again", *_parts(mlp_bundle))
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (mlp_bundle / name).read_bytes()


@pytest.mark.parametrize("failing", ["save_file", "put", "sync"])
def test_a_failure_leaves_nothing(
    mlp_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, failing, fail)
    for name in ("new", "new.zip"):
        with pytest.raises(InputError, match="No space left"):
            writer.write(tmp_path / name, *_parts(mlp_bundle))
        assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_is_there_stays_unless_forced(
    mlp_bundle: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = _parts(mlp_bundle)
    with pytest.raises(InputError, match="is there already"):
        writer.write(bundle, *parts)
    (bundle / "env.sh").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(writer, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(InputError):
            writer.write(bundle, *parts, force=True)
    assert (bundle / "env.sh").read_text() == "old"
    writer.write(bundle, *parts, force=True)
    reader.read(bundle)
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_force_never_replaces_something_else(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="is not a bundle"):
        writer.check_place(tmp_path / "photos", force=True)
    with pytest.raises(InputError, match="does not exist"):
        writer.check_place(tmp_path / "no" / "bundle")


def test_nothing_is_pickled(mlp_bundle: Path) -> None:
    for file in mlp_bundle.iterdir():
        assert not file.read_bytes().startswith((b"\x80", b"PK"))
    json.loads((mlp_bundle / "graph.json").read_text())
