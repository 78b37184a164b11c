"""What builds a model, by reference: ``torchvision:resnet50`` or ``package.module:factory``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, Literal

from torch import nn

from armopt.errors import InputError
from armopt.models import huggingface, timm_models
from armopt.models.huggingface import HF
from armopt.models.timm_models import TIMM
from armopt.models.torchvision_ops import ensure_torchvision, ensure_torchvision_if_installed

#: Builds a model; called without arguments.
ModelFactory = Callable[[], nn.Module]


Kind = Literal["classification", "segmentation", "detection", "video", "quantization", "optical_flow"]
TORCHVISION = "torchvision:"
_FORMS = "Give torchvision:NAME (say torchvision:resnet50), timm:NAME, hf:FOLDER or package.module:factory"


def resolve(reference: str) -> ModelFactory:
    """Find what builds a model.

    Args:
        reference: ``torchvision:NAME``, a name from ``torchvision.models.list_models()``, or ``timm:NAME``, built
            with random weights; ``hf:FOLDER``, which save_pretrained wrote; or ``package.module:factory``, something
            called without arguments that returns an ``nn.Module``. The module is looked for in the current folder too.

    Returns:
        A function that builds the model; it raises InputError where the factory fails or returns none.

    Raises:
        InputError: The reference names nothing that exists.
    """
    if reference.startswith(TORCHVISION):
        return _torchvision_factory(reference)
    if reference.startswith(TIMM):
        return checked(timm_models.factory(reference), reference)
    if reference.startswith(HF):
        return checked(partial(huggingface.build, reference), reference)
    module_name, colon, attribute = reference.partition(":")
    if not colon or not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError("not a reference to a model", where=repr(reference), hint=_FORMS)
    ensure_torchvision_if_installed()
    target: object = _import_user_module(module_name, reference)
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise InputError(
                f"no {name!r} in {getattr(target, '__name__', type(target).__name__)}",
                where=reference,
                hint=suggest(name, [known for known in dir(target) if not known.startswith("_")], _FORMS),
            )
        target = getattr(target, name)
    return checked(target, reference)


def _torchvision_factory(reference: str) -> ModelFactory:
    ensure_torchvision()
    models = importlib.import_module("torchvision.models")
    name = reference.removeprefix(TORCHVISION).lower()
    known = models.list_models()
    if name not in known:
        raise InputError(
            f"torchvision has no model {name!r}",
            where=reference,
            hint=suggest(name, known, "torchvision.models.list_models() lists them all"),
        )
    options: dict[str, Any] = {"weights": None}
    if kind_of(name) in ("detection", "segmentation"):
        options["weights_backbone"] = None  # its default downloads
    if "googlenet" in name or "inception" in name:
        options["init_weights"] = True  # leaving it out warns
    return checked(lambda: models.get_model(name, **options), reference)


def _import_user_module(name: str, reference: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # and it stays: a factory may import its neighbours when it is called
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise InputError(
                f"no module {missing!r}",
                where=reference,
                hint=f"Install it in this environment, or run from the folder that holds it (now {here})",
            ) from error
        raise InputError(
            f"{name} needs the module {missing!r}, which is not installed",
            where=reference,
            hint="Install it in this environment",
        ) from error
    except Exception as error:
        raise InputError(
            f"importing {name} raised {type(error).__name__}: {error}",
            where=reference,
            hint=f"Try it alone: python -c 'import {name}'",
        ) from error


def checked(target: object, reference: str) -> ModelFactory:
    """`target` as a factory whose failures name the reference.

    Raises:
        InputError: It can't be called.
    """
    if isinstance(target, nn.Module):  # a ready model is callable too, but calling it would run it
        model = target
        return lambda: model
    if not callable(target):
        raise InputError(
            f"a {type(target).__name__} is not a factory",
            where=reference,
            hint="Name a function or an nn.Module class that takes no arguments",
        )
    build = target

    def factory() -> nn.Module:
        try:
            model = build()
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the factory raised {type(error).__name__}: {error}",
                where=reference,
                hint="It is called without arguments; wrap it in a function that gives it what it needs",
            ) from error
        if not isinstance(model, nn.Module):
            raise InputError(
                f"the factory returned a {type(model).__name__}, not an nn.Module",
                where=reference,
                hint="Let it return the model itself",
            )
        return model

    return factory


def suggest(name: str, known: Sequence[str], otherwise: str) -> str:
    """A hint at the names that are close to a wrong one; `otherwise` where none is."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"Did you mean {' or '.join(close)}?" if close else otherwise


def kind_of(name: str) -> Kind:
    """What a torchvision model does, by the module that builds it."""
    models = importlib.import_module("torchvision.models")
    module = str(models.get_model_builder(name).__module__)
    kinds: tuple[Kind, ...] = ("segmentation", "detection", "video", "quantization", "optical_flow")
    return next((kind for kind in kinds if f".{kind}." in module), "classification")
