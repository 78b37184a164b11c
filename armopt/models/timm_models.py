"""timm's models by name, with random weights, and inputs of the size each was made for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from armopt.errors import InputError, unknown
from armopt.models.torchvision_ops import ensure_torchvision_if_installed

TIMM = "timm:"


def factory(reference: str) -> Callable[[], torch.nn.Module]:
    """What builds the model of ``timm:NAME``; nothing is downloaded.

    Raises:
        InputError: timm is not installed, or has no such model.
    """
    ensure_torchvision_if_installed()
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError:
        raise InputError("needs timm, which is not installed", where=reference, hint="pip install timm") from None
    name = reference.removeprefix(TIMM)
    if not timm.is_model(name):
        known = timm.list_models()
        raise unknown("timm model", name, known, where=reference, said="those of timm.list_models()")
    return lambda: timm.create_model(name, pretrained=False)


def example_inputs(model: Any, reference: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """One image of the size that the model was made for.

    Raises:
        InputError: The model does not say.
    """
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if not size:
        raise InputError(
            "does not say the size of its input", where=reference, hint="Describe it with --input 1x3x224x224:float32"
        )
    return (torch.randn(1, *size, generator=torch.Generator().manual_seed(seed)),)
