"""Folders that Hugging Face's save_pretrained writes: the model that config.json names, and inputs for it."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from armopt.errors import ArmoptError, InputError, first_line
from armopt.models.torchvision_ops import ensure_torchvision_if_installed

HF = "hf:"
CONFIG = "config.json"
#: Positions of these begin behind the padding's.
_SHIFTED = ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "data2vec-text", "xmod", "ibert", "esm")
#: The longest text that is taken where a configuration says nothing, and the length that is planned for.
_LONGEST, _USUAL = 4096, 128
#: Samples of a second of sound.
_RATE = 16_000


@dataclass(frozen=True, slots=True)
class Varying:
    """A tensor of an example, its dimensions that vary by number, and the largest size of each."""

    tensor: torch.Tensor
    names: Mapping[int, tuple[str, int]]


def is_folder(path: Path) -> bool:
    """Whether a folder holds such a model."""
    return (path / CONFIG).is_file() and not (path / "manifest.json").exists()


def build(reference: str) -> torch.nn.Module:
    """The model of ``hf:FOLDER`` in eval mode; nothing is downloaded.

    Raises:
        InputError: It is no such folder, needs code of its own, or its weights don't fit.
    """
    folder = Path(reference.removeprefix(HF))
    described = _described(folder)
    if kernels := next(_foreign_kernels(described), ""):
        what = f"asks for the kernels {kernels!r}, which are code from elsewhere"
        raise InputError(what, where=str(folder / CONFIG), hint="Remove that entry")
    transformers = _transformers(reference)
    names = described.get("architectures") or []
    kind = next((found for name in names if (found := _class(transformers, str(name))) is not None), None)
    if kind is None:
        own = "auto_map" in described
        said = (
            f"names the class {names[0]!r}, which transformers {transformers.__version__} lacks"
            if names
            else "names no class"
        )
        hint = (
            "Its code is in the folder, which armopt does not run: give --model package.module:factory"
            if own
            else "Save it with save_pretrained, or give --model package.module:factory"
        )
        raise InputError(said, where=str(folder / CONFIG), hint=hint)
    try:
        with _without_bars(transformers):
            model: torch.nn.Module = kind.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,  # the other format is a pickle
            ).eval()
    except ArmoptError:
        raise
    except Exception as error:
        raise InputError(
            f"transformers can't load it: {first_line(error)}",
            where=str(_damaged(folder) or folder),
            hint="It needs config.json, and model.safetensors or shards and their index: save_pretrained writes them",
        ) from error
    return model


def _damaged(folder: Path) -> Path | None:
    """The first file of weights that can't be opened, which transformers does not name."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except Exception:
            return path
    return None


def _foreign_kernels(described: Any, names_them: bool = False) -> Iterator[str]:
    """Kernels by the name of a repository, at any depth of a configuration: transformers would fetch and run them.

    An entry whose key ends in ``_implementation`` names kernels, or holds names for each part of the model.
    """
    if isinstance(described, dict):
        for key, value in described.items():
            yield from _foreign_kernels(value, names_them or str(key).endswith("_implementation"))
    elif isinstance(described, list):
        for value in described:
            yield from _foreign_kernels(value, names_them)
    elif names_them and isinstance(described, str) and "/" in described:
        yield described


@contextlib.contextmanager
def without_cache(model: torch.nn.Module) -> Iterator[None]:
    """Switches off the caches of transformers' modules in a model, for a while: no bundle returns one."""
    on = switch_caches_off(model)
    try:
        yield
    finally:
        for config in on:
            config.use_cache = True


def leave_caches_off(model: torch.nn.Module) -> None:
    """Switches them off for good, in configurations that this model has for itself: others may share them by now."""
    own: dict[int, Any] = {}
    for part in model.modules():
        if "config" in part.__dict__ and next(_configs(part), None) is not None:
            part.__dict__["config"] = copy.deepcopy(part.__dict__["config"], own)
    switch_caches_off(model)


def switch_caches_off(model: torch.nn.Module) -> list[Any]:
    """Switches off the caches of transformers' modules in a model; returns the configurations that had them on."""
    on = [config for part in model.modules() for config in _configs(part) if getattr(config, "use_cache", False)]
    for config in on:
        config.use_cache = False
    return on


def _configs(part: torch.nn.Module) -> Iterator[Any]:
    """The configuration of one of transformers' modules, and those inside it."""
    if any(base.__module__.startswith("transformers.") for base in type(part).__mro__):
        config = getattr(part, "config", None)
        yield from (config, *(getattr(config, name, None) for name in ("decoder", "encoder", "text_config")))


def example_inputs(model: Any, reference: str, seed: int = 0) -> tuple[dict[str, torch.Tensor], list[Varying]]:
    """Named inputs, and which of their dimensions vary.

    A text model gets ids and a mask, whose length varies; an encoder-decoder ids of the decoder too; a vision model
    pixels of its processor's size, in as many frames as a video has; a model on sound its spectrogram, or a second at
    16 kHz.

    Raises:
        InputError: It takes something else.
    """
    generator = torch.Generator().manual_seed(seed)
    folder, config = Path(reference.removeprefix(HF)), model.config
    taken = set(inspect.signature(model.forward).parameters)
    wanted = {"input_ids", "pixel_values"} & taken
    given: dict[str, torch.Tensor] = {}
    varying: list[Varying] = []
    main = model.main_input_name
    if main not in wanted:
        shape = _sound(main, config)
        if shape is None:
            hint = f"Describe its inputs: --input {main}=SHAPE:float32, such as 1x80x3000, and others that it takes"
            raise InputError(f"its main input is {main}, for which armopt knows no example", where=reference, hint=hint)
        given[main] = torch.randn(1, *shape, generator=generator)
        if config.is_encoder_decoder and "decoder_input_ids" in taken:
            given["decoder_input_ids"] = torch.randint(0, config.vocab_size, (1, 4), generator=generator)
            varying.append(Varying(given["decoder_input_ids"], {1: ("decoder_tokens", _longest_target(config))}))
    if "input_ids" in wanted:
        text = config.get_text_config()
        longest = _longest(text)
        length = min(_USUAL, longest)
        given["input_ids"] = torch.randint(0, text.vocab_size, (1, length), generator=generator)
        names = {"input_ids": "tokens"}
        if "attention_mask" in taken:
            given["attention_mask"] = torch.ones(1, length, dtype=torch.int64)
            names["attention_mask"] = "tokens"
        if config.is_encoder_decoder and "decoder_input_ids" in taken:
            given["decoder_input_ids"] = torch.randint(
                0, text.vocab_size, (1, max(2, length // 4)), generator=generator
            )
            names["decoder_input_ids"] = "decoder_tokens"
        varying += [Varying(given[name], {1: (dimension, longest)}) for name, dimension in names.items()]
    if "pixel_values" in wanted:
        vision = getattr(config, "vision_config", config)
        height, width = _size(folder, vision)
        channels = getattr(vision, "num_channels", 3)
        frames = getattr(vision, "num_frames", None)
        shape = (channels, height, width) if frames is None else (frames, channels, height, width)
        given["pixel_values"] = torch.randn(1, *shape, generator=generator)
    return given, varying


def _sound(name: str, config: Any) -> tuple[int, ...] | None:
    """The shape of one input of a model on sound; None where it is none that armopt knows."""
    bins = getattr(config, "num_mel_bins", None)
    if name == "input_features" and bins and (positions := getattr(config, "max_source_positions", None)):
        return bins, 2 * positions
    if name == "input_values":
        return (config.max_length, bins) if bins and hasattr(config, "max_length") else (_RATE,)
    return None


def _longest_target(config: Any) -> int:
    """The most tokens that a decoder gives."""
    return max(2, int(getattr(config, "max_target_positions", None) or _LONGEST))


def _longest(config: Any) -> int:
    """The most tokens of a text model."""
    most = next(
        (n for key in ("max_position_embeddings", "n_positions") if (n := getattr(config, key, None))), _LONGEST
    )
    if config.model_type in _SHIFTED:
        most -= (config.pad_token_id or 0) + 1
    return max(2, int(most))


def _size(folder: Path, config: Any) -> tuple[int, int]:
    """Height and width of images: the processor's, else the configuration's."""
    file = folder / "preprocessor_config.json"
    described = _read(file) if file.is_file() else {}
    for found in (described.get("crop_size"), described.get("size"), getattr(config, "image_size", None)):
        if isinstance(found, dict):
            found = found.get("height", found.get("shortest_edge")), found.get("width", found.get("shortest_edge"))
        sides = found if isinstance(found, (list, tuple)) else (found, found)
        if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
            return sides[0], sides[1]
    return 224, 224


def _described(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError("there is no such folder", where=str(folder), hint="Give one that save_pretrained wrote")
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"holds no {CONFIG}",
            where=str(folder),
            hint="Give a folder that save_pretrained wrote; nothing is downloaded",
        )
    return _read(folder / CONFIG)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"can't be read: {first_line(error)}", where=str(path), hint="Copy it again") from None
    if not isinstance(found, dict):
        raise InputError("is no JSON object", where=str(path), hint="Copy it again")
    return found


@contextlib.contextmanager
def _without_bars(transformers: Any) -> Iterator[None]:
    """Keeps transformers' bars of progress from the terminal, where armopt has its own."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _class(transformers: Any, name: str) -> Any:
    """A model's class of transformers' own; None where there is none."""
    if not name.isidentifier():
        return None
    found = getattr(transformers, name, None)
    return found if hasattr(found, "from_pretrained") and hasattr(found, "forward") else None


def _transformers(reference: str) -> Any:
    ensure_torchvision_if_installed()
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise InputError(
            "needs transformers, which is not installed", where=reference, hint="pip install transformers"
        ) from None
