"""torch.export's .pt2: a graph with its example inputs and dynamic shapes."""

from __future__ import annotations

from pathlib import Path

import torch

from armopt import capture
from armopt.capture.files.format import Content, Format, Options
from armopt.capture.files.modules import arrange_inputs
from armopt.errors import InputError, first_line
from armopt.ir.records import Captured
from armopt.models import torchvision_ops


def _recognises(content: Content) -> bool:
    names = content.names or ()
    return any(name.startswith("models/") or name == "serialized_exported_program.json" for name in names)


def _open(path: Path, options: Options) -> Captured:
    program = _load(path)
    args, kwargs = None, None
    if options.inputs or options.samples:
        args, kwargs = arrange_inputs(list(program.graph_signature.user_inputs), options, str(path))
    captured = capture.exported(program, args, kwargs, source=str(path))
    if options.batch and not captured.symbols:
        held = [spec.shape[0] for spec in captured.input_specs if spec.shape]
        if list(options.batch) != held[:1]:
            raise InputError(
                "its shapes are fixed, so --batch can't change them",
                where=str(path),
                hint="Export it with dynamic_shapes, or leave --batch out",
            )
    return captured


def _load(path: Path) -> torch.export.ExportedProgram:
    torchvision_ops.ensure_torchvision_if_installed()
    try:
        with capture.quiet():
            program = torch.export.load(path)
    except Exception as error:
        raise InputError(
            f"torch.export can't load it: {first_line(error)}", where=str(path), hint="Export it again with this torch"
        ) from error
    for name, tensor in program.state_dict.items():
        if isinstance(tensor, torch.nn.Parameter) and tensor.dtype != torch.float32:
            raise capture.wrong_dtype(name, tensor.dtype, str(path))
    return program


FORMAT = Format(_recognises, _open, load=lambda path, options: _load(path))
