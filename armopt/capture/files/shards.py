"""A state dict in several .safetensors files, and the index that says which tensor stands in which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from armopt.capture.files.archive import one_error
from armopt.capture.files.format import Content, Format, Options, check_file
from armopt.capture.files.modules import capture_state
from armopt.errors import ArmoptError, InputError
from armopt.ir.records import Captured

_HINT = "Give the index that save_pretrained wrote, beside its .safetensors files"


def _recognises(content: Content) -> bool:
    """By the first character of its JSON; a .safetensors is asked for first."""
    return content.head.lstrip()[:1] == b"{"


def _open(path: Path, options: Options) -> Captured:
    return capture_state(_read_state(path), path, options)


def _read_state(path: Path) -> Mapping[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    with one_error(str(path), hint="Copy it again", passing=ArmoptError):
        for name, keys in _files(path).items():
            place = path.parent / name
            check_file(place, f"{path.name} names it: copy it as well")
            with one_error(str(place), hint="Copy it again", passing=ArmoptError), safe_open(place, "pt") as file:
                missing = keys - set(file.keys())
                if missing:
                    raise InputError(f"lacks {min(missing)}", where=str(place), hint=f"{path.name} says it is there")
                state |= {key: file.get_tensor(key) for key in sorted(keys)}
    return state


def _files(path: Path) -> dict[str, set[str]]:
    """The names of the files, which stand in the index's own folder, and the tensors of each.

    Raises:
        InputError: It is no index.
    """
    try:
        index: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise InputError("is no JSON", where=str(path), hint=_HINT) from None
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise InputError("is JSON without a weight_map", where=str(path), hint=_HINT)
    files: dict[str, set[str]] = {}
    for key, name in placed.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"names {name!r}, no .safetensors beside it", where=str(path), hint=_HINT)
        files.setdefault(name, set()).add(key)
    return files


FORMAT = Format(_recognises, _open, _read_state)
