"""TorchScript: a graph without example inputs, converted with fixed shapes."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from armopt import capture
from armopt.capture.files.format import Content, Format, Options
from armopt.capture.files.modules import arrange_inputs
from armopt.errors import InputError, first_line
from armopt.ir.records import Captured
from armopt.models import torchvision_ops


def _recognises(content: Content) -> bool:
    names = content.names or ()
    return "constants.pkl" in names and any(name.startswith("code/") for name in names)


def _open(path: Path, options: Options) -> Captured:
    script = _load(path)
    names = [argument.name for argument in script.forward.schema.arguments[1:]]
    if not options.inputs and options.samples is None:
        raise InputError(
            f"is TorchScript, which keeps no example inputs (it takes {', '.join(names)})",
            where=str(path),
            hint="Describe them with --input NAME=1x3x224x224:float32 or give --inputs FILE",
        )
    args, kwargs = arrange_inputs(names, options, str(path))
    if options.batch[1:]:
        raise InputError("TorchScript converts with fixed shapes", where=str(path), hint="Give one size with --batch")
    if options.batch:
        args, kwargs = capture.resize_batch_of(args, kwargs, options.batch[0])
    try:
        from torch._export.converter import TS2EPConverter

        with torch.no_grad(), capture.quiet():
            program = TS2EPConverter(script.eval(), args, kwargs).convert()
    except Exception as error:
        raise InputError(
            f"TorchScript can't be converted: {first_line(error)}",
            where=str(path),
            hint="Give the original model's state dict with --model, or a .pt2 from torch.export",
        ) from error
    return capture.exported(program, args, kwargs, source=str(path), signature=names, original=script)


def _load(path: Path) -> Any:
    torchvision_ops.ensure_torchvision_if_installed()
    if _is_quantized(path):
        raise InputError("the model is quantized (int8)", where=str(path), hint="Give the FP32 model")
    try:
        script: Any = torch.jit.load(  # type: ignore[no-untyped-call]
            path, map_location="cpu"
        )
    except Exception as error:
        raise InputError(
            f"TorchScript can't load it: {first_line(error)}", where=str(path), hint="Save it again with this torch"
        ) from error
    capture.check_dtypes(script, str(path))
    return script


def _is_quantized(path: Path) -> bool:
    """Whether its code calls quantized operations; loading it would print warnings first."""
    with zipfile.ZipFile(path) as archive:
        code = (name for name in archive.namelist() if name.endswith(".py"))
        return any(b"ops.quantized." in archive.read(name) for name in code)


FORMAT = Format(_recognises, _open, load=lambda path, options: _load(path))
