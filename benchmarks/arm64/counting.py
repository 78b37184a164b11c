"""Counts calls on an emulated Arm core with the real aarch64 PyTorch: one process for many jobs, one thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from armopt.emulation.folder import DEFAULT_TORCH
from benchmarks.arm64 import emulated_jobs
from benchmarks.arm64.emulated_jobs import Job, Machine
from benchmarks.arm64.opcodes import CLASSES

#: What every counted process gets; the caller's own settings are not inherited.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "LRU_CACHE_CAPACITY": "1024"}
FAST_MATH = {**ONE_THREAD, "DNNL_DEFAULT_FPMATH_MODE": "BF16"}
#: As `armopt run` starts a process where tcmalloc is installed.
AS_RUN = {**FAST_MATH, "LD_PRELOAD": "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4"}


@dataclass(frozen=True)
class Counts:
    """Retired instructions of one call, without what opening and closing the region costs.

    Attributes:
        name: The job's.
        classes: By class (see opcodes.def).
        totals: Of each counted call.
        nodes: With `by_node`: node, target, inputs, output and the counts of each, in order.
        profile: With `profile`: (library, mangled symbol, instructions), the most first.
        error: The traceback, if the job failed; then there are no counts.
    """

    name: str
    classes: Mapping[str, int] = field(default_factory=dict)
    totals: tuple[int, ...] = ()
    nodes: tuple[Mapping[str, Any], ...] = ()
    profile: tuple[tuple[str, str, int], ...] = ()
    error: str = ""

    @classmethod
    def of(cls, job: Job, result: Mapping[str, Any]) -> Counts:
        """What a job's own process told of it: the region itself is subtracted."""
        if "error" in result:
            return cls(job.name, error=result["error"])
        empty = result["empty"]

        def net(counted: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value - empty[name] if name in empty else value for name, value in counted.items()}

        runs = [net(run) for run in result["runs"]]
        return cls(
            name=job.name,
            classes={name: runs[-1][name] for name in CLASSES},
            totals=tuple(run["total"] for run in runs),
            nodes=tuple(net(node) for node in result.get("nodes", [])),
            profile=tuple((library, symbol, number) for library, symbol, number in result.get("profile", [])),
        )

    @property
    def total(self) -> int:
        """All instructions."""
        return sum(self.classes.values())

    def by_target(self) -> list[dict[str, Any]]:
        """The nodes added up by target, the most instructions first; then what is outside of all nodes."""
        found: dict[str, dict[str, Any]] = {}
        for node in self.nodes:
            entry = found.setdefault(
                node["target"], {"target": node["target"], "nodes": 0, **dict.fromkeys(CLASSES, 0), "total": 0}
            )
            entry["nodes"] += 1
            for name in (*CLASSES, "total"):
                entry[name] += node[name]
        rows = sorted(found.values(), key=lambda entry: -entry["total"])
        inside = {name: sum(row[name] for row in rows) for name in CLASSES}
        rest = {name: self.classes[name] - inside[name] for name in CLASSES}
        return [*rows, {"target": "(outside of nodes)", "nodes": 0, **rest, "total": sum(rest.values())}]


def count(
    jobs: Sequence[Job],
    *,
    cpu: str = "graviton3",
    torch_version: str = DEFAULT_TORCH,
    env: Mapping[str, str] = FAST_MATH,
    profile: bool = False,
    timeout: float = 3600.0,
    report: Callable[[str], None] = lambda line: None,
    finished: Callable[[int, Counts], None] = lambda index, counts: None,
) -> list[Counts]:
    """Runs all jobs in one emulated Python and counts them.

    Args:
        jobs: What to call; each fails alone.
        cpu: A product or a core that QEMU models.
        torch_version: The aarch64 PyTorch.
        env: All settings of the process that matter; nothing else is inherited.
        profile: Whether to find out by function where the instructions were retired.
        timeout: Seconds for all of them; a run costs about a minute to start.
        report: Gets what the process writes: a line as each job ends.
        finished: Gets each job's index and counts as it ends.

    Raises:
        HostError: QEMU with plugins or the emulated machine is not prepared; or the process died.
    """
    machine = Machine(cpu, torch_version, env, timeout)
    found = emulated_jobs.run(
        jobs,
        machine,
        "benchmarks.arm64.region",
        lambda qemu: f"{qemu.plugin},profile={'on' if profile else 'off'}",
        report,
        lambda index, result: finished(index, Counts.of(jobs[index], result)),
    )
    return [Counts.of(job, result) for job, result in zip(jobs, found, strict=False)]
