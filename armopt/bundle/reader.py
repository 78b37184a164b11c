"""Reads a bundle; every file's hash is checked before its content is used."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from armopt import environment
from armopt.bundle import codec, dry_run, graph_file, legacy, manifest, schema
from armopt.bundle.files import GRAPH, KEPT, REFERENCE_GRAPH, REFERENCE_WEIGHTS, WEIGHTS, BundleFiles, damaged
from armopt.bundle.mapped_weights import MappedTensors
from armopt.bundle.program import Part, Program
from armopt.errors import BundleError, InputError
from armopt.ir.pieces import BATCH


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle in memory.

    Attributes:
        path: Where it was read from.
        manifest: What it says of itself.
        parts: The whole model as one, or the submodules that are graphs.
        rest: Where Python runs between parts: all other parameters and buffers, by name.
        copy: A stored weight in memory of its own, which no change of the file reaches; what was copied last time
            and lives still is not copied again. One of a zip is in memory already.
        check_unchanged: Raises BundleError where the file of weights was written to since it was opened.
        reference: The FP32 original, if it was kept.
    """

    path: Path
    manifest: manifest.Manifest
    parts: tuple[Part, ...]
    rest: Mapping[str, torch.Tensor]
    copy: Callable[[torch.Tensor], torch.Tensor]
    check_unchanged: Callable[[], None]
    reference: Program | None = None

    @property
    def programs(self) -> tuple[Program, ...]:
        """Those of all parts."""
        return tuple(program for part in self.parts for program in part.programs)

    @property
    def whole(self) -> Part:
        """The one graph that is all of the model.

        Raises:
            BundleError: There is none: its graphs are submodules.
        """
        if self.manifest.is_module:
            raise BundleError(
                'is of kind "module": its graphs are submodules, and Python runs between them',
                where=str(self.path),
                hint="See docs/bundle.md for what can be done with it",
            )
        return self.parts[0]


def read(path: Path | str, *, reference: bool = False) -> Bundle:
    """Reads a bundle.

    Args:
        path: The bundle, a folder or a zip.
        reference: Whether to read the FP32 original too, where the bundle keeps one and its files were not left out on
            the way. Otherwise they are not opened.

    Raises:
        BundleError: A file is missing, extra or changed, or a graph is not what it says; the message names it.
    """
    path = Path(path)
    while True:
        with BundleFiles(path) as stored:
            try:
                return _read(path, stored, reference=reference)
            except InputError:
                if stored.is_still_there():
                    raise
                # another bundle took its place, and this one is being removed: that one is read


def _read(path: Path, stored: BundleFiles, *, reference: bool) -> Bundle:
    described = manifest.from_bytes(stored.read(manifest.NAME), path / manifest.NAME)
    present = stored.names() - {manifest.NAME}
    with_reference = reference and bool(KEPT & present)
    wanted = {name: digest for name, digest in described.files.items() if with_reference or name not in KEPT}
    _check_files(stored, path, described, wanted, present)
    weights, copy, check_unchanged = _tensors(stored, WEIGHTS)
    where = str(path / GRAPH)
    graph = _graph(stored.read(GRAPH), described, where)
    parts = tuple(_part(part, weights, where) for part in graph.parts)
    _check_parts(described, parts, where)
    most = environment.memory_for_process()
    parts = tuple(_dry_run(part, most, where) for part in parts)
    rest = {name.removeprefix("/"): tensor for name, tensor in weights.items() if name.startswith("/")}
    rest |= _tied(graph.tied, weights, where)
    kept = None
    if REFERENCE_GRAPH in wanted:
        exact = weights | _tensors(stored, REFERENCE_WEIGHTS)[0]
        place = str(path / REFERENCE_GRAPH)
        kept = codec.decode(_reference(stored.read(REFERENCE_GRAPH), described, place), exact, place)
        dry_run.check(kept, parts[0].signature, parts[0].programs[0].bucket, most, place)
    stored.check_unchanged()
    return Bundle(path, described, parts, rest, copy, check_unchanged, kept)


def _dry_run(part: Part, most: int, where: str) -> Part:
    """A part whose programs run, with the sizes of their results."""
    checked = [(each, dry_run.check(each, part.signature, each.bucket, most, where)) for each in part.programs]
    is_fixed = not part.signature.symbols
    programs = (replace(program, results=results, is_fixed=is_fixed) for program, results in checked)
    return replace(part, programs=tuple(programs))


def _tied(tied: Mapping[str, str], weights: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """The tensors that are stored by the name of another."""
    for name, held in tied.items():
        if held not in weights or f"/{name}" in weights:
            what = f"{name} is tied to {held}, which is no weight, or stored by its own name too"
            raise BundleError(what, where=where, hint="Make the bundle again")
    return {name: weights[held] for name, held in tied.items()}


def _check_files(
    stored: BundleFiles, path: Path, described: manifest.Manifest, wanted: Mapping[str, str], present: Set[str]
) -> None:
    """Refuses a bundle whose files are not those that were written.

    Raises:
        BundleError: Naming the file.
    """
    for name in sorted(set(wanted) - present):
        raise BundleError("is missing", where=str(path / name), hint="Copy the bundle again")
    for name in sorted(present - set(described.files)):
        raise BundleError(
            "does not belong to the bundle", where=str(path / name), hint="Remove it, or copy the bundle again"
        )
    for name, digest in wanted.items():
        if stored.hash(name) != digest:
            raise damaged(path / name)


def _graph(data: bytes, described: manifest.Manifest, where: str) -> graph_file.Graph:
    if described.schema_version == manifest.SCHEMA_VERSION:
        return schema.decode(data, graph_file.Graph, where)
    return schema.convert(legacy.graph(_loads(data, where), where), graph_file.Graph, where)


def _reference(data: bytes, described: manifest.Manifest, where: str) -> graph_file.StoredProgram:
    if described.schema_version == manifest.SCHEMA_VERSION:
        return schema.decode(data, graph_file.StoredProgram, where)
    return schema.convert(legacy.program(_loads(data, where), where), graph_file.StoredProgram, where)


def _loads(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"is no JSON: {error}", where=where, hint="Copy the bundle again") from None


def _part(stored: graph_file.StoredPart, weights: Mapping[str, torch.Tensor], where: str) -> Part:
    part = Part(stored.path, (), stored.signature)
    programs = tuple(codec.decode(program, weights, where, part.prefix) for program in stored.programs)
    return replace(part, programs=programs)


def _check_parts(described: manifest.Manifest, parts: Sequence[Part], where: str) -> None:
    """Refuses graphs that are not those of the manifest, or do not take and return what they say.

    Raises:
        BundleError: Naming the part.
    """
    said = [(plan.part, plan.bucket) for plan in described.plan]
    held = [(part.path, program.bucket) for part in parts for program in part.programs]
    if said != held or len(parts) != len(described.model.parts):
        raise BundleError("has other graphs than the manifest's plan", where=where, hint="Make the bundle again")
    for part, taken in zip(parts, described.model.parts, strict=True):
        inputs = [(spec.name, spec.shape, spec.dtype) for spec in taken.inputs]
        signature = part.signature
        if part.path != taken.path or inputs != [(spec.name, spec.shape, spec.dtype) for spec in signature.specs]:
            raise BundleError("takes other inputs than the manifest says", where=where, hint="Make the bundle again")
        most = max(signature.outputs.positions, default=-1)
        for program in part.programs:
            _check_rows(signature.rows, program, f"{where}: {part.path}")
            graph = program.graph_module.graph
            results: Any = graph.output_node().args[0]
            if len(graph.find_nodes(op="placeholder")) != len(inputs) or len(results) <= most:
                what = "takes or returns another number of tensors than its signature says"
                raise BundleError(what, where=f"{where}: {part.path}", hint="Make the bundle again")


def _check_rows(rows: int, program: Program, where: str) -> None:
    """Refuses a number of rows of one run that the program is not planned, and was not tried, for."""
    if rows and rows != program.bucket.get(BATCH):
        what = f"runs {rows} rows at a time, for which it has no program"
        raise BundleError(what, where=where, hint="Make the bundle again")


def _loaded(data: bytes, where: str) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load(data)
        return tensors
    except Exception as error:  # whatever a wrong file makes safetensors say
        raise BundleError(f"is no file of tensors: {error!r}", where=where, hint="Make the bundle again") from error


def _tensors(
    stored: BundleFiles, name: str
) -> tuple[dict[str, torch.Tensor], Callable[[torch.Tensor], torch.Tensor], Callable[[], None]]:
    """The tensors of a file, what copies one, and what notices a change; those of a folder are mapped."""
    if stored.folder is None:
        return _loaded(stored.read_tensors(name), name), lambda tensor: tensor, lambda: None
    mapped = MappedTensors(stored.folder / name, stored.open(name), stored.stamp(name))
    return mapped.tensors, mapped.copy, mapped.check_unchanged
