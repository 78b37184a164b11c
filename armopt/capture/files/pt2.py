"""torch.export's .pt2: a graph with its example inputs and dynamic shapes."""

from __future__ import annotations

from pathlib import Path

import torch

from armopt import capture
from armopt.capture.dimensions import NO_AXES
from armopt.capture.files.archive import Archive, one_error
from armopt.capture.files.format import TRUST, Content, Format, Options
from armopt.capture.files.modules import arrange_inputs
from armopt.capture.files.pt2_reader import Exported, UnshownError, read
from armopt.errors import ArmoptError, InputError
from armopt.ir.records import Captured
from armopt.models import torchvision_ops


def _recognises(content: Content) -> bool:
    names = content.names or ()
    return any(name.startswith("models/") or name == "serialized_exported_program.json" for name in names)


def _open(path: Path, options: Options) -> Captured:
    held = _load(path, options)
    args, kwargs, axes = held.args, held.kwargs, NO_AXES
    if options.inputs or options.args or options.samples:
        args, kwargs, axes = arrange_inputs(list(held.program.graph_signature.user_inputs), options, str(path))
    with one_error(str(path), "can't be captured", "Export it again with this torch", passing=ArmoptError):
        captured = capture.exported(held.program, args, kwargs, source=str(path), axes=axes)
    if options.batch and not captured.symbols:
        sizes = [spec.shape[0] for spec in captured.input_specs if spec.shape]
        if list(options.batch) != sizes[:1]:
            raise InputError(
                "its shapes are fixed, so --batch can't change them",
                where=str(path),
                hint="Export it with dynamic_shapes, or leave --batch out",
            )
    return captured


def _load(path: Path, options: Options) -> Exported:
    torchvision_ops.ensure_torchvision_if_installed()
    with one_error(str(path), "torch.export can't load it", "Export it again with this torch"), capture.quiet():
        try:
            with Archive.opened(path) as archive:
                held = read(archive)
        except UnshownError as error:
            held = _trusted(path, options, error)
    return held


def _trusted(path: Path, options: Options, found: UnshownError) -> Exported:
    """What torch makes of the file, whatever that runs."""
    if not options.trust_pickle:
        raise InputError(
            f"holds what may run code as it is read: {found}",
            where=str(path),
            hint=f"{TRUST}; better: export it again with this torch",
        )
    program = torch.export.load(path)
    return Exported(program, *(program.example_inputs or (None, None)))


FORMAT = Format(_recognises, _open, load=lambda path, options: _load(path, options).program)
