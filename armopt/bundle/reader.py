"""Reads a bundle; every file's hash is checked before its content is used."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from armopt.bundle import codec, manifest
from armopt.bundle.files import GRAPH, KEPT, REFERENCE_GRAPH, REFERENCE_WEIGHTS, REPORT, WEIGHTS, Source, damaged
from armopt.bundle.mapped_weights import MappedTensors
from armopt.bundle.program import Program
from armopt.errors import BundleError


@dataclass(frozen=True, slots=True)
class Part:
    """What one graph is for: the whole model (no path), or a submodule by its path."""

    path: str
    signature: Mapping[str, Any]
    programs: tuple[Program, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle in memory.

    Attributes:
        path: Where it was read from.
        manifest: What it says of itself.
        parts: One for the whole model, or one for each submodule of a bundle of kind "module".
        rest: Of kind "module": all other parameters and buffers, by name.
        report: Accuracy.
        release: Lets a stored weight leave memory until it is read again; for one of a zip it does nothing.
        reference: The FP32 original, if it was kept.
    """

    path: Path
    manifest: manifest.Manifest
    parts: tuple[Part, ...]
    rest: Mapping[str, torch.Tensor]
    report: Mapping[str, Any]
    release: Callable[[torch.Tensor], None]
    reference: Program | None = None

    @property
    def programs(self) -> tuple[Program, ...]:
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


def read(path: Path | str, *, reference: bool = False) -> Bundle:
    """Reads a bundle.

    Args:
        path: The bundle, a folder or a zip.
        reference: Whether to read the FP32 original too, where the bundle keeps one and its files were not left out on
            the way. Otherwise they are not opened.

    Raises:
        BundleError: A file is missing, extra or changed; the message names it.
    """
    path = Path(path)
    source = Source(path)
    described = manifest.from_bytes(source.read(manifest.NAME), path / manifest.NAME)
    present = source.names() - {manifest.NAME}
    with_reference = reference and bool(KEPT & present)
    wanted = {name: digest for name, digest in described.files.items() if with_reference or name not in KEPT}
    for name in sorted(set(wanted) - present):
        raise BundleError("is missing", where=str(path / name), hint="Copy the bundle again")
    for name in sorted(present - set(described.files)):
        raise BundleError(
            "does not belong to the bundle", where=str(path / name), hint="Remove it, or copy the bundle again"
        )
    for name, digest in wanted.items():
        if source.hash(name) != digest:
            raise damaged(path / name)
    weights, release = _tensors(source, WEIGHTS)
    graph = json.loads(source.read(GRAPH))
    where = str(path / GRAPH)
    report = json.loads(source.read(REPORT))
    if described.is_module:
        parts = tuple(_part(part, weights, where) for part in graph["parts"])
        rest = {name.removeprefix("/"): tensor for name, tensor in weights.items() if name.startswith("/")}
        return Bundle(path, described, parts, rest, report, release)
    kept = None
    if REFERENCE_GRAPH in wanted:
        exact = weights | _tensors(source, REFERENCE_WEIGHTS)[0]
        kept = codec.decode(json.loads(source.read(REFERENCE_GRAPH)), exact, str(path / REFERENCE_GRAPH))
    return Bundle(path, described, (_part(graph, weights, where),), {}, report, release, kept)


def _part(data: dict[str, Any], weights: Mapping[str, torch.Tensor], where: str) -> Part:
    path = data.pop("path", "")
    prefix = f"{path}/" if path else ""
    programs = tuple(codec.decode(program, weights, where, prefix) for program in data.pop("programs"))
    return Part(path, data, programs)


def _tensors(source: Source, name: str) -> tuple[dict[str, torch.Tensor], Callable[[torch.Tensor], None]]:
    """The tensors of a file, and what releases one; those of a folder are mapped, not copied into memory."""
    if source.folder is None:
        return load(source.read(name)), lambda tensor: None
    mapped = MappedTensors(source.folder / name)
    return mapped.tensors, mapped.release
