"""A model file -> Captured. The kind of a file is found from its content, one function for each kind."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from armopt import capture
from armopt.capture import inputs
from armopt.errors import InputError, first_line
from armopt.ir.records import Captured
from armopt.models import references, torchvision_inputs, torchvision_ops

Kind = Literal["pt2", "torchscript", "torch.save", "safetensors"]


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
    inputs: tuple[inputs.InputOption, ...] = ()
    samples: Mapping[str, torch.Tensor] | None = None
    batch: tuple[int, ...] = ()
    trust_pickle: bool = False


@dataclass(frozen=True, slots=True)
class Divided:
    """A model that is to be captured part by part.

    Attributes:
        module: The model.
        calls: Positional and named inputs to run it on; sizes that differ between them may vary.
        factory: Reference to what builds it: torchvision's is found again at load, another is given then.
    """

    module: torch.nn.Module
    calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
    factory: str = ""


def open_divided(path: Path | None, options: Options) -> Divided:
    """A model to be captured part by part, from a factory and maybe a state dict.

    Raises:
        InputError: There is no factory, the file doesn't fit it, or inputs are missing.
    """
    if not options.model:
        raise InputError(
            'kind "module" needs what builds the model: its Python is no part of a bundle',
            where=str(path),
            hint="Add --model torchvision:NAME or --model package.module:factory",
        )
    model = build(path, options)
    capture.check_dtypes(model, options.model)
    if torchvision_inputs.is_detection(options.model):
        return Divided(model, torchvision_inputs.detection_calls(options.model, _images(options)), options.model)
    args, kwargs = _example(model, options, options.model)
    return Divided(model, ((args, kwargs),), options.model)


def build(path: Path | None, options: Options) -> torch.nn.Module:
    """The model that a reference names, with the weights of a state dict if one is given.

    Raises:
        InputError: The file is no state dict, or doesn't fit.
    """
    model = references.resolve(options.model)()
    if path is not None:
        try:
            content = _read_safetensors(path) if find_kind(path) == "safetensors" else _read_torch_save(path)
        except pickle.UnpicklingError:
            raise InputError("holds a pickled object", where=str(path), hint="Save model.state_dict()") from None
        _load_state(model, _checked_state(content, path), path, options.model)
    return model


def _images(options: Options) -> list[torch.Tensor]:
    """Images of one list, from ``--input 3x480x640`` and ``--inputs``."""
    positional, named = inputs.generate(options.inputs)
    images = [*positional, *named.values(), *(options.samples or {}).values()]
    for image in images:
        if image.dim() != 3 or image.dtype != torch.float32:
            raise InputError(
                f"an image is {list(image.shape)} {image.dtype}".replace("torch.", ""),
                where=options.model,
                hint="Give each image of the list by itself: --input 3x480x640 --input 3x600x400",
            )
    return [image.abs().clamp(max=1) for image in images]


def open_model(path: Path, options: Options) -> Captured:
    """Captures the model in a file.

    Raises:
        InputError: The file is missing, damaged, of an unknown kind, or lacks something that an option gives.
        CaptureError: torch.export can't take the model whole.
    """
    kind = find_kind(path)
    if kind == "pt2":
        return _from_pt2(path, options)
    if kind == "torchscript":
        return _from_torchscript(path, options)
    if kind == "safetensors":
        return _from_state(_read_safetensors(path), path, options)
    return _from_torch_save(path, options)


def find_kind(path: Path) -> Kind:
    """The kind of a model file, from its content.

    Raises:
        InputError: It is missing, damaged, or nothing that armopt reads.
    """
    where = str(path)
    if path.is_dir():
        hint = "It is a bundle already: try armopt inspect" if (path / "manifest.json").is_file() else "Give a file"
        raise InputError("is a folder, not a model file", where=where, hint=hint)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise InputError(
            "there is no such file", where=where, hint="Give the path of a .pt2, .pt or .safetensors file"
        ) from None
    except OSError as error:
        hint = "Check the path and its permissions"
        raise InputError(f"can't be read: {error.strerror}", where=where, hint=hint) from None
    if head[:2] == b"PK":
        return _kind_of_zip(path)
    if len(head) >= 10 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 10**9:
        return "safetensors"  # before pickles: the length of its header may start with their first byte
    if head[:1] == b"\x80":  # a pickle, as torch.save wrote before its zip format
        return "torch.save"
    raise InputError(
        "is no model file that armopt knows" if head else "is empty",
        where=where,
        hint="Known are torch.export's .pt2, TorchScript, torch.save's .pt and .safetensors",
    )


def _kind_of_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(
            f"is truncated or damaged ({error})", where=str(path), hint="Copy or save the model again"
        ) from None
    tails = {name.split("/", 1)[-1] for name in names}
    if "manifest.json" in names and "graph.json" in names:
        raise InputError("is a bundle already", where=str(path), hint="Try armopt inspect")
    if any(tail.startswith("models/") or tail == "serialized_exported_program.json" for tail in tails):
        return "pt2"
    if "constants.pkl" in tails and any(tail.startswith("code/") for tail in tails):
        return "torchscript"
    if "data.pkl" in tails:
        return "torch.save"
    raise InputError(
        "is a zip file without a model in it", where=str(path), hint="Save it with torch.export.save or torch.save"
    )


def _from_pt2(path: Path, options: Options) -> Captured:
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
    args, kwargs = None, None
    if options.inputs or options.samples:
        args, kwargs = _inputs(list(program.graph_signature.user_inputs), options, str(path))
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


def _from_torchscript(path: Path, options: Options) -> Captured:
    torchvision_ops.ensure_torchvision_if_installed()
    if _is_quantized_script(path):
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
    names = [argument.name for argument in script.forward.schema.arguments[1:]]
    if not options.inputs and options.samples is None:
        raise InputError(
            f"is TorchScript, which keeps no example inputs (it takes {', '.join(names)})",
            where=str(path),
            hint="Describe them with --input NAME=1x3x224x224:float32 or give --inputs FILE",
        )
    args, kwargs = _inputs(names, options, str(path))
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
    return capture.exported(program, args, kwargs, source=str(path), signature=names)


def _is_quantized_script(path: Path) -> bool:
    """Whether its code calls quantized operations; loading it would print warnings first."""
    with zipfile.ZipFile(path) as archive:
        code = (name for name in archive.namelist() if name.endswith(".py"))
        return any(b"ops.quantized." in archive.read(name) for name in code)


def _from_torch_save(path: Path, options: Options) -> Captured:
    try:
        content = _read_torch_save(path)
    except pickle.UnpicklingError:
        return _from_pickle(path, options)
    return _from_state(content, path, options)


def _read_torch_save(path: Path) -> Any:
    """What torch.save wrote; UnpicklingError where that takes running code."""
    try:
        with capture.quiet():
            return torch.load(path, weights_only=True, map_location="cpu", mmap=None)
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        raise InputError(
            f"is truncated or damaged: {first_line(error)}", where=str(path), hint="Save the model again"
        ) from error


def _from_pickle(path: Path, options: Options) -> Captured:
    if not options.trust_pickle:
        raise InputError(
            "holds a pickled object, and unpickling runs code from the file",
            where=str(path),
            hint="If you trust it, pass --trust-pickle; better: save a state dict or a .pt2 from torch.export",
        )
    torchvision_ops.ensure_torchvision_if_installed()
    try:
        with capture.quiet():
            model = torch.load(path, weights_only=False, map_location="cpu")
    except (AttributeError, ImportError) as error:
        raise InputError(
            f"its class can't be imported: {first_line(error)}",
            where=str(path),
            hint="Run armopt where the model's package is installed, or save a .pt2 with torch.export",
        ) from error
    except Exception as error:
        raise InputError(
            f"can't be unpickled: {first_line(error)}", where=str(path), hint="Save a .pt2 with torch.export"
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"holds a {type(model).__name__}, not an nn.Module", where=str(path), hint="Save the module itself"
        )
    return _from_module(model, options, str(path))


def _read_safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: Mapping[str, torch.Tensor] = load_file(path)
        return state
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(
            f"is truncated or damaged: {first_line(error)}", where=str(path), hint="Copy it again"
        ) from error


def _checked_state(content: Any, path: Path) -> Mapping[str, torch.Tensor]:
    state = _find_state(content)
    if state is None:
        raise InputError(
            f"holds a {type(content).__name__}, not a state dict", where=str(path), hint="Save model.state_dict()"
        )
    return state


def _from_state(content: Any, path: Path, options: Options) -> Captured:
    state = _checked_state(content, path)
    if not options.model:
        raise InputError(
            f"holds a state dict of {len(state)} tensors, which doesn't say what model it is",
            where=str(path),
            hint="Add --model torchvision:NAME or --model package.module:factory",
        )
    model = references.resolve(options.model)()
    _load_state(model, state, path, options.model)
    return _from_module(model, options, str(path))


def from_reference(options: Options) -> Captured:
    """Captures a model that a reference builds, with the weights that it builds it with."""
    return _from_module(references.resolve(options.model)(), options, options.model)


def _find_state(content: Any) -> Mapping[str, torch.Tensor] | None:
    """A state dict, also one level down as training scripts save it."""
    if not isinstance(content, Mapping):
        return None
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return content
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            return _find_state(content[key])
    return None


def _load_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor], path: Path, reference: str) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise capture.wrong_dtype(name, tensor.dtype, str(path))
        if tensor.is_complex() or tensor.is_quantized:
            raise capture.wrong_dtype(name, tensor.dtype, str(path))
    expected = model.state_dict()
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
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise InputError(
            f"doesn't fit {reference}: {' '.join(lines)[:300]}", where=str(path), hint="Check --model"
        ) from None


def _from_module(model: torch.nn.Module, options: Options, source: str) -> Captured:
    capture.check_dtypes(model, source)
    args, kwargs = _example(model, options, source)
    return capture.module(model, args, kwargs, batch=options.batch, source=source)


def _example(model: torch.nn.Module, options: Options, source: str) -> tuple[tuple[Any, ...], dict[str, torch.Tensor]]:
    """The inputs that options give, or torchvision's own."""
    by_position, by_name, open_ended = inputs.parameters(model)
    if options.inputs or options.samples is not None:
        args, kwargs = _inputs([*by_position, *by_name], options, source, open_ended=open_ended)
        if by_name:  # what forward takes by name only can't be given by position
            surplus = len(args) - len(by_position)
            if surplus > 0:
                kwargs = dict(zip(by_name, args[-surplus:], strict=False)) | kwargs
                args = args[:-surplus]
    elif options.model.startswith("torchvision:"):
        args, kwargs = torchvision_inputs.example_inputs(options.model), {}
    else:
        raise InputError(
            f"needs example inputs (forward takes {', '.join([*by_position, *by_name])})",
            where=source,
            hint="Describe them with --input NAME=1x3x224x224:float32 or give --inputs FILE",
        )
    return args, kwargs


def _inputs(
    names: Sequence[Any], options: Options, source: str, *, open_ended: bool = False
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    positional, named = inputs.generate(options.inputs)
    return inputs.bind(
        [str(n) for n in names], positional, {**named, **(options.samples or {})}, source, open_ended=open_ended
    )
