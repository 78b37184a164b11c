"""Packed weights that the programs of a bundle, or of a process, share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Protocol

import torch


class Packings(Protocol):
    """One weight packed by one kernel: pairs of the shape that it was packed for and the packed tensor."""

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]: ...

    def append(self, entry: tuple[tuple[int, ...], torch.Tensor], /) -> None:
        """Adds one more."""


class PackedWeights(Protocol):
    """Packed weights by kernel, weight and geometry, or by layout; what is not there yet is an empty list."""

    def __getitem__(self, key: tuple[Any, ...], /) -> Packings: ...


def nothing() -> PackedWeights:
    """Where nothing is packed yet."""
    found: defaultdict[tuple[Any, ...], list[tuple[tuple[int, ...], torch.Tensor]]] = defaultdict(list)
    return found
