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
from armopt.bundle.source import GRAPH, KEPT, REFERENCE_GRAPH, REFERENCE_WEIGHTS, REPORT, WEIGHTS, Source, damaged
from armopt.errors import BundleError


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle in memory: its manifest, signature, programs, accuracy report, and the FP32 original if it was kept."""

    path: Path
    manifest: manifest.Manifest
    signature: Mapping[str, Any]
    programs: tuple[codec.Program, ...]
    report: Mapping[str, Any]
    reference: codec.Program | None = None


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
    weights = _tensors(source, WEIGHTS)
    graph = json.loads(source.read(GRAPH))
    where = str(path / GRAPH)
    programs = tuple(codec.decode(program, weights, where) for program in graph.pop("programs"))
    kept = None
    if REFERENCE_GRAPH in wanted:
        exact = weights | _tensors(source, REFERENCE_WEIGHTS)
        kept = codec.decode(json.loads(source.read(REFERENCE_GRAPH)), exact, str(path / REFERENCE_GRAPH))
    return Bundle(path, described, graph, programs, json.loads(source.read(REPORT)), kept)


def _tensors(source: Source, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a file; those of a folder are mapped, not copied into memory."""
    found: dict[str, torch.Tensor]
    found = load(source.read(name)) if source.folder is None else load_file(source.folder / name)
    return found
