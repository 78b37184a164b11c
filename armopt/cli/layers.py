"""The layers of a plan as text: by kernel where they are many, else one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from armopt.cli.output import text_table

#: What the reasons of a plan by cost mean.
LEGEND = (
    "A reason gives what a call costs, estimated (docs/clock.md); `KERNEL 1.08x` is\n"
    "the runner-up, which would cost 1.08 times as much."
)
_RUNNER_UP = re.compile(r" \d+\.\d\dx\b")
#: As many are shown one by one.
_FEW = 20


class Row(NamedTuple):
    """A layer as a plan has it; `shape` is that of its input."""

    node: str
    op: str
    shape: Sequence[int]
    kernel: str
    precision: str
    reason: str


def table(rows: Sequence[Row], *, every: bool) -> str:
    """A table of layers.

    Args:
        rows: The layers, in the order of the graph.
        every: Whether each gets a line, however many there are; else kernels do, with how many layers run them.
    """
    if every or len(rows) <= _FEW:
        shown = [(*row[:2], "x".join(map(str, row.shape)), *row[3:]) for row in rows]
        lines = text_table(("node", "op", "input", "kernel", "precision", "reason"), shown)
        return f"{lines}\n{LEGEND}" if any(_RUNNER_UP.search(row.reason) for row in rows) else lines
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.precision, row.op), []).append(row.node)
    by_count = sorted(groups.items(), key=lambda group: -len(group[1]))
    lines = text_table(
        ("kernel", "precision", "op", "layers", "which"),
        [(*key, len(nodes), _which(nodes)) for key, nodes in by_count],
    )
    return f"{lines}\n{len(rows)} layers; --layers shows each with its reason."


def _which(nodes: Sequence[str]) -> str:
    return ", ".join(nodes) if len(nodes) <= 2 else f"{nodes[0]} to {nodes[-1]}"
