"""Calls in pieces of one number of rows, so that what comes of a row depends on no other row that came with it.

A product of other sizes may sum in another order. So every run has as many rows as any other, the last one is filled
up, and the same primitives do the same work for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

#: What the rows of a batch are called.
BATCH = "batch"


def run_in_pieces(
    run: Callable[..., Sequence[Any]], tensors: Sequence[torch.Tensor], batched: Sequence[bool], rows: int
) -> list[torch.Tensor]:
    """The flat outputs of a graph for any number of rows, from runs of so many.

    Args:
        run: The graph: takes flat tensors, returns flat tensors whose first dimension is the batch.
        tensors: Flat inputs.
        batched: Of which of them the first dimension is the batch.
        rows: Of one run.
    """
    count = next(tensor.shape[0] for tensor, each in zip(tensors, batched, strict=True) if each)
    results = []
    for start in range(0, max(1, count), rows):
        piece = [_filled(x, start, rows) if each else x for x, each in zip(tensors, batched, strict=True)]
        found = run(*piece)
        results.append([y[: count - start] for y in found])
    return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*results, strict=True)]


def _filled(tensor: torch.Tensor, start: int, rows: int) -> torch.Tensor:
    """A piece of a tensor's rows; where there are too few, the last one again, whose values suit the model."""
    piece = tensor[start : start + rows]
    if piece.shape[0] in (0, rows):
        return piece
    return torch.cat([piece, piece[-1:].expand(rows - piece.shape[0], *piece.shape[1:])])
