"""What torch.save wrote: a state dict, or a pickled module, whose reading runs code from the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from armopt import capture
from armopt.capture.files.archive import one_error
from armopt.capture.files.format import TRUST, Content, Format, Options
from armopt.capture.files.modules import build_state, capture_module, checked_state
from armopt.capture.files.pickles import CodeError, load
from armopt.errors import InputError, first_line
from armopt.ir.records import Captured
from armopt.models import torchvision_ops


def _recognises(content: Content) -> bool:
    """A zip file with a pickle in it, or a pickle, as older releases wrote."""
    return "data.pkl" in content.names if content.names is not None else content.head[:1] == b"\x80"


def _open(path: Path, options: Options) -> Captured:
    return capture_module(_load(path, options), options, str(path))


def _load(path: Path, options: Options) -> torch.nn.Module:
    try:
        content = _read(path)
    except CodeError as error:
        return _unpickle(path, options, error)
    return build_state(checked_state(content, path), path, options)


def _read_state(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        content = _read(path)
    except CodeError as error:
        raise InputError(f"holds a pickled object ({error})", where=str(path), hint="Save model.state_dict()") from None
    return checked_state(content, path)


def _read(path: Path) -> Any:
    """What it holds; CodeError where that takes running code."""
    with one_error(str(path), passing=CodeError):
        return load(path)


def _unpickle(path: Path, options: Options, found: CodeError) -> torch.nn.Module:
    if not options.trust_pickle:
        raise InputError(
            f"holds a pickled object ({found}), and unpickling runs code from the file",
            where=str(path),
            hint=f"{TRUST}; better: save a state dict or a .pt2 from torch.export",
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
    return model


FORMAT = Format(_recognises, _open, _read_state, _load)
