"""What a format of model files is, and what of a file tells it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from armopt.errors import InputError

if TYPE_CHECKING:  # help lists formats without importing torch
    import torch

    from armopt.capture.inputs import InputOption
    from armopt.ir.records import Captured


@dataclass(frozen=True, slots=True)
class Options:
    """What a file alone doesn't say.

    Attributes:
        model: Reference to the class or factory that a state dict belongs to.
        inputs: ``--input`` options.
        samples: Named tensors from ``--inputs``.
        batch: Sizes of the first dimension to plan for.
        trust_pickle: Whether unpickling may run code.
    """

    model: str = ""
    inputs: tuple[InputOption, ...] = ()
    samples: Mapping[str, torch.Tensor] | None = None
    batch: tuple[int, ...] = ()
    trust_pickle: bool = False


@dataclass(frozen=True, slots=True)
class Content:
    """What tells a file's format.

    Attributes:
        head: Its first 16 bytes.
        names: Of a zip file: what is in it, without the folder that holds all of it; None of another file.
    """

    head: bytes
    names: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """A format of model files.

    Attributes:
        recognises: Whether a file has it; the first format in the table that says so is taken.
        open: Captures the model in a file. Raises InputError where the file is damaged or lacks what an option gives,
            CaptureError where torch.export can't take the model whole.
        read_state: Reads a file as a state dict; None for a format that holds whole models alone.
        load: The model in a file, to be run as it is; None for a format that holds state dicts alone.
    """

    recognises: Callable[[Content], bool]
    open: Callable[[Path, Options], Captured]
    read_state: Callable[[Path], Mapping[str, torch.Tensor]] | None = None
    load: Callable[[Path, Options], torch.nn.Module | torch.export.ExportedProgram] | None = None


def look_into(path: Path) -> Content:
    """What of a file tells its format.

    Raises:
        InputError: It is missing, a folder, a bundle or a damaged zip file.
    """
    where = str(path)
    if path.is_dir():
        hint = "It is a bundle already: try armopt inspect" if (path / "manifest.json").is_file() else "Give a file"
        raise InputError("is a folder, not a model file", where=where, hint=hint)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise InputError("there is no such file", where=where, hint="Give the path of a model file") from None
    except OSError as error:
        hint = "Check the path and its permissions"
        raise InputError(f"can't be read: {error.strerror}", where=where, hint=hint) from None
    return Content(head, _names_in_zip(path) if head[:2] == b"PK" else None)


def _names_in_zip(path: Path) -> frozenset[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(
            f"is truncated or damaged ({error})", where=str(path), hint="Copy or save the model again"
        ) from None
    if {"manifest.json", "graph.json"} <= set(names):
        raise InputError("is a bundle already", where=str(path), hint="Try armopt inspect")
    return frozenset(name.split("/", 1)[-1] for name in names)
