"""What the clock is judged by: the published calls, measured on the emulated machine.

    python -m benchmarks.arm64.measuring [--only WORD …]    # adds what is missing to measures.json

A measure is of one call: cycles of its instructions, lines of memory, page faults. No time of the emulator is in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from armopt import targets
from armopt.targets.emulated import core_named
from benchmarks.arm64 import bundles, cycles, emulated_jobs, published
from benchmarks.arm64.emulated_jobs import Job, Machine
from benchmarks.arm64.published import Case

MEASURES = Path(__file__).with_name("measures.json")
#: Bytes of a line.
LINE = 64
#: Memory that allocators give back after a while is kept: under emulation a while is a hundred times as much work.
#: Threads that have nothing to do sleep: spinning isn't work.
_SETTINGS = {"MIMALLOC_PURGE_DELAY": "10000", "OMP_WAIT_POLICY": "passive"}


@dataclass(frozen=True)
class Measure:
    """One call.

    Attributes:
        instructions: Of the thread that called, without waiting.
        cycles: That its instructions need, with all data at hand.
        blocks: Different blocks of instructions that it ran.
        instructions_of_all: Of all threads.
        cycles_of_all: Of all threads.
        regions: Parallel regions.
        faults: Minor page faults of the process.
        lines: Lines that came into each level of cache of the thread that called, and that left it written.
        lines_of_all: The same of all threads.
    """

    instructions: int
    cycles: float
    blocks: int
    instructions_of_all: int
    cycles_of_all: float
    regions: int
    faults: int
    lines: Sequence[Sequence[int]]
    lines_of_all: Sequence[Sequence[int]]


def key(case: Case) -> str:
    """What makes measures comparable: the call, its software, its core."""
    parts = [case.job.name, case.torch, case.cpu, case.target, case.threads, sorted(case.env.items())]
    return json.dumps(parts)


def read() -> dict[str, Measure]:
    """All measures, by their keys."""
    if not MEASURES.exists():
        return {}
    return {name: Measure(**found) for name, found in json.loads(MEASURES.read_text()).items()}


def _write(measures: Mapping[str, Measure]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(asdict(measures[name]))}" for name in sorted(measures))
    partial = MEASURES.with_suffix(".part")
    partial.write_text("{\n" + lines + "\n}\n")
    partial.replace(MEASURES)


def measure(cases: Sequence[Case], keep: Any) -> None:
    """Measures cases that share a process: release, core, threads and settings."""
    first = cases[0]
    core, product = core_named(first.cpu), targets.product(first.target)
    env = {**_SETTINGS, **first.env, "OMP_NUM_THREADS": str(first.threads)}
    options = {
        "memory": "on",
        "vector": targets.product(first.cpu).target.vector_bits // 8,
        "l2": product.target.l2_kib,
        "l3": product.clock.llc_kib if product.clock else core.caches_kib[3],
    }
    plugin = ",".join(f"{name}={value}" for name, value in options.items())

    def finished(index: int, result: Mapping[str, Any]) -> None:
        if "error" in result:
            print(cases[index].job.name, result["error"].strip().splitlines()[-1], file=sys.stderr, flush=True)
            return
        blocks = cycles.blocks_of(result, core.name)
        if cases[index].is_native:
            blocks = cycles.without_python(blocks)
        found = cycles.cycles(blocks, product.target.core)
        seen = {name: result[name] for name in ("faults", "lines", "lines_of_all")}
        keep(cases[index], Measure(**asdict(found), **seen))

    emulated_jobs.run(
        [_job(case) for case in cases],
        Machine(first.cpu, first.torch, env, timeout=4 * 3600),
        "benchmarks.arm64.clock_region",
        lambda qemu: f"{qemu.clock},{plugin}",
        lambda line: print(line, file=sys.stderr, flush=True),
        finished,
    )


def _job(case: Case) -> Job:
    """What is run; a bundle or an ONNX model is made first."""
    if case.make == "bundle":
        path = bundles.make_bundle(case.arguments["workload"], case.target, case.torch, threads=case.threads)
        arguments = {"path": str(path), "threads": case.threads}
        return replace(case.job, make="benchmarks.arm64.jobs:bundle", arguments=arguments)
    if case.make == "onnx":
        path = bundles.make_onnx(case.arguments["workload"], case.target, case.torch, "plain")
        arguments = {"path": str(path), "fast_math": True}
        return replace(case.job, make="benchmarks.arm64.onnxruntime_jobs:model", arguments=arguments)
    return case.job


def groups(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases by the process that can measure them."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        shared = [case.torch, case.cpu, case.target, case.threads, sorted(case.env.items())]
        found.setdefault(json.dumps(shared), []).append(case)
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.arm64.measuring", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="sources and calls that hold one of these"
    )
    parser.add_argument("--seeds", action="store_true", help="what docs/seeds.md needs beside")
    parser.add_argument("--models", action="store_true", help="what docs/benchmarks.md estimates")
    parser.add_argument("--threads", type=int, help="calls with so many")
    options = parser.parse_args(arguments)
    held = read()
    if options.seeds or options.models:
        from benchmarks.arm64 import estimates, seeds  # which read measures

        cases = seeds.cases() if options.seeds else estimates.cases()
        found = [(case, case.job.name) for case in cases]
    else:
        reproduced = [(row.case, row.where) for row in published.rows() if isinstance(row.case, Case)]
        found = [(case, f"{where} {case.job.name}") for case, where in reproduced]
    chosen = [each for each in found if options.threads in (None, each[0].threads)]
    wanted = {key(case): case for case, name in chosen if any(word in name for word in options.only)}

    def keep(case: Case, found: Measure) -> None:
        held.update(read())  # another process may measure others
        held[key(case)] = found
        _write(held)

    for group in groups(case for name, case in wanted.items() if name not in held):
        measure(group, keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
