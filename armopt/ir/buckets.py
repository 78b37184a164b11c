"""Sizes at which plans are made, and the one that a real size belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from armopt.ir.records import Bucket

_Planned = TypeVar("_Planned")


def distance(bucket: Bucket, values: Mapping[str, int]) -> float:
    """How far sizes are from a bucket: the sum of the logarithms of their ratios."""
    return sum(abs(math.log(max(1, values[name]) / max(1, size))) for name, size in bucket.items() if name in values)


def nearest(planned: Iterable[tuple[Bucket, _Planned]], values: Mapping[str, int]) -> _Planned:
    """What was planned for the bucket nearest to these sizes, by ratio."""
    return min(planned, key=lambda entry: distance(entry[0], values))[1]


def round_up(sizes: Sequence[int]) -> tuple[int, ...]:
    """The bucket of sizes: each up to a power of two."""
    return tuple(1 << max(0, size - 1).bit_length() for size in sizes)
