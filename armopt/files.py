"""Files and folders written beside their place, synced and renamed: whole or not at all. Reading where one may miss."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from armopt.errors import InputError


def write(path: Path, text: str, option: str) -> None:
    """Writes a file that a user asked for: whoever reads it sees the old one or the new one.

    Args:
        path: Where it goes; its folder has to be there.
        text: What it holds, written as UTF-8.
        option: What a user would choose another place with.

    Raises:
        InputError: The place can't be written; nothing is left there.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise InputError(
            f"can't be written: {error.strerror}", where=str(path), hint=f"Choose another place with {option}"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Writes a file as UTF-8, readable for all; where that fails nothing is left, and an old one stays."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, in which what goes there is made; what is left of it at the end goes."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put(ready: Path, path: Path) -> None:
    """Moves a finished file or folder from beside its place to it; what is there is only dropped afterwards."""
    old = None
    if path.exists():
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        path.rename(old)
    try:
        ready.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    if old is not None:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    sync(path)
    sync(path.absolute().parent)


def sync(path: Path) -> None:
    """Has the system write a file or a folder's entries to its disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_parent(path: Path) -> None:
    """Refuses a path whose folder can't be written to, before any work is done.

    Raises:
        InputError: The folder is missing or not writable.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError("the folder to write into does not exist", where=str(parent), hint=f"mkdir -p {parent}")
    if not os.access(parent, os.W_OK):
        raise InputError("the folder is not writable", where=str(parent), hint="Choose another place with -o")


def read_or_empty(path: str | Path) -> str:
    """The text of a file of the system, such as one below /proc; empty where it can't be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
