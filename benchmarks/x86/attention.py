"""Times attention by PyTorch against primitives of its own on this machine, one thread, as ratios.

    python -m benchmarks.x86.attention

Above 1 the primitives are faster. The two take turns of a hundredth of a second; a figure is the median of the ratios.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.arm64 import jobs

#: Images or windows, heads, tokens, size of a head, and what is added to the scores.
_SHAPES = ((1, 12, 32, 64, ""), (1, 12, 128, 64, ""), (1, 12, 384, 64, "causal"), (64, 3, 49, 32, "windows"))
_SECONDS, _ROUNDS = 0.01, 41


def main() -> int:
    """The command line; returns the exit code."""
    torch.set_num_threads(1)
    with torch.no_grad():
        for dtype in ("bf16", "fp32"):
            for shape in _SHAPES:
                ways = jobs.attention_in_pytorch(dtype, *shape), jobs.attention_in_onednn(dtype, *shape)
                rounds = [[_turn(way) for way in ways] for _ in range(_ROUNDS)]
                ratio = statistics.median(pytorch / own for pytorch, own in rounds)
                print(dtype, " x ".join(map(str, shape[:4])), shape[4] or "-", f"{ratio:.2f}", flush=True)
    return 0


def _turn(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < _SECONDS:
        call()
        calls += 1
    return passed / calls


if __name__ == "__main__":
    sys.exit(main())
