"""docs/coverage.md from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.coverage.measure import CLASSES, MIN_COSINE, TARGET, passed

COLUMNS = (
    *("model", "input", "params (M)", "form", *CLASSES, "in BF16", "activations"),
    *("cosine", "max rel error", "s", "MB", "notes"),
)
Row = Mapping[str, Any]


def cells(row: Row) -> list[str]:
    """One model as cells."""
    if "error" in row:
        return [row["model"], *["-"] * (len(COLUMNS) - 2), f"FAILS: {_cell(row['error'])}"]
    return [
        row["model"],
        row["input"],
        f"{row['parameters'] / 1e6:.2f}",
        row["form"],
        *(str(row[kind]) for kind in CLASSES),
        f"{row['share']:.1%}",
        f"{row['activations']:.1%}",
        f"{row['cosine']:.6f}",
        f"{row['max_rel']:.1e}",
        f"{row['seconds']:.1f}",
        f"{row['megabytes']}",
        _cell("; ".join(row["notes"])),
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    raise NotImplementedError
