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
class Bundle:
    """A bundle in memory: its manifest, signature, programs and accuracy report."""

    path: Path
    manifest: manifest.Manifest
    signature: Mapping[str, Any]
    programs: tuple[codec.Program, ...]
    report: Mapping[str, Any]


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
    programs = tuple(codec.decode(program, weights, where) for program in graph.pop("programs"))
    return Bundle(path, described, graph, programs, json.loads(source.read(REPORT)))


def _tensors(source: Source) -> dict[str, torch.Tensor]:
    """The weights; those of a folder are mapped, not copied into memory."""
    found: dict[str, torch.Tensor]
    found = load(source.read(WEIGHTS)) if source.folder is None else load_file(source.folder / WEIGHTS)
    return found
