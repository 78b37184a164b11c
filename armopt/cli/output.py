"""The one place that prints. With --json: one object on stdout, everything else on stderr.

Nothing that stands in a file reaches a terminal as a control character.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from armopt.errors import ArmoptWarning, printable

#: Characters of a name that a narrow terminal shows at least.
_LEAST_NAME = 16


def show_warnings() -> None:
    """From now on prints armopt's own warnings as it prints errors, without lines of its source."""
    others = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, ArmoptWarning):
            print(f"armopt: {printable(str(message)).removeprefix('armopt: ')}", file=sys.stderr)
        else:
            others(message, category, *where, **more)

    warnings.showwarning = show


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
    """A plain table: columns two spaces apart, numbers to the right.

    Where a terminal is narrower, the last column gets lines of its own, and the longest names are cut in the middle.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    numeric = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(headers))]
    lines = _aligned([list(headers), *cells], numeric)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    if not width or all(len(line) <= width for line in lines) or len(headers) == 1:
        return "\n".join(lines)
    return "\n".join(_narrow(headers, cells, numeric, width))


def _narrow(
    headers: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool], width: int
) -> Iterator[str]:
    """The lines of a table that is wider than so many characters."""
    table = [[*headers[:-1]], *([*row[:-1]] for row in cells)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    widest = widths.index(max(widths))
    most = max(_LEAST_NAME, width - (sum(widths) + 2 * len(widths) - 2 - widths[widest]))
    for row in table:
        row[widest] = _cut(row[widest], most)
    lines = _aligned(table, numeric[:-1])
    yield from lines[:2]
    for line, cell in zip(lines[2:], cells, strict=True):
        yield line
        yield from textwrap.wrap(cell[-1], width, initial_indent="    ", subsequent_indent="    ")


def _aligned(table: Sequence[Sequence[str]], numeric: Sequence[bool]) -> list[str]:
    """The lines of a table, whose first row is its headers."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]

    def line(parts: Sequence[str]) -> str:
        padded = [p.rjust(w) if n else p.ljust(w) for p, w, n in zip(parts, widths, numeric, strict=True)]
        return "  ".join(padded).rstrip()

    return [line(table[0]), line(["-" * w for w in widths]), *map(line, table[1:])]


def _cut(name: str, most: int) -> str:
    """A name of at most so many characters, without its middle."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - (most - most // 2 - 1) :]}"


def human_size(count: int) -> str:
    """Bytes for people: 51.1 MB."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError
