"""The files of a bundle, in a folder or a zip. Needs no torch, so that `armopt run` and `armopt env` start at once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Self, cast

from armopt.bundle import manifest
from armopt.errors import BundleError, InputError
from armopt.files import COMPRESSIONS

GRAPH, WEIGHTS, REPORT, ENV, REQUIREMENTS = (
    "graph.json",
    "weights.safetensors",
    "report.json",
    "env.sh",
    "requirements.txt",
)
#: The FP32 original, where it was kept: for `validate` alone, so a server may leave both out.
REFERENCE_GRAPH, REFERENCE_WEIGHTS = "reference.json", "reference.safetensors"
KEPT = frozenset({REFERENCE_GRAPH, REFERENCE_WEIGHTS})


#: Bytes that a file of JSON may have: a graph of a hundred thousand nodes has some twenty million.
MOST_JSON = 1 << 26
#: By how much a file larger than that may be compressed in a zip, and all files of a zip together.
MOST_RATIO = 20
#: What reading a damaged zip raises: by the zip itself, and by each method of compression.
DAMAGED_ZIP = (
    *(zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError),
    *(OSError, ValueError, struct.error, OverflowError),
)


_PATH_HINT = "Check the path and its permissions"


def looks_like_bundle(path: Path) -> bool:
    """Whether there is a manifest at `path`."""
    if path.is_dir():
        return (path / manifest.NAME).is_file()
    try:
        return path.is_file() and manifest.NAME in zipfile.ZipFile(path).namelist()
    except DAMAGED_ZIP:
        return False


def read_manifest(path: Path | str) -> manifest.Manifest:
    """The manifest alone, itself checked; the other files are not read.

    Raises:
        BundleError: There is no bundle, or its manifest is damaged.
    """
    path = Path(path)
    with BundleFiles(path) as stored:
        return manifest.from_bytes(stored.read(manifest.NAME), path / manifest.NAME)


def damaged(path: Path) -> BundleError:
    """The error for a file that is not as it was written."""
    return BundleError("was changed or damaged after it was written", where=str(path), hint="Copy the bundle again")


def changed(path: Path) -> BundleError:
    """The error for a file that was written to while it was in use."""
    hint = "A bundle is replaced whole, by armopt optimize --force or a rename, and never written to"
    return BundleError("was changed while it was read", where=str(path), hint=hint)


#: Bytes of a file, and when it was last written to.
Stamp = tuple[int, int]


def stamp(handle: int) -> Stamp:
    """The stamp of an open file."""
    found = os.fstat(handle)
    return found.st_size, found.st_mtime_ns


class BundleFiles:
    """A folder or a zip file, by name.

    The folder is opened once and so is each file: what was checked is what is used, also where another bundle takes
    this one's place meanwhile.

    Args:
        path: The bundle.

    Raises:
        BundleError: There is none, or it holds something other than files.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive: zipfile.ZipFile | None = None
        self._opened: dict[str, BufferedIOBase] = {}
        self._stamps: dict[str, Stamp] = {}
        self._folder: int | None = None
        if not path.exists():
            raise BundleError("there is no such bundle", where=str(path), hint="Make one with armopt optimize")
        if path.is_file():
            self._archive = self._open_archive()
        elif not path.is_dir():
            raise self._no_bundle("is neither a bundle folder nor a bundle zip")
        elif os.open in os.supports_dir_fd:
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        if manifest.NAME not in self.names():
            raise self._no_bundle("is not a bundle: it has no manifest.json")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in (*self._opened.values(), self._archive):
            if file is not None:
                file.close()
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def names(self) -> set[str]:
        """All files."""
        if self._archive is not None:
            return set(self._archive.namelist())
        return set(os.listdir(self._path if self._folder is None else self._folder))

    def read(self, name: str) -> bytes:
        """A file of JSON.

        Raises:
            BundleError: It is larger than any that armopt writes, or damaged.
            InputError: The system can't read it.
        """
        content = self._all_of(name, MOST_JSON + 1)
        if len(content) > MOST_JSON:
            raise BundleError(f"has more than {MOST_JSON} bytes", where=str(self._path / name), hint="Make it again")
        return content

    def read_tensors(self, name: str) -> bytes:
        """A file of tensors, whatever its size; of a zip, as those of a folder are mapped.

        Raises:
            BundleError: It is damaged.
        """
        return self._all_of(name, -1)

    def _all_of(self, name: str, most: int) -> bytes:
        file = self.open(name)
        with self._explained(name):
            return file.read(most)

    def open(self, name: str) -> BufferedIOBase:
        """A file, from its beginning.

        Raises:
            BundleError: It is missing, or no regular file.
            InputError: The system can't read it.
        """
        if name not in self._opened:
            with self._explained(name):
                opened = self._archive.open(name) if self._archive else self._open_regular(name)
                self._opened[name] = cast("BufferedIOBase", opened)
        file = self._opened[name]
        file.seek(0)
        return file

    def hash(self, name: str) -> str:
        """Its sha256, read piece by piece."""
        file = self.open(name)
        with self._explained(name):
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        where = str(self._path / name)
        try:
            yield
        except (KeyError, FileNotFoundError):
            raise BundleError("is missing", where=where, hint="Copy the bundle again") from None
        except DAMAGED_ZIP as error:
            if self._archive is None and isinstance(error, OSError):
                raise InputError(f"can't be read: {error.strerror}", where=where, hint=_PATH_HINT) from error
            raise damaged(self._path / name) from None

    def stamp(self, name: str) -> Stamp:
        """What would differ had a file been written to after it was opened; of a zip that of the whole."""
        return self._stamps[name if self._archive is None else ""]

    def check_unchanged(self) -> None:
        """Refuses files that were written to while they were read.

        Raises:
            BundleError: Naming one.
        """
        handles = {"": self._archive.fp} if self._archive is not None else self._opened
        for name, file in handles.items():
            if file is not None and stamp(file.fileno()) != self._stamps[name]:
                raise changed(self._path / name)

    def is_still_there(self) -> bool:
        """Whether this bundle is the one at its place, and not another that took it meanwhile."""
        if self._folder is None:
            return True
        try:
            return os.path.samestat(os.fstat(self._folder), self._path.stat())
        except OSError:
            return False

    @property
    def folder(self) -> Path | None:
        """The folder, where it is one."""
        return self._path if self._archive is None else None

    def _open_archive(self) -> zipfile.ZipFile:
        try:
            archive = zipfile.ZipFile(self._path)
        except PermissionError as error:
            what = f"can't be read: {error.strerror}"
            raise InputError(what, where=str(self._path), hint=_PATH_HINT) from error
        except DAMAGED_ZIP:
            raise self._no_bundle("is neither a bundle folder nor a bundle zip") from None
        assert archive.fp is not None
        self._stamps[""] = stamp(archive.fp.fileno())
        for entry in archive.infolist():
            if entry.compress_type not in COMPRESSIONS:
                what = (
                    f"{entry.filename} in it is compressed by method {entry.compress_type}, which may take any memory"
                )
                raise BundleError(what, where=str(self._path), hint="Zip the bundle again, without compression")
            # armopt stores; who zips a bundle again compresses weights a little, and only a bomb by a lot
            if entry.file_size > MOST_JSON and entry.file_size > MOST_RATIO * entry.compress_size:
                what = f"{entry.filename} in it would have {entry.file_size} bytes, and has {entry.compress_size}"
                raise BundleError(what, where=str(self._path), hint="Zip the bundle again, without compression")
        size, whole = sum(entry.file_size for entry in archive.infolist()), self._stamps[""][0]
        if size > MOST_JSON and size > MOST_RATIO * whole:  # entries may share what they are unpacked from
            what = f"the files in it would have {size} bytes, and it has {whole}"
            raise BundleError(what, where=str(self._path), hint="Zip the bundle again, without compression")
        return archive

    def _open_regular(self, name: str) -> BufferedIOBase:
        """A file of the folder itself: no link, and nothing that may have no end or keep a reader waiting."""
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            place = self._path / name if self._folder is None else name
            handle = os.open(place, flags, dir_fd=self._folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise self._no_file(name) from None
            raise
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise self._no_file(name)
        self._stamps[name] = stamp(handle)
        return os.fdopen(handle, "rb")

    def _no_file(self, name: str) -> BundleError:
        where = str(self._path / name)
        return BundleError("is no regular file", where=where, hint="Copy the bundle with its files, not with links")

    def _no_bundle(self, what: str) -> BundleError:
        return BundleError(what, where=str(self._path), hint="Make one with armopt optimize")


def hash_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
