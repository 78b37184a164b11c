"""Writes a bundle whole or not at all: into a temporary folder beside its place, synced, then renamed."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from armopt.bundle import codec, manifest
from armopt.bundle.files import GRAPH, REFERENCE_GRAPH, REFERENCE_WEIGHTS, WEIGHTS, hash_file, looks_like_bundle
from armopt.bundle.program import Program
from armopt.errors import InputError
from armopt.files import check_parent, folder_beside, put, sync
from armopt.ir import nesting


def check_place(path: Path, *, force: bool = False) -> None:
    """Refuses a place that can't take a bundle, before any work is done.

    Raises:
        InputError: The parent is missing or not writable, or something is there already.
    """
    check_parent(path)
    if path.exists():
        if not force:
            raise InputError("is there already", where=str(path), hint="Choose another place with -o, or pass --force")
        if not looks_like_bundle(path):
            raise InputError(
                "is there already and is not a bundle", where=str(path), hint="Choose another place with -o"
            )


def write(
    path: Path,
    described: manifest.Manifest,
    programs: Sequence[Program],
    texts: Mapping[str, str],
    signature: Mapping[str, nesting.Structure],
    *,
    reference: Program | None = None,
    force: bool = False,
    attach: Callable[[Path], None] | None = None,
) -> manifest.Manifest:
    """Writes a bundle, as a folder or, where `path` ends in .zip, as one file.

    Args:
        path: Where to.
        described: The manifest; its `files` are filled in here.
        programs: One for each bucket.
        texts: Other files by name.
        signature: ``inputs``, ``outputs`` and ``specs`` of the model.
        reference: The FP32 original, to be kept for `validate`.
        force: Replace a bundle that is there.
        attach: Adds further files to the folder that it is given; graph and weights are there by then.

    Returns:
        The manifest as written.

    Raises:
        InputError: The place can't take it; nothing is left there.
    """
    graph = {**signature, "programs": [codec.encode(program) for program in programs]}
    weights = collect_weights(programs)
    return _write(path, described, graph, weights, texts, reference=reference, force=force, attach=attach)


@dataclass(frozen=True, slots=True)
class Part:
    """A submodule as graphs: its path in the model, its programs, and its signature as :func:`write` takes it."""

    path: str
    programs: Sequence[Program]
    signature: Mapping[str, nesting.Structure]


def write_parts(
    path: Path,
    described: manifest.Manifest,
    parts: Sequence[Part],
    rest: Mapping[str, torch.Tensor],
    texts: Mapping[str, str],
    *,
    force: bool = False,
) -> manifest.Manifest:
    """Writes a bundle of kind "module": some submodules as graphs; the model's Python stays where it is.

    Args:
        path: Where to.
        described: The manifest; its `files` are filled in here.
        parts: The submodules.
        rest: Parameters and buffers of all else, by their names in the model's state dict.
        texts: Other files by name.
        force: Replace a bundle that is there.

    Raises:
        InputError: The place can't take it; nothing is left there.
    """
    graph = {
        "parts": [
            {
                "path": part.path,
                **part.signature,
                "programs": [codec.encode(program, f"{part.path}/") for program in part.programs],
            }
            for part in parts
        ]
    }
    return _write(path, described, graph, collect_part_weights(parts, rest), texts, force=force)


def collect_part_weights(parts: Sequence[Part], rest: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The constants of all parts, by their path and name, and the tensors of the rest, by their name after ``/``."""
    weights = {
        f"{part.path}/{name}": tensor for part in parts for name, tensor in collect_weights(part.programs).items()
    }
    return weights | {f"/{name}": _storable(tensor) for name, tensor in rest.items()}


def _write(
    path: Path,
    described: manifest.Manifest,
    graph: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    texts: Mapping[str, str],
    *,
    reference: Program | None = None,
    force: bool,
    attach: Callable[[Path], None] | None = None,
) -> manifest.Manifest:
    check_place(path, force=force)
    try:
        with folder_beside(path) as folder:
            # not sorted: the order of fields is part of what the model takes and returns
            _write_text(folder / GRAPH, json.dumps(graph, allow_nan=False) + "\n")
            _save(folder / WEIGHTS, weights)
            if reference is not None:
                _write_text(folder / REFERENCE_GRAPH, json.dumps(codec.encode(reference), allow_nan=False) + "\n")
                exact = collect_weights([reference])
                _save(folder / REFERENCE_WEIGHTS, {name: exact[name] for name in exact.keys() - weights.keys()})
            for name, text in texts.items():
                _write_text(folder / name, text)
            if attach is not None:
                attach(folder)
            files = {file.name: hash_file(file) for file in sorted(folder.iterdir())}
            complete = replace(described, files=files)
            (folder / manifest.NAME).write_bytes(manifest.to_bytes(complete))
            sync(folder / manifest.NAME)
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


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})
    sync(path)


def collect_weights(programs: Sequence[Program]) -> dict[str, torch.Tensor]:
    """The constants of all programs by name, each stored once."""
    weights: dict[str, torch.Tensor] = {}
    for program in programs:
        for name, tensor in program.graph_module.named_buffers():
            held = weights.get(name)
            if held is not None and held.data_ptr() != tensor.data_ptr() and not torch.equal(held, tensor):
                raise AssertionError(f"two programs have different constants called {name}")
            weights[name] = tensor if held is None else held
    return {name: _storable(tensor) for name, tensor in weights.items()}


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().clone() if _shares(tensor) else tensor.detach()


def _shares(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a part of a larger storage or not contiguous: safetensors takes neither."""
    return not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _put(folder: Path, path: Path) -> None:
    """Moves the finished folder to its place; a bundle that is there is only dropped afterwards."""
    folder.chmod(0o755)
    if path.suffix != ".zip":
        put(folder, path)
        return
    ready = folder.with_name(folder.name + ".zip")
    try:
        with zipfile.ZipFile(ready, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, file.name)
        sync(ready)
        put(ready, path)
    finally:
        ready.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)


def to_json(value: Any) -> str:
    """JSON for people: sorted and indented."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
