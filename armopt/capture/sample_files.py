"""Files of example inputs: the table of their kinds by suffix, and reading one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from armopt.capture.files.format import check_file
from armopt.errors import InputError, first_line
from armopt.tables import Line, Table

if TYPE_CHECKING:  # help lists suffixes without importing torch
    import torch


def _read_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _read_npz(path: Path) -> Any:
    from armopt.capture.files import arrays

    return arrays.load_npz(path)


def _read_pt(path: Path) -> Any:
    from armopt.capture.files import pickles

    return pickles.load(path)


#: By suffix: what reads a file as tensors by name, or as one tensor.
SAMPLE_FILES: Table[Callable[[Path], Any]] = Table(
    "kind of file",
    Line(".safetensors", _read_safetensors),
    Line(".npz", _read_npz),
    Line(".pt", _read_pt),
    Line(".pth", _read_pt),
)


def read(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors from a file of one of these kinds, without running any pickled code.

    Raises:
        InputError: The file is missing, damaged, of another kind, or holds something else.
    """
    import torch

    where, hint = str(path), f"Give a {SAMPLE_FILES.help()} file with one tensor for each input"
    check_file(path, hint)
    if path.suffix not in SAMPLE_FILES:
        raise InputError(f"unknown kind of file {path.suffix!r}", where=where, hint=hint)
    try:
        found = SAMPLE_FILES[path.suffix](path)
    except Exception as error:
        raise InputError(f"can't be read: {first_line(error)}", where=where, hint=hint) from error
    if isinstance(found, torch.Tensor):
        found = {"": found}
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise InputError("holds something other than named tensors", where=where, hint=hint)
    if not found:
        raise InputError("holds no tensors", where=where, hint=hint)
    return dict(found)
