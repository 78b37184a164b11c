"""TorchScript: a graph without example inputs, converted with fixed shapes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from armopt import capture
from armopt.capture import dimensions
from armopt.capture.calls import Args, Kwargs
from armopt.capture.dimensions import NO_AXES, Axes
from armopt.capture.files import script_code, scripts
from armopt.capture.files.archive import Archive, one_error
from armopt.capture.files.format import TRUST, Content, Format, Options
from armopt.capture.files.modules import arrange_inputs
from armopt.capture.widening import is_half
from armopt.errors import ArmoptError, InputError
from armopt.ir.records import Captured
from armopt.models import torchvision_ops


def _recognises(content: Content) -> bool:
    names = content.names or ()
    return "constants.pkl" in names and any(name.startswith("code/") for name in names)


def _open(path: Path, options: Options) -> Captured:
    script = _load(path, options)
    names = _names(script, str(path))
    if not options.inputs and options.samples is None and not options.args:
        raise InputError(
            f"is TorchScript, which keeps no example inputs (it takes {', '.join(names)})",
            where=str(path),
            hint="Describe them with --input NAME=1x3x224x224:float32 or give --inputs FILE",
        )
    args, kwargs, axes = arrange_inputs(names, options, str(path))

    def look(graph: Any) -> None:
        _look(lambda: script_code.check_graph(graph), path, options)

    return capture_script(script, args, kwargs, batch=options.batch, axes=axes, source=str(path), look=look)


def capture_script(
    script: torch.jit.ScriptModule,
    args: Args,
    kwargs: Kwargs,
    *,
    batch: Sequence[int] = (),
    axes: Axes = NO_AXES,
    source: str = "TorchScript",
    look: Callable[[Any], None] = lambda graph: None,
) -> Captured:
    """Captures TorchScript, with the sizes of the example inputs.

    Args:
        script: Left as it was.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        batch: At most one size of the first dimension.
        axes: Refused where there are any.
        source: What to call it in messages.
        look: Told of each graph before it runs; raises where that may not be.

    Raises:
        InputError: It can't be converted, does not take the inputs, or more than one size is asked for.
    """
    if batch[1:] or axes:
        what = "TorchScript converts with fixed shapes"
        raise InputError(what, where=source, hint="Give one size with --batch, and numbers alone with --input")
    if batch:
        args, kwargs, _ = dimensions.resized(args, kwargs, NO_AXES, batch[0])
    if not is_half(script):  # which is widened
        capture.check_dtypes(script, source)
    names = _names(script, source)
    args, kwargs = _by_position(names, args, kwargs)
    hint = "Give the original model's state dict with --model, or a .pt2 from torch.export"
    converting = "TorchScript can't be converted"
    with one_error(source, converting, hint, passing=ArmoptError), capture.eval_mode(script), torch.no_grad():
        look(script.inlined_graph)
        capture.try_once(script, args, kwargs, source)
        with capture.quiet():
            program = _convert(script, args, kwargs, look)
    with one_error(source, "can't be captured", hint, passing=ArmoptError):
        return capture.exported(program, args, kwargs, source=source, signature=names, original=script)


def _names(script: torch.jit.ScriptModule, source: str) -> list[str]:
    with one_error(source, "TorchScript can't load it", "Save it again with this torch"):
        forward: Any = script.forward
        return [argument.name for argument in forward.schema.arguments[1:]]


def _by_position(names: Sequence[str], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """The call with named arguments moved to their positions, up to the first position that has none."""
    given, named = list(args), dict(kwargs)
    for name in names[len(given) :]:
        if name not in named:
            break
        given.append(named.pop(name))
    return tuple(given), named


def _convert(script: Any, args: Args, kwargs: Kwargs, look: Callable[[Any], None]) -> torch.export.ExportedProgram:
    from torch._export.converter import TS2EPConverter

    converter = TS2EPConverter(script, args, dict(kwargs))
    look(converter.ts_graph)
    # the converter leaves sizes open that it has no proof for: exported once more, they are the example's
    return torch.export.export(converter.convert().module(), tuple(args), dict(kwargs), strict=False)


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
    return script


def _look(at: Callable[[], None], path: Path, options: Options) -> bool:
    """Whether a file is shown to be harmless. If it is not, and is not trusted either, that is an error."""
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
