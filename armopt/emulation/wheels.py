"""Wheels for the emulated Python, from PyPI as this machine's pip reaches it."""

from __future__ import annotations

import importlib.machinery
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from armopt.emulation.commands import run_command
from armopt.errors import HostError

_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
_WANTED = (
    *("--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--python-version=3.11", "--implementation=cp"),
    *(f"--platform={name}" for name in _PLATFORMS),
)


def install_wheels(requirements: Sequence[str], into: Path, downloads: Path, *options: str) -> None:
    """Downloads aarch64 wheels and unpacks them, with all they need unless told otherwise.

    A wheel that was downloaded before is taken again if its hash is the index's; else pip downloads it anew.

    Args:
        requirements: As pip takes them.
        into: The site folder.
        downloads: Where wheels are kept.
        options: Of pip, such as ``--no-deps``.

    Raises:
        HostError: pip is missing or fails.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    pip, what = _pip(), " ".join(requirements)
    run_command([*pip, "download", "--no-cache-dir", f"--dest={downloads}", *_WANTED, *options, *requirements], what)
    unpack = (
        *("--no-index", f"--find-links={downloads}", f"--target={into}", "--no-compile"),
        "--no-warn-conflicts",  # with the host's packages, which are not ours
    )
    run_command([*pip, "install", *unpack, *_WANTED, *options, *requirements], what)


def _pip() -> list[str]:
    # not find_spec: setuptools' finder takes who asks for pip for pip itself, and then can't be imported any more
    if importlib.machinery.PathFinder.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if other := shutil.which("pip3") or shutil.which("pip"):  # a virtual environment made without pip
        return [other]
    raise HostError("pip is missing", where=sys.executable, hint=f"Run `{sys.executable} -m ensurepip`")
