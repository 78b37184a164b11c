"""Runs of `optimize` that are killed: what is at the bundle's place afterwards, and what is left beside it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

import armopt
from armopt import progress
from armopt.bundle import reader

CHECKS = armopt.Checks(min_cosine=-1.0)


def _optimize(path: Path, rows: int, *, force: bool) -> str:
    """Makes a bundle, another one for each number of rows; its digest."""
    output = armopt.Output(path, force=force)
    torch.manual_seed(0)
    return armopt.optimize(
        nn.Linear(64, 64).eval(), (torch.zeros(rows, 64),), output=output, checks=CHECKS
    ).manifest.digest


def _moments(path: Path) -> tuple[float, float]:
    """Seconds until a run begins to write, and until it ends."""
    began, wrote = time.monotonic(), 0.0

    def watch(step: str, done: int, total: int) -> None:
        nonlocal wrote
        if step == "write":
            wrote = time.monotonic() - began

    with progress.watched_by(watch):
        _optimize(path, 1, force=False)
    return wrote, time.monotonic() - began


def kill(folder: Path, count: int, seed: int) -> Counter[str]:
    """Kills runs at random moments, half of them while they write, new ones and such as replace a bundle in turn.

    Args:
        folder: An empty one.
        count: How many.
        seed: Of the moments.

    Returns:
        How often nothing, the old or the new bundle was there; and under ``wrong`` what should not be.
    """
    torch.set_num_threads(1)
    rng, found = random.Random(seed), Counter[str]()
    _optimize(folder / "warm", 1, force=False)  # what a first run imports is not measured
    wrote, ended = _moments(folder / "measured")
    for i in range(count):
        path = folder / f"bundle{i}"
        old = _optimize(path, 1, force=False) if i % 2 else ""
        moment = rng.uniform(0, ended) if i % 4 < 2 else rng.uniform(wrote, ended)
        _killed_after(moment, path, force=bool(i % 2))
        try:
            digest = reader.read(path).manifest.digest if path.exists() else ""
            found["nothing" if not digest else "old" if digest == old else "new"] += 1
            if old and not digest:
                found["wrong: the old bundle is gone"] += 1
        except armopt.ArmoptError as error:
            found[f"wrong: {error}"] += 1
        _optimize(path, 1, force=path.exists())
        if left := sorted(each.name for each in folder.iterdir() if each.name.startswith(f".{path.name}.")):
            found[f"wrong: left {left}"] += 1
    return found


def _killed_after(seconds: float, path: Path, **options: Any) -> None:
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _optimize(path, 2, **options)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
