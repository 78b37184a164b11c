"""The table of formats of model files, and a file as a captured model. One file for each format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from armopt.capture.files.format import Content, Format, Options, look_into
from armopt.errors import InputError
from armopt.tables import Line, Table

if TYPE_CHECKING:
    import torch

    from armopt.ir.records import Captured

#: In the order in which they are asked: a pickle's first byte may be one of the length that a .safetensors begins with.
FORMATS: Table[Format] = Table(
    "format",
    Line("pt2", "armopt.capture.files.pt2:FORMAT", "torch.export's .pt2"),
    Line("torchscript", "armopt.capture.files.torchscript:FORMAT", "TorchScript"),
    Line("safetensors", "armopt.capture.files.safetensors:FORMAT", ".safetensors (a state dict)"),
    Line("shards", "armopt.capture.files.shards:FORMAT", "model.safetensors.index.json (a state dict in shards)"),
    Line("torch.save", "armopt.capture.files.torch_save:FORMAT", "torch.save's .pt (a state dict or a pickled module)"),
)

__all__ = [
    "FORMATS",
    "Content",
    "Divided",
    "Format",
    "Options",
    "build",
    "find_kind",
    "from_reference",
    "load",
    "open_divided",
    "open_model",
]


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


def find_kind(path: Path) -> str:
    """The format of a model file, from its content.

    Raises:
        InputError: It is missing, damaged, or nothing that armopt reads.
    """
    content = look_into(path)
    for name, each in FORMATS.items():
        if each.recognises(content):
            return name
    if content.names is not None:
        raise InputError(
            "is a zip file without a model in it", where=str(path), hint="Save it with torch.export.save or torch.save"
        )
    what = "is no model file that armopt knows" if content.head else "is empty"
    raise InputError(what, where=str(path), hint=f"Known are {FORMATS.help()}")


def open_model(path: Path, options: Options) -> Captured:
    """Captures the model in a file.

    Raises:
        InputError: The file is missing, damaged, of an unknown format, or lacks something that an option gives.
        CaptureError: torch.export can't take the model whole.
    """
    from armopt.models import huggingface

    if huggingface.is_folder(path):
        return from_reference(as_reference(path, options))
    return FORMATS[find_kind(path)].open(path, options)


def as_reference(path: Path, options: Options) -> Options:
    """The options for a Hugging Face folder, which says itself what builds the model.

    Raises:
        InputError: They name another model.
    """
    from armopt.models.huggingface import HF

    if options.model:
        what = "is a Hugging Face folder, whose config.json says what model it is"
        raise InputError(what, where=str(path), hint=f"Leave out --model {options.model}")
    return replace(options, model=f"{HF}{path}")


def load(path: Path, options: Options) -> torch.nn.Module | torch.export.ExportedProgram:
    """The model in a file, to be run as its user runs it.

    Raises:
        InputError: The file is missing, damaged, of an unknown format, or lacks something that an option gives.
    """
    from armopt.capture.files.modules import build_state
    from armopt.models import huggingface, references

    if huggingface.is_folder(path):
        return references.resolve(as_reference(path, options).model)()
    kind = FORMATS[find_kind(path)]
    if kind.load is not None:
        return kind.load(path, options)
    if kind.read_state is None:
        raise InputError("holds no model that runs by itself", where=str(path), hint="Save it with torch.export.save")
    return build_state(kind.read_state(path), path, options)


def from_reference(options: Options) -> Captured:
    """Captures a model that a reference builds, with the weights that it builds it with.

    Raises:
        InputError: There is no such model, or inputs are missing.
        CaptureError: torch.export can't take the model whole.
    """
    from armopt.capture.files.modules import capture_module
    from armopt.models import references

    return capture_module(references.resolve(options.model)(), options, options.model)


def build(path: Path | None, options: Options) -> torch.nn.Module:
    """The model that a reference names, with the weights of a state dict if one is given.

    Raises:
        InputError: The file is no state dict, or doesn't fit.
    """
    from armopt.capture.files.modules import load_state
    from armopt.models import references

    model = references.resolve(options.model)()
    if path is not None:
        kind = find_kind(path)
        read_state = FORMATS[kind].read_state
        if read_state is None:
            raise InputError(f"is of format {kind}, no state dict", where=str(path), hint="Save model.state_dict()")
        load_state(model, read_state(path), path, options.model)
    return model


def open_divided(path: Path | None, options: Options) -> Divided:
    """A model to be captured part by part, from a factory and maybe a state dict.

    Raises:
        InputError: There is no factory, the file doesn't fit it, or inputs are missing.
    """
    from armopt import capture
    from armopt.capture.files import modules
    from armopt.capture.widening import is_half
    from armopt.models import torchvision_inputs

    if not options.model:
        raise InputError(
            'kind "module" needs what builds the model: its Python is no part of a bundle',
            where=str(path),
            hint="Add --model torchvision:NAME or --model package.module:factory",
        )
    model = build(path, options)
    if not is_half(model):  # whose parts are widened
        capture.check_dtypes(model, options.model)
    if torchvision_inputs.is_detection(options.model):
        calls = torchvision_inputs.detection_calls(options.model, modules.images_of(options))
        return Divided(model, calls, options.model)
    args, kwargs, _ = modules.example_inputs(model, options, options.model)
    return Divided(model, ((args, kwargs),), options.model)
