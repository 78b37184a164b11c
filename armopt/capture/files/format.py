"""What a format of model files is, and what of a file tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from armopt.errors import InputError

if TYPE_CHECKING:  # help lists formats without importing torch
    import torch

    from armopt.capture.dimensions import Axes, Dimension
    from armopt.capture.inputs import InputOption
    from armopt.ir.records import Captured

#: What to do about a file that can't be shown to be harmless.
TRUST = "If you trust it, pass --trust-pickle (in Python: armopt.TrustedFile(path))"


@dataclass(frozen=True, slots=True)
class Options:
    """What a file alone doesn't say.

    Attributes:
        model: Reference to the class or factory that a state dict belongs to.
        inputs: ``--input`` options.
        samples: Named tensors from ``--inputs``.
        args: Example inputs by position, from Python.
        axes: Which of their dimensions vary.
        batch: Sizes of the first dimension to plan for.
        dims: Dimensions that vary, by the names that shapes of inputs have for them.
        trust_pickle: Whether reading may run code of the file.
    """

    model: str = ""
    inputs: tuple[InputOption, ...] = ()
    samples: Mapping[str, torch.Tensor] | None = None
    args: tuple[Any, ...] = ()
    axes: Axes = field(default_factory=dict)
    batch: tuple[int, ...] = ()
    dims: Mapping[str, Dimension] = field(default_factory=dict)
    trust_pickle: bool = False


@dataclass(frozen=True, slots=True)
class TrustedFile:
    """A model file that may run code as it is read: ``--trust-pickle`` of the command line."""

    path: str | Path


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
        InputError: It is missing, no regular file, a bundle or a damaged zip file.
    """
    where = str(path)
    if path.is_dir():
        hint = "It is a bundle already: try armopt inspect" if (path / "manifest.json").is_file() else "Give a file"
        raise InputError("is a folder, not a model file", where=where, hint=hint)
    check_file(path, "Give the path of a model file")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        hint = "Check the path and its permissions"
        raise InputError(f"can't be read: {error.strerror}", where=where, hint=hint) from None
    return Content(head, _names_in_zip(path) if head[:2] == b"PK" else None)


def check_file(path: Path, hint: str) -> None:
    """Refuses what isn't there, and pipes and devices, which may have no end.

    Raises:
        InputError: It is no regular file.
    """
    if not path.exists():
        raise InputError("there is no such file", where=str(path), hint=hint)
    if not path.is_file():
        raise InputError("is no regular file", where=str(path), hint=hint)


def _names_in_zip(path: Path) -> frozenset[str]:
    from armopt.capture.files.archive import Archive, one_error

    with one_error(str(path)), Archive.opened(path) as archive:
        names = archive.names
    if {"manifest.json", "graph.json"} <= names:
        raise InputError("is a bundle already", where=str(path), hint="Try armopt inspect")
    return names
