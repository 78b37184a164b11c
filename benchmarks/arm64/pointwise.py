"""Counts pointwise functions behind a layer by PyTorch, by oneDNN's code and as bundles run them, on an emulated core.

    python -m benchmarks.arm64.pointwise                                      # Graviton3, torch 2.10
    python -m benchmarks.arm64.pointwise --target graviton4 --torch 2.13.0

Of each element: instructions, and the cycles that LLVM's model of the core gives them (docs/clock.md); of a call:
thousands of instructions. Bundles run oneDNN's code where armopt/kernels/onednn/pointwise.py takes it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

#: Elements of a small call and of a large one.
_FEW, _MANY = 2048, 65536
_WAYS = {"PyTorch": "pointwise_in_pytorch", "oneDNN": "pointwise_in_onednn", "a bundle": "pointwise"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from armopt.kernels.onednn.pointwise import FUNCTIONS
    from benchmarks.arm64 import tables
    from benchmarks.arm64.emulated_jobs import Job
    from benchmarks.arm64.ways import Counter

    counter = Counter.asked_for("pointwise", __doc__, arguments)
    functions = [(name, dtype) for dtype in ("fp32", "bf16")[: 1 + counter.target.bf16] for name in sorted(FUNCTIONS)]
    keys = [(*function, way, size) for function in functions for way in _WAYS for size in (_FEW, _MANY)]
    jobs = []
    for name, dtype, way, size in keys:
        sizes = {"operation": name, "dtype": dtype, "elements": size}
        jobs.append(Job(f"{name} {dtype} {way} {size}", f"benchmarks.arm64.jobs:{_WAYS[way]}", sizes))
    found = {keys[index]: counted for index, counted in counter.count(jobs).items()}
    rows = [[f"{name}, {dtype.upper()}", *_cells(found, name, dtype)] for name, dtype in functions]
    headers = ["function", *(f"{way}: {what}" for way in _WAYS for what in ("a call", "an element", "its cycles"))]
    print(tables.table(rows, headers))
    return 0


def _cells(found: Mapping[Any, tuple[int, float]], name: str, dtype: str) -> list[str]:
    cells = []
    for way in _WAYS:
        if (name, dtype, way, _MANY) not in found:
            cells += ["-"] * 3
            continue
        few, many = (found[name, dtype, way, size] for size in (_FEW, _MANY))
        instructions, cycles = ((b - a) / (_MANY - _FEW) for a, b in zip(few, many, strict=True))
        cells += [f"{(few[0] - instructions * _FEW) / 1e3:.1f}", f"{instructions:.1f}", f"{cycles:.1f}"]
    return cells


if __name__ == "__main__":
    sys.exit(main())
