"""Files and folders made beside their place, synced and put there: whole or not at all. Reading where one may miss."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from armopt.errors import InputError

#: How what a zip holds may be compressed: other methods take as much memory as the zip says.
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


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
    """Writes a file as UTF-8; where that fails nothing is left, and an old one stays."""
    with folder_beside(path) as folder:
        ready = folder / path.name
        ready.write_text(text, encoding="utf-8")
        sync(ready)
        os.replace(ready, path)
        sync(path.absolute().parent)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, in which what goes there is made; what is left of it at the end goes.

    What runs that were killed have left there goes first: a folder that nobody holds locked.
    """
    clear_leftovers(path)
    folder, lock = _locked_folder(path)
    try:
        yield folder
    finally:
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
        else:  # what was put in its place took it, or it was a file that gave its place
            folder.unlink(missing_ok=True)
        os.close(lock)


def clear_leftovers(path: Path) -> None:
    """Removes the folders beside `path` that runs which were killed have left."""
    import fcntl

    with contextlib.suppress(OSError):
        for left in [each for each in path.absolute().parent.iterdir() if each.name.startswith(_prefix(path))]:
            if not left.is_dir() or left.is_symlink():  # what gave its place to a folder
                left.unlink(missing_ok=True)
                continue
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            os.close(handle)


def _prefix(path: Path) -> str:
    return f".{path.name}.armopt-"


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A new folder beside `path`, and the handle that holds it locked until it is closed."""
    import fcntl

    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.absolute().parent))
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():  # nobody took it for a leftover before it was locked
                return folder, handle
            os.close(handle)


def put(ready: Path, path: Path) -> None:
    """Moves a finished file or folder to its place; what is there goes to the place of the finished one.

    Where the system can exchange the two at once, whoever looks sees the old one or the new one and never nothing.
    """
    if not path.exists():
        ready.rename(path)
    elif not _exchange(ready, path):
        old = ready.with_name(f"{ready.name}.old")
        path.rename(old)
        try:
            ready.rename(path)
        except OSError:
            old.rename(path)
            raise
        old.rename(ready)
    sync(path)
    sync(path.absolute().parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two places at once; False where the system or the file system can't (Linux's renameat2)."""
    renameat2: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def follow_umask(path: Path, mode: int = 0o666) -> None:
    """Gives a file the mode that one made by open() would have; some libraries make theirs for the owner alone."""
    mask = os.umask(0)  # there is no other way to ask
    os.umask(mask)
    path.chmod(mode & ~mask)


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


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file that has no more than `most` bytes; a pipe or a device is not waited for.

    Raises:
        OSError: It is none, or can't be read.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "is no regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"has more than {most} bytes")
    return content


def read_or_empty(path: str | Path) -> str:
    """The text of a file of the system, such as one below /proc; empty where it can't be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def cache_folder() -> Path | None:
    """Where what was found out about a host is kept: ``$ARMOPT_CACHE`` or ``~/.cache/armopt``.

    None where neither is: a user without a home and without an entry in passwd.
    """
    root = os.environ.get("ARMOPT_CACHE")
    try:
        return Path(root) if root else Path.home() / ".cache" / "armopt"
    except RuntimeError:
        return None
