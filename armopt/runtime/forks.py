"""Notices that this process was forked: the threads with which a bundle was loaded do not live on in a child."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from armopt.errors import HostError

_Result = TypeVar("_Result")
_own_thread = threading.local()


class Forks:
    """How many forks lie between this process and the one that imported armopt.

    Attributes:
        count: That number.
        worked_at: What it was when a bundle was last bound or run: OpenMP's threads are those of that process.
    """

    def __init__(self) -> None:
        self.count = 0
        self.worked_at: int | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._note)

    def _note(self) -> None:
        self.count += 1


FORKS = Forks()


def before_forks(work: Callable[[], _Result]) -> _Result:
    """Runs `work` on a thread of its own, which ends: bundles that it loads may be run by children forked later.

    A pool of OpenMP threads belongs to the thread that started it. This one's ends with it, and a thread of a child
    starts another. So children share the packed weights of one load. Nothing may run kernels on the thread that forks.
    """

    def marked() -> _Result:
        _own_thread.marked = True
        return work()

    with ThreadPoolExecutor(1, thread_name_prefix="armopt-load") as pool:
        return pool.submit(marked).result()


def on_own_thread() -> bool:
    """Whether this thread is one of :func:`before_forks`."""
    return getattr(_own_thread, "marked", False)


def refuse(where: str) -> None:
    """Refuses a call in a child of the process that loaded a bundle, which would wait for ever.

    Binding runs kernels on OpenMP's threads. A child inherits the pool's data and none of its threads, so the first
    parallel loop waits for threads that are not there. On one thread there is no pool.

    Raises:
        HostError: This process works on more than one thread.
    """
    if torch.get_num_threads() > 1:
        raise HostError(
            "was loaded before this process was forked, and OpenMP's threads do not live on in a child",
            where=where,
            hint=_HINT,
        )


def refuse_load(where: str) -> None:
    """Refuses to load in a child of a process that bound or ran a bundle: binding would wait for the same threads.

    Raises:
        HostError: This process works on more than one thread.
    """
    if FORKS.worked_at not in (None, FORKS.count) and torch.get_num_threads() > 1:
        raise HostError(
            "can't be loaded in a process that was forked from one that loaded or ran a bundle: "
            "OpenMP's threads do not live on in a child",
            where=where,
            hint=_HINT,
        )


_HINT = (
    "Load bundles in the workers alone (gunicorn: without --preload, or in post_fork), use processes that are spawned, "
    "or call torch.set_num_threads(1) in the worker"
)
