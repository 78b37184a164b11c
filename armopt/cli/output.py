"""The one place that prints. With --json: one object on stdout, everything else on stderr.

Nothing that stands in a file reaches a terminal as a control character.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from armopt.errors import printable


class Output:
    """Where a command's result and its remarks go."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def result(self, value: Any, text: Callable[[], str]) -> None:
        """Prints the result: as JSON, or as `text` makes it."""
        shown = json.dumps(value, indent=1, sort_keys=True) if self.as_json else text()
        print(printable(shown, keep="\n").rstrip("\n"))

    def text(self, text: str) -> None:
        """Prints a result that is text as it stands."""
        print(printable(text, keep="\n\t"), end="")

    def note(self, text: str) -> None:
        """A remark beside the result."""
        print(printable(text), file=sys.stderr)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """A bar on a terminal; silent elsewhere, and with --json."""
        if self.as_json or not sys.stderr.isatty():
            yield lambda step, done, total: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:10}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
            task = bar.add_task("")
            yield lambda step, done, total: bar.update(task, description=step, completed=done, total=total)


def text_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain table that fits a terminal and a pipe: columns two spaces apart, numbers to the right."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    numeric = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(headers))]

    def line(parts: Sequence[str]) -> str:
        padded = [p.rjust(w) if n else p.ljust(w) for p, w, n in zip(parts, widths, numeric, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *(line(row) for row in cells)])


def human_size(count: int) -> str:
    """Bytes for people: 51.1 MB."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError
