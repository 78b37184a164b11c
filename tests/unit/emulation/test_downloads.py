"""What was downloaded is kept and taken again if its hash is right, from registries in a folder of this machine."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from armopt.emulation.debian import Apt, Mirror
from armopt.emulation.wheels import install_wheels
from armopt.errors import HostError


def damage(file: Path) -> None:
    """Another byte, and the same size."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def delete(file: Path) -> None:
    file.unlink()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- wheels ---------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, needs: Sequence[str] = ()) -> Path:
    """A wheel of one module."""
    folder.mkdir(parents=True)
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {n}" for n in needs)]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", f"NAME = {name!r}\n")
        file.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{path.name}#sha256={sha256(path)}">{path.name}</a>')
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of `first`, which needs `second` and `third`."""
    wheel(tmp_path / "index" / "first", "first", ["second", "third"])
    for name in ("second", "third"):
        wheel(tmp_path / "index" / name, name)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return tmp_path / "index"


def test_what_is_broken_or_missing_is_downloaded_again_and_the_rest_is_not(index: Path, tmp_path: Path) -> None:
    kept, names = tmp_path / "kept", {"first.py", "second.py", "third.py"}
    install_wheels(["first"], tmp_path / "site", kept)
    assert {path.name for path in (tmp_path / "site").glob("*.py")} == names
    good = {path.name: sha256(path) for path in kept.iterdir()}
    first, second, third = (kept / f"{name}-1.0-py3-none-any.whl" for name in ("first", "second", "third"))
    damage(first)
    second.unlink()  # as an interrupted run leaves it
    before = third.stat()
    install_wheels(["first"], tmp_path / "again", kept)
    assert {path.name: sha256(path) for path in kept.iterdir()} == good
    assert (third.stat().st_mtime_ns, third.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == names


def test_a_download_that_is_not_what_the_index_says_is_refused(index: Path, tmp_path: Path) -> None:
    damage(index / "second" / "second-1.0-py3-none-any.whl")
    with pytest.raises(HostError, match="pip failed"):
        install_wheels(["first"], tmp_path / "site", tmp_path / "kept")
    assert not (tmp_path / "site").exists()


# --- Debian's packages ----------------------------------------------------------------------------


def package(pool: Path, name: str, needs: str = "") -> str:
    """Builds a package of one file; returns its paragraph of the suite's list."""
    root = pool.parent / "built" / name
    (root / "DEBIAN").mkdir(parents=True)
    (root / f"{name}.txt").write_text(name * 1000)
    fields = {"Package": name, "Version": "1.0", "Architecture": "arm64", "Maintainer": "nobody", "Description": "x"}
    fields |= {"Depends": needs} if needs else {}
    control = "".join(f"{field}: {value}\n" for field, value in fields.items())
    (root / "DEBIAN" / "control").write_text(control)
    file = pool / f"{name}_1.0_arm64.deb"
    subprocess.run(["dpkg-deb", "--build", str(root), str(file)], check=True, capture_output=True)
    return f"{control}Filename: pool/{file.name}\nSize: {file.stat().st_size}\nSHA256: {sha256(file)}\n"


@pytest.fixture
def apt(tmp_path: Path) -> Apt:
    """Of a suite with `first`, which needs `second`."""
    if not shutil.which("apt-get"):
        pytest.skip("this machine has no apt")
    pool, lists = tmp_path / "archive" / "pool", tmp_path / "archive" / "dists" / "suite" / "main" / "binary-arm64"
    pool.mkdir(parents=True)
    lists.mkdir(parents=True)
    (lists / "Packages").write_text("\n".join([package(pool, "first", "second"), package(pool, "second")]))
    size, known = (lists / "Packages").stat().st_size, sha256(lists / "Packages")
    release = (
        f"Suite: suite\nArchitectures: arm64\nComponents: main\nSHA256:\n {known} {size} main/binary-arm64/Packages\n"
    )
    (lists.parents[1] / "Release").write_text(release)
    mirror = Mirror(f"[trusted=yes] copy:{tmp_path}/archive", "")
    return Apt.create(tmp_path / "apt", mirror, "suite", "arm64", tmp_path / "kept")


@pytest.mark.parametrize("dependencies", [True, False])
@pytest.mark.parametrize("harm", [damage, delete])
def test_a_broken_package_is_downloaded_again_and_the_others_are_not(
    apt: Apt, harm: Callable[[Path], None], dependencies: bool
) -> None:
    names = ["first"] if dependencies else ["first", "second"]
    first, second = found = apt.fetch(names, dependencies=dependencies)
    assert [path.name for path in found] == ["first_1.0_arm64.deb", "second_1.0_arm64.deb"]
    good = [sha256(path) for path in found]
    harm(first)
    untouched = second.stat().st_mtime_ns, second.stat().st_ino
    assert apt.fetch(names, dependencies=dependencies) == [first, second]
    assert [sha256(path) for path in found] == good
    assert (second.stat().st_mtime_ns, second.stat().st_ino) == untouched


def test_a_package_that_is_not_what_the_suite_says_is_refused(apt: Apt, tmp_path: Path) -> None:
    damage(tmp_path / "archive" / "pool" / "first_1.0_arm64.deb")
    with pytest.raises(HostError, match="apt-get failed"):
        apt.fetch(["first"], dependencies=True)


def test_setuptools_can_still_be_imported_behind_it(tmp_path: Path) -> None:
    """Its finder takes a process that asks where pip is for pip, and gives it the standard library's distutils."""
    script = """
import sys
from pathlib import Path
from unittest import mock
from armopt.emulation import wheels
with mock.patch.object(wheels, "run_command"):
    wheels.install_wheels(["first"], Path(sys.argv[1]), Path(sys.argv[2]))
import setuptools
"""
    places = [str(tmp_path / name) for name in ("site", "kept")]
    done = subprocess.run([sys.executable, "-c", script, *places], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
