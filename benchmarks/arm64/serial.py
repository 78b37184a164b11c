"""Counts what the calling thread runs of a model on one thread and on four: what more threads don't take from it.

    python -m benchmarks.arm64.serial            # prints the table
    python -m benchmarks.arm64.serial --write    # and writes it into docs/kernels.md

Millions of instructions of one call on the emulated Graviton3, without those that only wait; threads without work sleep
(OMP_WAIT_POLICY=passive). One bundle, planned for four threads, runs as it is and with PyTorch's calls in the place of
primitives of its own, as where the build of PyTorch doesn't say where oneDNN's functions are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from armopt.emulation.folder import DEFAULT_TORCH
from benchmarks.arm64 import bundles, cycles, emulated_jobs
from benchmarks.arm64.counting import AS_RUN
from benchmarks.arm64.emulated_jobs import Job, Machine

MODELS = ("mobilenet_v3_large 224", "gpt2, decode after 64", "resnet50 224")
THREADS = (1, 4)
EAGER, CALLS, OWN = "eager, fast math", "bundle, PyTorch's calls", "bundle"
_CPU, _CORE = "graviton3", "neoverse-v1"
_PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
_BEGIN, _END = "<!-- serial: made by python -m benchmarks.arm64.serial --write -->\n", "<!-- end of serial -->\n"


def through_calls(path: str) -> Callable[[], Any]:
    """A bundle without primitives of its own, on the emulated side."""
    from armopt.kernels.onednn import primitives
    from benchmarks.arm64 import jobs

    primitives.api = lambda: "left out, to compare"
    return jobs.bundle(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.arm64.serial", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the table into docs/kernels.md")
    options = parser.parse_args(arguments)
    text = _table(_count())
    print(text)
    if options.write:
        before, _, rest = _PAGE.read_text().partition(_BEGIN)
        _PAGE.write_text(before + _BEGIN + text + _END + rest.partition(_END)[2])
    return 0


def _count() -> dict[tuple[str, str, int], int]:
    """The calling thread's instructions, by model, way and threads."""
    found: dict[tuple[str, str, int], int] = {}
    # the Compute Library keeps the number of threads that it finds first, and primitives that are left out are left out
    # of the whole process: each has processes of its own
    for threads in THREADS:
        env = {**AS_RUN, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        for ways in ((EAGER, OWN), (CALLS,)):
            keys = [(model, way, threads) for model in MODELS for way in ways]

            def keep(index: int, result: Mapping[str, Any], keys: Sequence[tuple[str, str, int]] = tuple(keys)) -> None:
                if "error" in result:
                    print(keys[index], result["error"].strip().splitlines()[-1], file=sys.stderr)
                    return
                blocks = cycles.blocks_of(result, _CORE)
                found[keys[index]] = sum(block.mine * len(block.opcodes) for block in blocks if not block.waits)

            emulated_jobs.run(
                [_job(*key) for key in keys],
                Machine(_CPU, DEFAULT_TORCH, env, timeout=4 * 3600),
                "benchmarks.arm64.clock_region",
                lambda qemu: f"{qemu.clock},memory=off",
                lambda line: print(line, file=sys.stderr, flush=True),
                keep,
            )
    return found


def _job(model: str, way: str, threads: int) -> Job:
    name = f"{model}: {way}, {threads}"
    if way == EAGER:
        return Job(name, "benchmarks.arm64.workloads:eager", {"workload": model, "threads": threads}, warm_ups=1)
    path = bundles.make_bundle(model, _CPU, DEFAULT_TORCH, threads=max(THREADS))
    make = "benchmarks.arm64.jobs:bundle" if way == OWN else "benchmarks.arm64.serial:through_calls"
    return Job(name, make, {"path": str(path), "threads": threads}, warm_ups=2)


def _table(counts: Mapping[tuple[str, str, int], int]) -> str:
    columns = [(way, threads) for way in (EAGER, CALLS, OWN) for threads in THREADS]
    heads = (f"{way}, {threads} thread{'s' * (threads > 1)}" for way, threads in columns)
    lines = [f"| model | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(columns)]
    for model in MODELS:
        cells = (f"{counts[model, *column] / 1e6:.1f}" if (model, *column) in counts else "–" for column in columns)
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
