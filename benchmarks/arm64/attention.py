"""Counts attention by PyTorch, by primitives of its own and as bundles run it, on an emulated core.

    python -m benchmarks.arm64.attention                                      # Graviton3, torch 2.10
    python -m benchmarks.arm64.attention --target graviton4 --torch 2.13.0

Thousands of instructions of a call, and of the cycles that LLVM's model of the core gives them (docs/clock.md).
PyTorch's in BF16 is left out where its BLAS has no product in BF16: bundles then run it in FP32, between casts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

#: Images or windows, heads, tokens, size of a head, and what is added to the scores.
_SHAPES = (
    *((1, 12, 32, 64, ""), (1, 12, 64, 64, ""), (1, 12, 64, 64, "causal"), (1, 12, 128, 64, ""), (1, 12, 197, 64, "")),
    *((1, 12, 384, 64, ""), (1, 12, 384, 64, "causal"), (1, 8, 256, 128, ""), (64, 3, 49, 32, "windows")),
)
_WAYS = {"PyTorch": "attention_in_pytorch", "oneDNN": "attention_in_onednn", "a bundle": "attention"}
#: Wheels from this release on have a BLAS without a product in BF16.
_WITHOUT_OPENBLAS = (2, 11)
_SIZES = ("batch", "heads", "tokens", "size", "mask")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from benchmarks.arm64 import tables
    from benchmarks.arm64.emulated_jobs import Job
    from benchmarks.arm64.ways import Counter

    counter = Counter.asked_for("attention", __doc__, arguments)
    has_openblas = tuple(map(int, counter.torch.split("."))) < _WITHOUT_OPENBLAS
    rows = [(dtype, shape) for dtype in ("bf16", "fp32")[not counter.target.bf16 :] for shape in _SHAPES]
    keys = [(*row, way) for row in rows for way in _WAYS if way != "PyTorch" or row[0] == "fp32" or has_openblas]
    jobs = [
        Job(
            f"{dtype} {shape} {way}",
            f"benchmarks.arm64.jobs:{_WAYS[way]}",
            {"dtype": dtype} | dict(zip(_SIZES, shape, strict=True)),
        )
        for dtype, shape, way in keys
    ]
    found = {keys[index]: counted for index, counted in counter.count(jobs).items()}
    cells = [
        [
            dtype.upper(),
            " x ".join(map(str, shape[:4])),
            shape[4] or "-",
            *(f"{x / 1e3:,.0f}" if x else "-" for way in _WAYS for x in found.get((dtype, shape, way), (0, 0))),
        ]
        for dtype, shape in rows
    ]
    headers = ["", "batch x heads x tokens x size", "mask"]
    headers += [f"{way}: {what}" for way in _WAYS for what in ("instructions", "cycles")]
    print(tables.table(cells, headers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
