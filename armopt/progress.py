"""How far a command is: told to whoever watches, and to the log ``armopt``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: Told the name of a step, how many steps are done, and how many there are.
Watcher = Callable[[str, int, int], None]

_log = logging.getLogger(__name__)
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Reports every step inside the block to `watcher`."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def report(step: str, done: int, total: int) -> None:
    """Says that `step` begins, after `done` of `total`."""
    if (watcher := _watcher.get()) is not None:
        watcher(step, done, total)


class Steps:
    """The steps of one run, in order. Call it with the name of the one that begins."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __call__(self, name: str) -> None:
        """Says that a step begins."""
        _log.info("%s", name)
        report(name, self._names.index(name), len(self._names))

    def done(self) -> None:
        """Says that the last step has ended."""
        report("done", len(self._names), len(self._names))
