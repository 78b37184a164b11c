"""Writes a bundle whole or not at all: into a temporary folder beside its place, synced, then renamed."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file

from armopt.bundle import codec, dry_run, graph_file, manifest, schema
from armopt.bundle.files import GRAPH, REFERENCE_GRAPH, REFERENCE_WEIGHTS, WEIGHTS, hash_file, looks_like_bundle
from armopt.bundle.mapped_weights import check_storable
from armopt.bundle.program import Part, Program
from armopt.errors import BundleError, CaptureError, InputError
from armopt.files import check_parent, folder_beside, follow_umask, put, sync


def check_place(path: Path, *, force: bool = False) -> None:
    """Refuses a place that can't take a bundle, before any work is done.

    Raises:
        InputError: The parent is missing or not writable, or something is there already.
    """
    check_parent(path)
    if path.exists():
        if not force:
            raise InputError("is there already", where=str(path), hint="Choose another place, or force it (--force)")
        if not looks_like_bundle(path):
            raise InputError("is there already and is not a bundle", where=str(path), hint="Choose another place")


def write(
    path: Path,
    described: manifest.Manifest,
    parts: Sequence[Part],
    texts: Mapping[str, str],
    *,
    rest: Mapping[str, torch.Tensor] = MappingProxyType({}),
    reference: Program | None = None,
    force: bool = False,
    attach: Callable[[Path], None] | None = None,
) -> manifest.Manifest:
    """Writes a bundle, as a folder or, where `path` ends in .zip, as one file.

    Args:
        path: Where to.
        described: The manifest; its `files` are filled in here.
        parts: The whole model as one, or its submodules that are graphs.
        texts: Other files by name.
        rest: Parameters and buffers of all that is in no part, by their names in the model's state dict.
        reference: The FP32 original, to be kept for `validate`.
        force: Replace a bundle that is there.
        attach: Adds further files to the folder that it is given; graph and weights are there by then.

    Returns:
        The manifest as written.

    Raises:
        CaptureError: A graph holds something that has no form in a bundle.
        InputError: The place can't take it; nothing is left there.
    """
    check_place(path, force=force)
    weights = collect_weights(parts, rest)
    try:
        with folder_beside(path) as folder:
            stored = tuple(_stored(part, weights.names) for part in parts)
            _write(folder / GRAPH, schema.encode(graph_file.Graph(stored, weights.tied)))
            _save(folder / WEIGHTS, weights.tensors)
            if reference is not None:
                exact = _constants([reference])
                others = _collect({name: exact[name] for name in exact.keys() - weights.names.keys()})
                _write(
                    folder / REFERENCE_GRAPH,
                    schema.encode(codec.encode(reference, names={**others.names, **weights.names})),
                )
                _save(folder / REFERENCE_WEIGHTS, others.tensors)
            for name, text in texts.items():
                _write(folder / name, text.encode())
            if attach is not None:
                attach(folder)
            files = {file.name: hash_file(file) for file in sorted(folder.iterdir())}
            complete = replace(described, files=files)
            _write(folder / manifest.NAME, manifest.to_bytes(complete))
            _put(folder, path)
    except OSError as error:
        raise InputError(
            f"can't write the bundle: {error.strerror or error}",
            where=str(path),
            hint="Nothing was left behind. Free some space or choose another place with -o",
        ) from error
    except Exception as error:
        # safetensors reports a full disk in its own way
        if "os error" in str(error).lower() or "No space left" in str(error):
            raise InputError(
                f"can't write the weights: {error}", where=str(path), hint="Nothing was left behind. Free some space"
            ) from error
        raise
    return complete


def _stored(part: Part, names: Mapping[str, str]) -> graph_file.StoredPart:
    programs = tuple(codec.encode(program, part.prefix, names) for program in part.programs)
    for program in part.programs:
        try:
            dry_run.check(program, part.signature, program.bucket, sys.maxsize, part.path)
        except BundleError as error:
            raise CaptureError(f"the graph can't be held in a bundle: {error.what}", where=error.where) from error
    return graph_file.StoredPart(part.path, part.signature, programs)


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})
    follow_umask(path)
    sync(path)


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a bundle, each memory once.

    Attributes:
        tensors: By the name that they are stored by; each is all of a storage of its own.
        names: Every name -> the name that it is stored by: tied weights share one.
    """

    tensors: Mapping[str, torch.Tensor]
    names: Mapping[str, str]

    @property
    def tied(self) -> dict[str, str]:
        """The names among those of the rest that are stored by another name."""
        return {name[1:]: held for name, held in self.names.items() if name.startswith("/") and name != held}


def collect_weights(parts: Sequence[Part], rest: Mapping[str, torch.Tensor] = MappingProxyType({})) -> Weights:
    """The constants of all parts by their names in the bundle, and the tensors of the rest by theirs after ``/``.

    Raises:
        CaptureError: One has no form in a bundle; the message names it.
    """
    weights = {f"{part.prefix}{name}": tensor for part in parts for name, tensor in _constants(part.programs).items()}
    return _collect(weights | {f"/{name}": tensor for name, tensor in rest.items()})


def _collect(named: Mapping[str, torch.Tensor]) -> Weights:
    """Tensors as safetensors takes them: contiguous, and no two of one storage."""
    tensors: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    known: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for name, given in named.items():
        check_storable(given, name)
        tensor = given.detach().resolve_conj().resolve_neg()
        storage, size = tensor.untyped_storage().data_ptr(), tensor.numel() * tensor.element_size()
        memory = (given.data_ptr(), given.is_conj(), given.is_neg(), given.dtype, given.shape, given.stride())
        names[name] = known.setdefault(memory, name) if size else name
        if names[name] != name:
            continue
        view = not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != size or storage in storages
        tensors[name] = tensor.contiguous().clone() if view else tensor
        storages.add(storage)
    return Weights(tensors, names)


def _constants(programs: Sequence[Program]) -> dict[str, torch.Tensor]:
    """The constants of all programs by name, each stored once."""
    weights: dict[str, torch.Tensor] = {}
    for program in programs:
        for own, tensor in program.graph_module.named_buffers():
            name = program.weights.get(own, own)
            held = weights.get(name)
            if held is not None and held.data_ptr() != tensor.data_ptr() and not torch.equal(held, tensor):
                raise AssertionError(f"two programs have different constants called {name}")
            weights[name] = tensor if held is None else held
    return weights


def _put(folder: Path, path: Path) -> None:
    """Moves the finished folder to its place, or one file that holds all of it."""
    if path.suffix != ".zip":
        follow_umask(folder, 0o777)
        put(folder, path)
        return
    files, ready = sorted(folder.iterdir()), folder / path.name
    with zipfile.ZipFile(ready, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            archive.write(file, file.name)
    sync(ready)
    put(ready, path)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)


def to_json(value: Any) -> str:
    """JSON for people: sorted and indented."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
