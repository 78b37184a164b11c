"""Tables of what users can name (policies, tasks, formats…), one line each; other packages may add lines."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from armopt.errors import InputError, unknown

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Line(Generic[T]):
    """One line of a table.

    Attributes:
        name: What users write.
        value: What it stands for; or as text where that is, ``MODULE:NAME``. Then it is imported when it is first
            used, so that ``--help`` lists the names without importing torch.
        said: What help says of it; its name where empty.
    """

    name: str
    value: T | str
    said: str = ""


class Table(Mapping[str, T]):
    """Values by name, in the order of their lines."""

    def __init__(self, kind: str, *lines: Line[T]) -> None:
        self._kind = kind
        self._lines = {line.name: line for line in lines}

    def __getitem__(self, name: str) -> T:
        value = self._lines[name].value
        if not isinstance(value, str):
            return value
        module, _, attribute = value.partition(":")
        return cast("T", getattr(importlib.import_module(module), attribute))

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def find(self, name: str, *, where: str = "", also: Sequence[str] = ()) -> T:
        """The value of that name.

        Args:
            name: As a user wrote it.
            where: What to call the option in an error.
            also: Other names that the caller knows, for the error.

        Raises:
            InputError: No line has that name; the message says which come close, and all there are.
        """
        if name not in self._lines:
            raise unknown(self._kind, name, [*self, *also], where=where, said=self.help(*also))
        return self[name]

    def said(self, name: str) -> str:
        """What help says of a line."""
        return self._lines[name].said or name

    def help(self, *also: str) -> str:
        """What help says of all lines, and `also`: ``a, b or c``."""
        words = [*map(self.said, self), *also]
        return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))

    def register(self, line: Line[T], *, before: str = "") -> None:
        """Adds a line.

        Args:
            line: The line.
            before: The name that it is asked before; it is the last if nothing is said.

        Raises:
            InputError: There is one of its name, or none called `before`.
        """
        if line.name in self._lines:
            raise InputError(f"there is a {self._kind} {line.name!r} already", hint="Choose another name")
        lines = list(self._lines.values())
        if before:
            self.find(before)
        lines.insert(list(self).index(before) if before else len(lines), line)
        self._lines = {each.name: each for each in lines}

    def unregister(self, name: str) -> None:
        """Takes a line out again.

        Raises:
            KeyError: There is none of that name.
        """
        del self._lines[name]
