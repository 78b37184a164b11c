"""Notices that this process was forked: the threads with which a bundle was loaded do not live on in a child."""

from __future__ import annotations

import os

import torch

from armopt.errors import HostError


class Forks:
    """How many forks lie between this process and the one that imported armopt."""

    def __init__(self) -> None:
        self.count = 0
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._note)

    def _note(self) -> None:
        self.count += 1


FORKS = Forks()


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
            hint="Load the bundle in each worker (gunicorn: without --preload), use processes that are spawned, "
            "or call torch.set_num_threads(1) in the worker",
        )
