"""Prepares the emulated Arm machine: ``python -m armopt.emulation.prepare [--torch 2.10.0] [--cache DIR]``.

Everything comes from the registries this machine already uses: Debian's archive through its own apt settings
(in private apt folders: nothing is installed, no privilege is needed) and PyPI through pip. Downloads are kept, and
checked against their registry's hashes before each use. Each part is built beside its place, stamped with the hashes
of its libraries and programs, and renamed into it, so an interrupted run goes on where it stopped, and a part that is
not as it was made is made again.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from armopt.emulation import parts
from armopt.emulation.folder import TORCH_VERSIONS, Component, PreparedFolder, write_stamp
from armopt.errors import ArmoptError

#: Makes a part: which, its empty folder, the prepared folder, a folder for what is needed meanwhile.
Build = Callable[[Component, Path, PreparedFolder, Path], None]
Report = Callable[[str], None]


def prepare(
    torch_versions: Sequence[str] = TORCH_VERSIONS,
    folder: PreparedFolder | None = None,
    report: Report = lambda line: None,
    *,
    tensorflow: bool = False,
    build: Build = parts.build,
) -> PreparedFolder:
    """Makes whatever is missing for emulation with these versions of PyTorch.

    Args:
        torch_versions: The aarch64 PyTorch wheels wanted.
        folder: Where; the user's cache folder by default.
        report: Gets one line per part made.
        tensorflow: Whether TensorFlow is wanted as well.
        build: Makes a part.

    Raises:
        HostError: A download or a tool is missing.
        InputError: A version that PyTorch never had the form of.
    """
    folder = folder or PreparedFolder.default()
    folder.path.mkdir(parents=True, exist_ok=True)
    wanted = {part.name: part for version in torch_versions for part in folder.parts(version)}
    if tensorflow:
        wanted[folder.tensorflow_part.name] = folder.tensorflow_part
    with exclusive(folder.path / ".lock", report):
        for part in wanted.values():
            if not folder.is_intact(part):
                report(f"preparing {part.name}")
                _make(part, folder, build)
    report(f"ready: {folder.path}")
    return folder


def _make(part: Component, folder: PreparedFolder, build: Build) -> None:
    work, downloads = folder.path / ".work", folder.downloads(part)
    shutil.rmtree(work, ignore_errors=True)  # what a killed run left; the lock is ours
    try:
        built = work / "built"
        built.mkdir(parents=True)
        build(part, built, folder, work)
        write_stamp(built, part.recipe)
        _replace(folder.path / part.name, built)
    finally:
        shutil.rmtree(work)
    for older in downloads.parent.glob("*"):
        if older != downloads:
            shutil.rmtree(older)


@contextlib.contextmanager
def exclusive(path: Path, report: Report) -> Iterator[None]:
    """One at a time with the lock of that file: another one waits, and then finds the work done."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another prepare ({path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(place: Path, built: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        place.rename(built.parent / "old")
    built.rename(place)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m armopt.emulation.prepare", description=__doc__)
    parser.add_argument(
        "--torch",
        action="append",
        metavar="VERSION",
        help=f"an aarch64 PyTorch (default: {', '.join(TORCH_VERSIONS)})",
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="the folder to prepare")
    parser.add_argument("--tensorflow", action="store_true", help="TensorFlow as well (1.3 GB)")
    options = parser.parse_args(arguments)
    folder = PreparedFolder(options.cache.expanduser().absolute()) if options.cache else None
    try:
        prepare(
            options.torch or TORCH_VERSIONS,
            folder,
            lambda line: print(line, file=sys.stderr, flush=True),
            tensorflow=options.tensorflow,
        )
    except ArmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
