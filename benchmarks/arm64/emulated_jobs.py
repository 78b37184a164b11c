"""Jobs in one emulated Python under a QEMU with a plugin: results as they are made, one job's failure is its own."""

from __future__ import annotations

import ctypes
import json
import pickle
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from armopt.emulation import emulated_command
from armopt.emulation.folder import PreparedFolder
from armopt.errors import HostError
from armopt.targets.emulated import core_named
from benchmarks.arm64 import build_qemu
from benchmarks.arm64.region import LINES_VARIABLE


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
class Machine:
    """What runs the jobs.

    Attributes:
        cpu: A product or a core that QEMU models.
        torch_version: The aarch64 PyTorch.
        env: All settings of the process that matter; nothing else is inherited.
        timeout: Seconds for all jobs; a run costs about a minute to start.
    """

    cpu: str
    torch_version: str
    env: Mapping[str, str]
    timeout: float = 3600.0


def run(
    jobs: Sequence[Job],
    machine: Machine,
    module: str,
    plugin: Callable[[build_qemu.CountingQemu], str],
    report: Callable[[str], None] = lambda line: None,
    finished: Callable[[int, Mapping[str, Any]], None] = lambda index, result: None,
) -> list[Mapping[str, Any]]:
    """Runs all jobs; a result is what the module writes, or has a traceback as ``error``.

    Args:
        jobs: What to call; each fails alone.
        machine: Where.
        module: Runs on the emulated side with the files of jobs and of results, as region.py does.
        plugin: The plugin's file and its options but ``out``, as QEMU takes them.
        report: Gets what the process writes: a line as each job ends.
        finished: Gets each job's index and result as it ends.

    Raises:
        HostError: QEMU with plugins or the emulated machine is not prepared; or the process died at the first job.
    """
    prepared = PreparedFolder.default()
    qemu = build_qemu.require(prepared)
    core = core_named(machine.cpu)
    with tempfile.TemporaryDirectory(prefix="armopt-counts-") as name:
        folder = Path(name)
        (folder / "jobs").write_bytes(pickle.dumps([asdict(job) for job in jobs]))
        lines, results, log = folder / "lines", folder / "results", folder / "log"
        lines.touch()
        results.touch()
        clean = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        _, environment = emulated_command(
            core.name,
            ["python"],
            torch_version=machine.torch_version,
            env={**clean, **machine.env, LINES_VARIABLE: str(lines)},
        )
        command = [
            *(str(qemu.binary), "-0", str(prepared.wrappers / "python"), "-cpu", core.name),
            *("-L", str(prepared.sysroot(core)), "-plugin", f"file={plugin(qemu)},out={lines}"),
            str(prepared.sysroot(core) / "usr" / "bin" / "python3.11"),
            *("-m", module, str(folder / "jobs"), str(results)),
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
            watchdog = _kill_after(process, machine.timeout)
            found: list[Mapping[str, Any]] = []
            try:
                with results.open() as written:
                    for line in process.stdout:
                        errors.write(line)
                        report(line.rstrip())
                        found += _ended(written, len(found), finished)
                    code = process.wait()
                    found += _ended(written, len(found), finished)
            finally:
                watchdog.cancel()
                process.kill()
        if code and len(found) < len(jobs):
            tail = "\n".join(log.read_text().splitlines()[-15:])
            died = {"error": f"the emulated process ended with {code}\n{tail}"}
            if not found:
                raise HostError(died["error"], where=jobs[0].name)
            finished(len(found), died)
            return [*found, died]
        return found


def _end_with_parent() -> None:
    """Asks the kernel to kill the emulated process when this one dies, however it does."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _kill_after(process: subprocess.Popen[str], seconds: float) -> Any:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def _ended(
    written: IO[str], index: int, finished: Callable[[int, Mapping[str, Any]], None]
) -> Iterator[Mapping[str, Any]]:
    """The results that were written since the last look, each reported with its job's index."""
    while True:
        begin, line = written.tell(), written.readline()
        if not line.endswith("\n"):  # nothing, or not all of it yet
            written.seek(begin)
            return
        result = json.loads(line)
        finished(index, result)
        yield result
        index += 1
