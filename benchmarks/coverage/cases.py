"""A model of the lists: what it is called, and how it is built and called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

#: Positional and named inputs of one call.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Sample:
    """A model with seeded random weights, and calls of it.

    Attributes:
        model: In eval mode.
        calls: The first is what is measured; a second one shows which sizes vary, where a model is taken in parts.
        detects: Whether it returns detections, of which a list has as many as there happen to be.
        generates: Options of ``generate``; empty where the model is called itself.
    """

    model: torch.nn.Module
    calls: tuple[Call, ...]
    detects: bool = False
    generates: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the page.

    Attributes:
        section: Whose model it is: a heading of the page.
        family: What it stands for within that.
        name: As the library calls it.
        build: Makes it, in the process that measures it.
        parameters: How many it has, where that is known: giants are measured last.
    """

    section: str
    family: str
    name: str
    build: Callable[[], Sample]
    parameters: int = 0
