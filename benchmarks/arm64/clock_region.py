"""The emulated side of the clock: runs jobs, and notes what the plugin saw of each, and page faults.

Of PyTorch it needs what every release has, and nothing of armopt.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.arm64 import profile
from benchmarks.arm64.region import Lines, count, resolve

#: Of which the one with the fewest page faults counts.
_CALLS = 3


class CodeLines(Lines):
    """The plugin's output, which has a block's code once."""

    def __init__(self) -> None:
        super().__init__()
        self.codes: dict[tuple[int, int], str] = {}

    def read(self) -> list[dict[str, Any]]:
        found = super().read()
        for line in found:
            for address, length, _, _, code in line["blocks"]:
                if code:
                    self.codes[address, length] = code
        return found

    def with_codes(self, blocks: list[list[Any]]) -> list[list[Any]]:
        """Address, code, runs of the thread that called and of all."""
        return [[at, self.codes[at, length], mine, every] for at, length, mine, every, _ in blocks]


def run(job: dict[str, Any], lines: CodeLines) -> dict[str, Any]:
    """Prepares one job, warms it up, and notes one call of it."""
    import torch

    arguments = dict(job["arguments"])
    set_threads(arguments.pop("threads", 1))
    call = resolve(job["make"])(**arguments)
    gc.collect()
    gc.disable()
    with torch.no_grad():
        for _ in range(job["warm_ups"]):
            call()
        faults = steady_faults(call)
        lines.read()
        for _ in range(job["repeats"]):  # the last one finds the caches of the model as a call leaves them
            count(call)
        count(_nothing)
    gc.enable()
    *_, seen, empty = lines.read()
    blocks = {name: lines.with_codes(found["blocks"]) for name, found in (("blocks", seen), ("empty", empty))}
    return seen | blocks | {"faults": faults, "mappings": list(profile.mappings())}


def steady_faults(call: Callable[[], Any]) -> int:
    """Minor page faults of a call: the least of a few, because the first ones still grow heaps and caches."""
    found: list[int] = []
    while len(found) < _CALLS and 0 not in found:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)


def set_threads(count: int) -> None:
    """Has PyTorch and its BLAS use so many threads, however few cores the machine has that emulates.

    OpenBLAS with threads of its own (torch 2.2) takes no more than it finds cores unless it is told so.
    """
    import torch

    torch.set_num_threads(count)
    for path in {path for *_, path in profile.mappings() if "openblas" in path.rpartition("/")[2]}:
        if told := getattr(ctypes.CDLL(path), "openblas_set_num_threads", None):  # NumPy's own has another name for it
            told(count)


def _nothing() -> None:
    pass


def main(jobs_file: str, results_file: str) -> None:
    """Runs the jobs of a file, one after another; a failure costs that job only."""
    lines = CodeLines()
    for job in pickle.loads(Path(jobs_file).read_bytes()):
        started = time.monotonic()
        try:
            result = run(job, lines)
        except Exception:
            result = {"error": traceback.format_exc()}
        with open(results_file, "a") as results:
            results.write(json.dumps(result) + "\n")
        print(f"{job['name']}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    os._exit(0)  # PyTorch's own end takes seconds under emulation


if __name__ == "__main__":
    main(*sys.argv[1:])
