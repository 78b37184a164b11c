"""A .safetensors file: a state dict."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from armopt.capture.files.archive import one_error
from armopt.capture.files.format import Content, Format, Options
from armopt.capture.files.modules import capture_state, checked_state
from armopt.ir.records import Captured


def _recognises(content: Content) -> bool:
    """By the length of its JSON header, and that header's first character."""
    head = content.head
    return len(head) >= 10 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 10**9


def _open(path: Path, options: Options) -> Captured:
    return capture_state(_read_state(path), path, options)


def _read_state(path: Path) -> Mapping[str, torch.Tensor]:
    with one_error(str(path), hint="Copy it again"):
        return checked_state(load_file(path), path)


FORMAT = Format(_recognises, _open, _read_state)
