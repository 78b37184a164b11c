"""Counts calls on an emulated Arm core with the real aarch64 PyTorch: one process for many jobs, one thread."""

from __future__ import annotations

import ctypes
import json
import pickle
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from armopt.emulation import emulated_command
from armopt.emulation.folder import DEFAULT_TORCH, PreparedFolder
from armopt.errors import HostError
from armopt.targets.emulated import core_named
from benchmarks.arm64 import build_qemu
from benchmarks.arm64.opcodes import CLASSES
from benchmarks.arm64.region import COUNTS_VARIABLE

#: What every counted process gets; the caller's own settings are not inherited.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "LRU_CACHE_CAPACITY": "1024"}
FAST_MATH = {**ONE_THREAD, "DNNL_DEFAULT_FPMATH_MODE": "BF16"}
#: As `armopt run` starts a process where tcmalloc is installed.
AS_RUN = {**FAST_MATH, "LD_PRELOAD": "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4"}


@dataclass(frozen=True)
class Job:
    """One call to count.

    Attributes:
        name: For people.
        make: ``module:function`` that prepares the call on the emulated side and returns it (see jobs.py).
        arguments: Its keyword arguments.
        warm_ups: Uncounted calls before the counted ones: they fill caches and generate code.
        repeats: Counted calls; the last one is reported, and they differ little.
        by_node: Whether to count each node of the call's `graph_module` alone as well.
    """

    name: str
    make: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    warm_ups: int = 3
    repeats: int = 1
    by_node: bool = False


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
    prepared = PreparedFolder.default()
    qemu = build_qemu.require(prepared)
    core = core_named(cpu)
    with tempfile.TemporaryDirectory(prefix="armopt-counts-") as name:
        folder = Path(name)
        (folder / "jobs").write_bytes(pickle.dumps([asdict(job) for job in jobs]))
        lines, results, log = folder / "lines", folder / "results", folder / "log"
        lines.touch()
        clean = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        _, environment = emulated_command(
            core.name, ["python"], torch_version=torch_version, env={**clean, **env, COUNTS_VARIABLE: str(lines)}
        )
        command = [
            *(str(qemu.binary), "-0", str(prepared.wrappers / "python"), "-cpu", core.name),
            *("-L", str(prepared.sysroot(core))),
            *("-plugin", f"file={qemu.plugin},out={lines},profile={'on' if profile else 'off'}"),
            str(prepared.sysroot(core) / "usr" / "bin" / "python3.11"),
            *("-m", "benchmarks.arm64.region", str(folder / "jobs"), str(results)),
        ]
        root = Path(__file__).resolve().parents[2]
        with log.open("w+") as errors:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # oneDNN's log too: this process's own stdout is for results
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=_end_with_parent,
            )
            assert process.stdout
            watchdog = _kill_after(process, timeout)
            seen = 0
            try:
                for line in process.stdout:
                    errors.write(line)
                    report(line.rstrip())
                    for result in _read(results)[seen:]:
                        finished(seen, _one(jobs[seen], result))
                        seen += 1
                code = process.wait()
            finally:
                watchdog.cancel()
                process.kill()
        found = _read(results)
        if code and len(found) < len(jobs):
            tail = "\n".join(log.read_text().splitlines()[-15:])
            died = Counts(jobs[len(found)].name, error=f"the emulated process ended with {code}\n{tail}")
            if not found:
                raise HostError(died.error, where=died.name)
            finished(len(found), died)
            return [*_all_counts(jobs, found), died]
        return _all_counts(jobs, found)


def _end_with_parent() -> None:
    """Asks the kernel to kill the emulated process when this one dies, however it does."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _kill_after(process: subprocess.Popen[str], seconds: float) -> Any:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def _read(results: Path) -> list[dict[str, Any]]:
    return json.loads(results.read_text()) if results.exists() else []


def _all_counts(jobs: Sequence[Job], found: Sequence[Mapping[str, Any]]) -> list[Counts]:
    return [_one(job, result) for job, result in zip(jobs, found, strict=False)]


def _one(job: Job, result: Mapping[str, Any]) -> Counts:
    if "error" in result:
        return Counts(job.name, error=result["error"])
    empty = result["empty"]

    def net(counted: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value - empty[name] if name in empty else value for name, value in counted.items()}

    runs = [net(run) for run in result["runs"]]
    last = {name: runs[-1][name] for name in CLASSES}
    return Counts(
        name=job.name,
        classes=last,
        totals=tuple(run["total"] for run in runs),
        nodes=tuple(net(node) for node in result.get("nodes", [])),
        profile=tuple((library, symbol, number) for library, symbol, number in result.get("profile", [])),
    )
