"""Reads a bundle; every file's hash is checked before its content is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file

from armopt.bundle import codec, manifest
from armopt.bundle.source import GRAPH, REPORT, WEIGHTS, Source, damaged
from armopt.errors import BundleError


@dataclass(frozen=True, slots=True)
class Part:
    """What one graph is for: the whole model (no path), or a submodule by its path."""

    path: str
    signature: Mapping[str, Any]
    programs: tuple[codec.Program, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle in memory.

    Attributes:
        path: Where it was read from.
        manifest: What it says of itself.
        parts: One for the whole model, or one for each submodule of a bundle of kind "module".
        rest: Of kind "module": all other parameters and buffers, by name.
        report: Accuracy.
    """

    path: Path
    manifest: manifest.Manifest
    parts: tuple[Part, ...]
    rest: Mapping[str, torch.Tensor]
    report: Mapping[str, Any]

    @property
    def programs(self) -> tuple[codec.Program, ...]:
        """Those of all parts."""
        return tuple(program for part in self.parts for program in part.programs)

    @property
    def signature(self) -> Mapping[str, Any]:
        """The whole model's.

        Raises:
            BundleError: It is of kind "module": each part has its own.
        """
        if self.manifest.is_module:
            raise BundleError(
                'is of kind "module": its graphs are submodules, and Python runs between them',
                where=str(self.path),
                hint="See docs/bundle.md for what can be done with it",
            )
        return self.parts[0].signature


def read(path: Path | str) -> Bundle:
    """Reads a whole bundle.

    Raises:
        BundleError: A file is missing, extra or changed; the message names it.
    """
    path = Path(path)
    source = Source(path)
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
            raise damaged(path / name)
    weights = _tensors(source)
    graph = json.loads(source.read(GRAPH))
    where = str(path / GRAPH)
    report = json.loads(source.read(REPORT))
    if not described.is_module:
        return Bundle(path, described, (_part(graph, weights, where),), {}, report)
    parts = tuple(_part(part, weights, where) for part in graph["parts"])
    rest = {name.removeprefix("/"): tensor for name, tensor in weights.items() if name.startswith("/")}
    return Bundle(path, described, parts, rest, report)


def _part(data: dict[str, Any], weights: Mapping[str, torch.Tensor], where: str) -> Part:
    path = data.pop("path", "")
    prefix = f"{path}/" if path else ""
    programs = tuple(codec.decode(program, weights, where, prefix) for program in data.pop("programs"))
    return Part(path, data, programs)


def _tensors(source: Source) -> dict[str, torch.Tensor]:
    """The weights; those of a folder are mapped, not copied into memory."""
    found: dict[str, torch.Tensor]
    found = load(source.read(WEIGHTS)) if source.folder is None else load_file(source.folder / WEIGHTS)
    return found
