"""What the readers share: modules with the weights of a state dict, and the inputs that options give."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from armopt import capture
from armopt.capture import inputs
from armopt.capture.dimensions import NO_AXES, Axes, Dimension
from armopt.capture.files.format import Options
from armopt.capture.widening import is_half
from armopt.errors import ArmoptWarning, InputError, first_line
from armopt.ir.records import Captured
from armopt.models import huggingface, references, timm_models, torchvision_inputs
from armopt.models.huggingface import HF, Varying
from armopt.models.timm_models import TIMM

#: Where training scripts keep the weights beside other things, the likeliest first.
_KEPT = ("state_dict", "model_state_dict", "model", "module", "ema", "ema_state_dict", "state_dict_ema")


def capture_state(state: Mapping[str, torch.Tensor], path: Path, options: Options) -> Captured:
    """Captures the model that a reference builds, with the weights of a state dict.

    Raises:
        InputError: There is no reference, the state dict doesn't fit it, or inputs are missing.
        CaptureError: torch.export can't take the model whole.
    """
    return capture_module(build_state(state, path, options), options, str(path))


def build_state(state: Mapping[str, torch.Tensor], path: Path, options: Options) -> torch.nn.Module:
    """The model that a reference builds, with the weights of a state dict.

    Raises:
        InputError: There is no reference, or the state dict doesn't fit it.
    """
    if not options.model:
        raise InputError(
            f"holds a state dict of {len(state)} tensors, which doesn't say what model it is",
            where=str(path),
            hint="Add --model torchvision:NAME, timm:NAME, hf:FOLDER or package.module:factory",
        )
    model = references.resolve(options.model)()
    load_state(model, state, path, options.model)
    return model


def capture_module(model: torch.nn.Module, options: Options, source: str) -> Captured:
    """Captures a module on the inputs that options give, or torchvision's own.

    Raises:
        InputError: Inputs are missing or don't fit.
        CaptureError: torch.export can't take the model whole.
    """
    if not is_half(model):  # which is widened
        capture.check_dtypes(model, source)
    args, kwargs, axes = example_inputs(model, options, source)
    return capture.module(model, args, kwargs, batch=options.batch, axes=axes, source=source)


def checked_state(content: Any, path: Path) -> Mapping[str, torch.Tensor]:
    """The state dict in what a file holds, also further down as training scripts save it: then it is said where.

    Raises:
        InputError: There is none, or more than one.
    """
    found = _find_state(content, path, 4)
    if found is None:
        raise InputError(f"{_described(content)}, not a state dict", where=str(path), hint="Save model.state_dict()")
    keys, state = found
    if keys:
        _remark(path, f"holds more than weights: those under {'.'.join(keys)!r} are taken")
    return state


def _find_state(content: Any, path: Path, deep: int) -> tuple[list[str], Mapping[str, torch.Tensor]] | None:
    """A state dict, and the keys under which it stands."""
    if not isinstance(content, Mapping) or not deep:
        return None
    if _is_state(content):
        return [], content
    for key in _KEPT:
        if (found := _find_state(content.get(key), path, deep - 1)) is not None:
            return [key, *found[0]], found[1]
    others = [str(key) for key, value in content.items() if _is_state(value)]
    if len(others) > 1:
        what = f"holds several state dicts: {_few(others)}"
        raise InputError(what, where=str(path), hint="Save one of them: torch.save(checkpoint[KEY], FILE)")
    return (others, content[others[0]]) if others else None


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())
    )


def _described(content: Any) -> str:
    """What a file holds that is no state dict."""
    kind = type(content).__name__
    if not isinstance(content, Mapping):
        return f"holds a {kind}"
    others = [key for key, value in content.items() if not isinstance(value, torch.Tensor)]
    unnamed = [key for key in content if not isinstance(key, str)]
    if len(others) < len(content) / 2 and (others or unnamed):
        if unnamed:
            return f"holds a {kind} in which {unnamed[0]!r} is no name but a {type(unnamed[0]).__name__}"
        return f"holds a {kind} in which {others[0]!r} is no tensor but a {type(content[others[0]]).__name__}"
    return f"holds a {kind} of {_few([str(key) for key in content])}" if content else f"holds an empty {kind}"


def load_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor], path: Path, reference: str) -> None:
    """Gives a model the weights of a state dict.

    A prefix that their names have, as wrappers of a model put it there, is left out; BF16 and FP16 are widened.

    Raises:
        InputError: They are of other dtypes, or not this model's.
    """
    state = _without_prefix(state, model, path)
    if any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in state.values()):
        _remark(path, "holds weights in half precision: widened to float32, which changes no value")
    expected = model.state_dict()
    for name, tensor in state.items():
        is_lost = tensor.is_complex() and name in expected and not expected[name].is_complex()
        if tensor.dtype in (torch.float64, torch.complex128) or tensor.is_quantized or is_lost:
            raise capture.wrong_dtype(name, tensor.dtype, str(path))
    for name, tensor in state.items():
        if name in expected and expected[name].shape != tensor.shape:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}, {reference} has {tuple(expected[name].shape)}",
                where=str(path),
                hint="Check --model: it names another variant",
            )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        said = _difference(list(expected), list(state)) or first_line(error)
        raise InputError(f"doesn't fit {reference}: it {said}", where=str(path), hint="Check --model") from None


def _difference(expected: Sequence[str], found: Sequence[str]) -> str:
    """Which names a state dict lacks, and which it has beside those expected; empty where it has just these."""
    lacking = [name for name in expected if name not in found]
    foreign = [name for name in found if name not in expected]
    return " and ".join(f"{what} {_few(names)}" for what, names in (("lacks", lacking), ("has also", foreign)) if names)


def _few(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _without_prefix(
    state: Mapping[str, torch.Tensor], model: torch.nn.Module, path: Path
) -> Mapping[str, torch.Tensor]:
    """The state dict by the model's names, where these have one prefix more: ``module.``, ``_orig_mod.``, ``model.``…

    What has none is the wrapper's own, such as its loss, where the prefix leaves nothing of the model out.
    """
    expected = model.state_dict().keys()
    if not expected or expected <= state.keys():
        return state
    first = next(iter(expected))
    for prefix in [name.removesuffix(first) for name in state if name.endswith(f".{first}")]:
        rest = [name for name in state if not name.startswith(prefix)]
        if not rest or all(f"{prefix}{name}" in state for name in expected):
            also = f", and so is what has none: {_few(rest)}" if rest else ""
            _remark(path, f"has the prefix {prefix!r} in {'the' if rest else 'all'} names, which is left out{also}")
            return {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
    return state


def _remark(path: Path, what: str) -> None:
    warnings.warn(f"{path} {what}", ArmoptWarning, stacklevel=2)


def example_inputs(
    model: torch.nn.Module, options: Options, source: str
) -> tuple[tuple[Any, ...], dict[str, torch.Tensor], Axes]:
    """The inputs that options give, or those that the reference's library knows, and which of their dimensions vary.

    Raises:
        InputError: There are none, or they don't fit the model's signature.
    """
    by_position, by_name, open_ended = inputs.parameters(model)
    if options.inputs or options.args or options.samples is not None:
        args, kwargs, axes = arrange_inputs([*by_position, *by_name], options, source, open_ended=open_ended)
        if by_name:  # what forward takes by name only can't be given by position
            surplus = len(args) - len(by_position)
            if surplus > 0:
                kwargs = dict(zip(by_name, args[-surplus:], strict=False)) | kwargs
                args = args[:-surplus]
    elif options.model.startswith(HF):
        args = ()
        kwargs, varying = huggingface.example_inputs(model, options.model)
        axes = _axes_of(varying, options.dims)
    elif options.model.startswith(TIMM):
        args, kwargs, axes = timm_models.example_inputs(model, options.model), {}, NO_AXES
    elif options.model.startswith("torchvision:"):
        args, kwargs, axes = torchvision_inputs.example_inputs(options.model), {}, NO_AXES
    else:
        raise InputError(
            f"needs example inputs (forward takes {', '.join([*by_position, *by_name])})",
            where=source,
            hint="Describe them with --input NAME=1x3x224x224:float32 or give --inputs FILE",
        )
    return args, kwargs, axes


def _axes_of(varying: Sequence[Varying], dims: Mapping[str, Dimension]) -> Axes:
    """The dimensions that a library knows to vary, in the ranges and with the sizes that options give."""

    def dimension(name: str, most: int) -> Dimension:
        given = dims.get(name)
        return Dimension(name, 1, most) if given is None else replace(given, most=given.most or most)

    return {id(each.tensor): {axis: dimension(*named) for axis, named in each.names.items()} for each in varying}


def arrange_inputs(
    names: Sequence[Any], options: Options, source: str, *, open_ended: bool = False
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor], Axes]:
    """The inputs that options give as a call of what takes `names`, and which of their dimensions vary.

    Raises:
        InputError: They don't fit.
    """
    given = inputs.generate(options.inputs, options.dims, options.samples or {})
    positional = [*options.args, *given.positional]
    args, kwargs = inputs.bind([str(n) for n in names], positional, given.named, source, open_ended=open_ended)
    return args, kwargs, {**options.axes, **given.axes}


def images_of(options: Options) -> list[torch.Tensor]:
    """Images of one list, from ``--input 3x480x640`` and ``--inputs``.

    Raises:
        InputError: One is no image.
    """
    given = inputs.generate(options.inputs, options.dims, options.samples or {})
    images = [*given.positional, *given.named.values()]
    for image in images:
        if image.dim() != 3 or image.dtype != torch.float32:
            raise InputError(
                f"an image is {list(image.shape)} {image.dtype}".replace("torch.", ""),
                where=options.model,
                hint="Give each image of the list by itself: --input 3x480x640 --input 3x600x400",
            )
    return [image.abs().clamp(max=1) for image in images]
