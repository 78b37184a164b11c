"""TorchScript: a graph without example inputs, converted with fixed shapes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from armopt import capture
from armopt.capture.files import script_code, scripts
from armopt.capture.files.archive import Archive, one_error
from armopt.capture.files.format import TRUST, Content, Format, Options
from armopt.capture.files.modules import arrange_inputs
from armopt.errors import ArmoptError, InputError
from armopt.ir.records import Captured
from armopt.models import torchvision_ops


def _recognises(content: Content) -> bool:
    names = content.names or ()
    return "constants.pkl" in names and any(name.startswith("code/") for name in names)


def _open(path: Path, options: Options) -> Captured:
    script = _load(path, options)
    with one_error(str(path), "TorchScript can't load it", "Save it again with this torch"):
        names = [argument.name for argument in script.forward.schema.arguments[1:]]
    if not options.inputs and options.samples is None:
        raise InputError(
            f"is TorchScript, which keeps no example inputs (it takes {', '.join(names)})",
            where=str(path),
            hint="Describe them with --input NAME=1x3x224x224:float32 or give --inputs FILE",
        )
    args, kwargs, axes = arrange_inputs(names, options, str(path))
    if options.batch[1:] or axes:
        raise InputError("TorchScript converts with fixed shapes", where=str(path), hint="Give one size with --batch")
    if options.batch:
        args, kwargs = capture.resize_batch_of(args, kwargs, options.batch[0])
    hint = "Give the original model's state dict with --model, or a .pt2 from torch.export"
    with one_error(str(path), "TorchScript can't be converted", hint, passing=ArmoptError):
        program = _convert(script, args, kwargs, path, options)
    with one_error(str(path), "can't be captured", hint, passing=ArmoptError):
        return capture.exported(program, args, kwargs, source=str(path), signature=names, original=script)


def _convert(script: Any, args: Any, kwargs: Any, path: Path, options: Options) -> torch.export.ExportedProgram:
    from torch._export.converter import TS2EPConverter

    with torch.no_grad(), capture.quiet():
        _look(lambda: script_code.check_graph(script.inlined_graph), path, options)
        converter = TS2EPConverter(script.eval(), args, kwargs)
        _look(lambda: script_code.check_graph(converter.ts_graph), path, options)
        return converter.convert()


def _load(path: Path, options: Options) -> Any:
    torchvision_ops.ensure_torchvision_if_installed()
    hint = "Save it again with this torch"
    with (
        one_error(str(path), "TorchScript can't load it", hint),
        Archive.opened(path) as archive,
        tempfile.TemporaryDirectory() as folder,
    ):
        if _is_quantized(archive):
            raise InputError("the model is quantized (int8)", where=str(path), hint="Give the FP32 model")
        written = Path(folder, "model.pt")
        harmless = _look(lambda: scripts.rewritten(archive, written), path, options)
        script: Any = torch.jit.load(  # type: ignore[no-untyped-call]
            written if harmless else path, map_location="cpu"
        )
    capture.check_dtypes(script, str(path))
    return script


def _look(at: Callable[[], None], path: Path, options: Options) -> bool:
    """Whether what is looked at can be shown to be harmless; an error where not and the file is not trusted."""
    try:
        at()
    except script_code.UnshownError as error:
        if options.trust_pickle:
            return False
        raise InputError(
            f"holds what may run code as it is read: {error}",
            where=str(path),
            hint=f"{TRUST}; better: a state dict, or a .pt2 from torch.export",
        ) from None
    return True


def _is_quantized(archive: Archive) -> bool:
    """Whether its code calls quantized operations; loading it would print warnings first."""
    return any(b"ops.quantized." in archive.read(name) for name in archive.names if name.endswith(".py"))


FORMAT = Format(_recognises, _open, load=_load)
