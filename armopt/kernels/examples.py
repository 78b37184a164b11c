"""Layers on which kernels are compared with their portable twins on emulated cores (tests/arm64/test_rounding.py).

The Compute Library splits K where it exceeds 340 (SVE of 256 bits, 24 columns) or 680 (NEON, 12 columns), evenly: sizes
are around those.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """A Linear, or a convolution that is alike in each of its dimensions.

    Attributes:
        shape: Of the input: [M, K], or [batch, channels, *size].
        outputs: Output features or channels.
        filters: Size of the filter; empty for a Linear.
        stride: Of a convolution, for each spatial dimension.
        padding: Of a convolution, for each spatial dimension.
        dilation: Of a convolution, for each spatial dimension.
        groups: Of a convolution.
        bias: Whether there is one.
        post_op: What is fused behind it.
    """

    shape: tuple[int, ...]
    outputs: int
    filters: tuple[int, ...] = ()
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    bias: bool = True
    post_op: str = "none"


def linear(*sizes: tuple[int, int, int]) -> tuple[Example, ...]:
    """Linears of M rows, K terms and N outputs."""
    return tuple(Example((m, k), n) for m, k, n in sizes)


#: Linears that multiply in BF16.
FAST_LINEAR = linear((64, 64, 64), (64, 684, 33), (8, 4096, 64), (128, 100, 3), (9, 1376, 1000))

STEM = Example((1, 3, 32, 32), 32, (7, 7), stride=2, padding=3)
FEW_CHANNELS = Example((1, 3, 16, 16), 16, (3, 3), padding=1)
WIDE_FILTER = Example((1, 3, 16, 16), 64, (5, 5), padding=2)
MIDDLE = Example((1, 64, 8, 8), 64, (3, 3), padding=1)
STRIDED = Example((1, 16, 12, 12), 33, (5, 5), stride=2, padding=2)
ONE_ROW_OF_TAPS = Example((1, 64, 5, 12), 40, (1, 5), padding=2)
#: Fewer output rows, in the whole batch, than the filter has: the NEON kernel, whatever the width.
FEW_ROWS = Example((1, 256, 2, 2), 240, (3, 3), padding=1)
DILATED = Example((1, 64, 9, 9), 40, (3, 3), padding=2, dilation=2)
DEPTHWISE = Example((1, 48, 9, 9), 48, (3, 3), padding=1, groups=48)
#: What post-ops are behind.
SMALL = Example((1, 64, 8, 8), 32, (3, 3), padding=1)
