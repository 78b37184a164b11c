"""The files of a bundle, in a folder or a zip. Needs no torch, so that `armopt run` and `armopt env` start at once."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from armopt.bundle import manifest
from armopt.errors import BundleError, InputError

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


def looks_like_bundle(path: Path) -> bool:
    """Whether there is a manifest at `path`."""
    if path.is_dir():
        return (path / manifest.NAME).is_file()
    return zipfile.is_zipfile(path) and manifest.NAME in zipfile.ZipFile(path).namelist()


def read_manifest(path: Path | str) -> manifest.Manifest:
    """The manifest alone, itself checked; the other files are not read.

    Raises:
        BundleError: There is no bundle, or its manifest is damaged.
    """
    path = Path(path)
    return manifest.from_bytes(BundleFiles(path).read(manifest.NAME), path / manifest.NAME)


def damaged(path: Path) -> BundleError:
    """The error for a file that is not as it was written."""
    return BundleError("was changed or damaged after it was written", where=str(path), hint="Copy the bundle again")


class BundleFiles:
    """A folder or a zip file, by name."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise BundleError("there is no such bundle", where=str(path), hint="Make one with armopt optimize")
        self._path = path
        self._archive: zipfile.ZipFile | None = None
        if path.is_file():
            try:
                self._archive = zipfile.ZipFile(path)
            except zipfile.BadZipFile:
                raise BundleError(
                    "is neither a bundle folder nor a bundle zip", where=str(path), hint="Make one with armopt optimize"
                ) from None
        if manifest.NAME not in self.names():
            raise BundleError(
                "is not a bundle: it has no manifest.json", where=str(path), hint="Make one with armopt optimize"
            )

    def names(self) -> set[str]:
        """All files."""
        if self._archive is not None:
            return set(self._archive.namelist())
        return {entry.name for entry in self._path.iterdir()}

    def read(self, name: str) -> bytes:
        """One file."""
        try:
            if self._archive is not None:
                return self._archive.read(name)
            return (self._path / name).read_bytes()
        except zipfile.BadZipFile:
            raise damaged(self._path / name) from None
        except OSError as error:
            hint = "Check the path and its permissions"
            raise InputError(f"can't be read: {error.strerror}", where=str(self._path / name), hint=hint) from error

    def hash(self, name: str) -> str:
        """Its sha256; of a folder's file without reading it into memory."""
        if self._archive is None and (self._path / name).is_file():
            return hash_file(self._path / name)
        return hashlib.sha256(self.read(name)).hexdigest()

    @property
    def folder(self) -> Path | None:
        """The folder, where it is one."""
        return self._path if self._archive is None else None


def hash_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
