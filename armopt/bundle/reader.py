"""Reads a bundle; every file's hash is checked before its content is used."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file

from armopt.bundle import codec, manifest
from armopt.bundle.writer import GRAPH, REPORT, WEIGHTS, hash_file
from armopt.errors import BundleError, InputError


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle in memory: its manifest, signature, programs and accuracy report."""

    path: Path
    manifest: manifest.Manifest
    signature: Mapping[str, Any]
    programs: tuple[codec.Program, ...]
    report: Mapping[str, Any]


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
    return manifest.from_bytes(_Source(path).read(manifest.NAME), path / manifest.NAME)


def read(path: Path | str) -> Bundle:
    """Reads a whole bundle.

    Raises:
        BundleError: A file is missing, extra or changed; the message names it.
    """
    path = Path(path)
    source = _Source(path)
    described = manifest.from_bytes(source.read(manifest.NAME), path / manifest.NAME)
    present = source.names() - {manifest.NAME}
    for name in sorted(set(described.files) - present):
        raise BundleError("is missing", where=str(path / name), hint="Copy the bundle again")
    for name in sorted(present - set(described.files)):
        raise BundleError(
            "does not belong to the bundle", where=str(path / name), hint="Remove it, or copy the bundle again"
        )
    for name, digest in described.files.items():
        if source.hash(name) != digest:
            raise _damaged(path / name)
    weights = source.tensors(WEIGHTS)
    graph = json.loads(source.read(GRAPH))
    where = str(path / GRAPH)
    programs = tuple(codec.decode(program, weights, where) for program in graph.pop("programs"))
    return Bundle(path, described, graph, programs, json.loads(source.read(REPORT)))


def _damaged(path: Path) -> BundleError:
    return BundleError("was changed or damaged after it was written", where=str(path), hint="Copy the bundle again")


class _Source:
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
        if self._archive is not None:
            return set(self._archive.namelist())
        return {entry.name for entry in self._path.iterdir()}

    def read(self, name: str) -> bytes:
        try:
            if self._archive is not None:
                return self._archive.read(name)
            return (self._path / name).read_bytes()
        except zipfile.BadZipFile:
            raise _damaged(self._path / name) from None
        except OSError as error:
            hint = "Check the path and its permissions"
            raise InputError(f"can't be read: {error.strerror}", where=str(self._path / name), hint=hint) from error

    def hash(self, name: str) -> str:
        if self._archive is None and (self._path / name).is_file():
            return hash_file(self._path / name)
        return hashlib.sha256(self.read(name)).hexdigest()

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The weights; those of a folder are mapped, not copied into memory."""
        found: dict[str, torch.Tensor]
        found = load(self.read(name)) if self._archive is not None else load_file(self._path / name)
        return found
