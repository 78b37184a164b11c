"""Counts as tables, in Markdown that is aligned for terminals."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.arm64.counting import Counts
from benchmarks.arm64.opcodes import CLASSES

SHORT_CLASSES = ("sve bfmmla", "neon bfmmla", "bfdot", "fmla", "vload", "vstore", "vother", "other")


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A Markdown table, aligned for terminals; numbers to the right."""
    texts = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *texts]) for i in range(len(header))]
    right = [all(isinstance(row[i], (int, float)) for row in rows) and bool(rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in texts)])


def class_row(counts: Mapping[str, Any]) -> list[int]:
    """The counts by class in thousands, then the total."""
    return [round(counts[name] / 1000) for name in CLASSES] + [round(sum(counts[n] for n in CLASSES) / 1000)]


def details(counts: Counts, *, nodes: int = 25, symbols: int = 40) -> str:
    """All that is known of one call, in thousands of instructions."""
    by_class = [*SHORT_CLASSES, "total"]
    parts = [f"{counts.name}: thousands of instructions", table([class_row(counts.classes)], by_class)]
    if counts.nodes:
        rows = [[row["target"], row["nodes"], *class_row(row)] for row in counts.by_target()]
        parts += ["", "by target", table(rows, ["target", "nodes", *by_class])]
        most = sorted(counts.nodes, key=lambda node: -node["total"])[:nodes]
        shown = [[n["node"], n["target"], " ; ".join(n["inputs"]), *class_row(n)] for n in most]
        parts += ["", f"the {len(most)} largest nodes", table(shown, ["node", "target", "inputs", *by_class])]
    if counts.profile:
        libraries: Counter[str] = Counter()
        for library, _, number in counts.profile:
            libraries[library] += number
        parts += ["", "by library (instructions)", table(libraries.most_common(), ["library", "instructions"])]
        named = [[n, library, demangle(symbol)[:150]] for library, symbol, n in counts.profile[:symbols]]
        parts += ["", "by function (instructions)", table(named, ["instructions", "library", "function"])]
    return "\n".join(parts)


def demangle(symbol: str) -> str:
    """A C++ name as people write it, where the host has c++filt."""
    try:
        done = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return symbol
    return done.stdout.strip() or symbol
