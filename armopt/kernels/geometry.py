"""Sizes of convolutions."""

from __future__ import annotations

from collections.abc import Sequence


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
) -> list[int]:
    """Spatial size of a convolution's result; all arguments have one value for each spatial dimension."""
    rows = zip(size, kernel, stride, padding, dilation, output_padding, strict=True)
    if transposed:
        return [(s - 1) * st - 2 * p + d * (k - 1) + o + 1 for s, k, st, p, d, o in rows]
    return [(s + 2 * p - d * (k - 1) - 1) // st + 1 for s, k, st, p, d, _ in rows]
