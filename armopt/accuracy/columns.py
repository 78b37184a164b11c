"""Errors that a large common value hides: every column and channel less its own mean.

Boxes near 1000 that are off by one have a cosine similarity of 1.000000: nearly all of their norm is the 1000.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

#: Columns of fewer values are judged together: of a few values some spread by next to nothing.
_FEWEST = 8
#: A column whose values spread by less than this, relative to their size, is constant but for FP32's own rounding.
_CONSTANT = 2.0**-20


@dataclass(frozen=True, slots=True)
class Column:
    """One column or channel: its cosine similarity less its mean, and where it is; no place for the whole."""

    cosine: float
    place: str


def worst(reference: torch.Tensor, found: torch.Tensor) -> Column | None:
    """The column or channel that agrees least, once the reference's mean is taken from both sides.

    Columns are the indices of the last dimension, channels those of dimension 1; the whole tensor counts as one too.

    Args:
        reference: FP64, of any shape.
        found: FP64, of the same shape.

    Returns:
        The worst; None where no column varies.
    """
    both = torch.isfinite(reference) & torch.isfinite(found)
    if not bool(both.all()):
        zero = torch.zeros((), dtype=torch.float64)
        reference, found = torch.where(both, reference, zero), torch.where(both, found, zero)
    return min(_columns(reference, found, both), key=lambda column: column.cosine, default=None)


def _columns(a: torch.Tensor, b: torch.Tensor, counted: torch.Tensor) -> Iterator[Column]:
    """The worst of the whole, of each column and of each channel. What does not count is zero on both sides."""
    sides, last = (a, b, counted), a.dim() - 1
    if (whole := _worst_row(*(side.reshape(1, -1) for side in sides))) is not None:
        yield Column(whole[0], "")
    for dimension in sorted({1, last}):
        if not 1 <= dimension <= last or a.shape[dimension] < 2:
            continue
        if (column := _worst_row(*(side.movedim(dimension, 0).flatten(1) for side in sides))) is not None:
            cosine, row = column
            yield Column(cosine, "" if row is None else f"[..., {row}]" if dimension == last else f"[:, {row}]")


def _worst_row(a: torch.Tensor, b: torch.Tensor, counted: torch.Tensor) -> tuple[float, int | None] | None:
    """The least similarity of any row less its mean, and that row; None for all rows together."""
    counts = counted.sum(1, keepdim=True)
    mean = a.sum(1, keepdim=True) / counts.clamp_min(1)
    left, right = (torch.where(counted, side - mean, torch.zeros_like(side)) for side in (a, b))
    spread, size = left.norm(dim=1), a.norm(dim=1)
    if a.shape[1] < _FEWEST:
        if a.shape[1] < 2 or float(spread.norm()) <= _CONSTANT * float(size.norm()):
            return None
        return _similarity(left.flatten(), right.flatten()), None
    varies = spread > _CONSTANT * size
    if not bool(varies.any()):
        return None
    norms = spread * right.norm(dim=1)
    cosines = torch.where(norms > 0, (left * right).sum(1) / norms, torch.zeros_like(norms))
    cosines = torch.where(varies, cosines, torch.full_like(cosines, math.inf))
    row = int(cosines.argmin())
    return min(1.0, float(cosines[row])), row


def _similarity(a: torch.Tensor, b: torch.Tensor) -> float:
    norms = float(a.norm()) * float(b.norm())
    return min(1.0, float(a @ b) / norms) if norms else 0.0
