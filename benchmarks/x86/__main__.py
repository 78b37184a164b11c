"""Times bundles for this machine against what else runs PyTorch models on x86: docs/benchmarks-x86.md.

    python -m benchmarks.x86                              # all models, one thread and all cores; prints the tables
    python -m benchmarks.x86 --only resnet50 --threads 1  # some; results are kept in .cache/x86
    python -m benchmarks.x86 --write                      # writes the page from what is kept

All contenders of a model are loaded at once, each in a process of its own, and take turns: whatever else the machine
does hits them alike. Needs ``pip install -e .[bench,dev]`` and a C++ compiler for Inductor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

from armopt.targets.host import parse_cpuinfo
from benchmarks.arm64.workloads import WORKLOADS
from benchmarks.x86.contenders import ARMOPT, CONTENDERS

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "x86"
PAGE = ROOT / "docs" / "benchmarks-x86.md"
BEGIN, END = "<!-- times: made by python -m benchmarks.x86 --write -->\n", "<!-- end of times -->\n"
#: Of one contender's turn, and turns of each.
SECONDS, ROUNDS = 0.1, 15
#: Seconds in which the threads of who had a turn stop to spin.
REST = 0.03
#: These share a file, which the first of them writes.
_EXPORTED = ["ONNX Runtime", "OpenVINO, FP32", "OpenVINO, BF16"]
#: What is behind by more than this is listed.
LEVEL = 0.95

Times = dict[str, float]


class Runner:
    """A contender's process, ready to be called."""

    def __init__(self, workload: str, contender: str, threads: int, stack: ExitStack) -> None:
        folder = CACHE / "".join(c if c.isalnum() else "-" for c in workload)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.x86.contenders", workload, contender, str(folder)]
        self._errors = stack.enter_context((folder / f"{contender}.log").open("w+"))
        self._process = stack.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        )
        stack.callback(self._process.kill)
        self.cosine = self._answer()
        self.calls = 1

    def choose_calls(self) -> None:
        """As many calls a turn as fill it, by the time of one; while nothing else runs."""
        self.calls = max(1, round(SECONDS / self.turn()))

    def turn(self) -> float:
        """Seconds of a call, on average over as many as a turn has."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self.calls}\n")
        self._process.stdin.flush()
        answer = self._answer()
        assert answer is not None, self.why()
        time.sleep(REST)
        return answer / self.calls

    @property
    def failed(self) -> bool:
        """Whether the model can't be run so."""
        return self.cosine is None

    def why(self) -> str:
        """The last line that the process wrote of what failed."""
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or ["no message"])[-1]

    def _answer(self) -> float | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return float(line) if line else None


def compare(workload: str, threads: int) -> Times:
    """Each contender's time relative to armopt's: the median over rounds in which all took a turn."""
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        lanes = _EXPORTED, [name for name in CONTENDERS if name not in _EXPORTED]  # two prepare at a time
        loaded = pool.map(lambda lane: {name: Runner(workload, name, threads, stack) for name in lane}, lanes)
        started = {name: runner for lane in loaded for name, runner in lane.items()}
        for name, runner in started.items():
            if runner.failed:
                print(f"{workload}: {name} does not run it: {runner.why()}", file=sys.stderr)
        runners = {name: started[name] for name in CONTENDERS if not started[name].failed}
        for runner in runners.values():
            runner.choose_calls()
        rounds = [{name: runner.turn() for name, runner in runners.items()} for _ in range(ROUNDS)]
        return {
            name: statistics.median(each[name] / each[ARMOPT] for each in rounds) for name in runners if name != ARMOPT
        }


def table(threads: int, kept: Mapping[str, Mapping[str, Times]]) -> str:
    """One row a model."""
    others = [name for name in CONTENDERS if name != ARMOPT]
    lines = [f"| model | {' | '.join(others)} |", "| --- |" + " ---: |" * len(others)]
    for workload in WORKLOADS:
        if times := kept.get(workload, {}).get(str(threads)):
            cells = (_cell(times[name]) if name in times else "–" for name in others)
            lines.append(f"| {workload} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(ratio: float) -> str:
    return f"**{ratio:.2f}**" if ratio < LEVEL else f"{ratio:.2f}"


def page(kept: Mapping[str, Mapping[str, Times]]) -> str:
    """The tables, and what they were made on."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "onnxruntime", "openvino"))
    parts = [f"Made on {_model()}, {_cores()} cores, with {versions}.\n"]
    for threads in (1, _cores()):
        title = "One thread" if threads == 1 else f"All cores: {threads} threads"
        parts.append(f"### {title}\n\n{table(threads, kept)}")
    return "\n".join(parts)


def _model() -> str:
    return parse_cpuinfo(Path("/proc/cpuinfo").read_text()).model or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.x86", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--threads", type=int, action="append", help="repeatable; by default 1 and all cores")
    parser.add_argument("--write", action="store_true", help="write the page from what is kept, and time nothing")
    options = parser.parse_args(arguments)
    results = CACHE / "times.json"
    kept = json.loads(results.read_text()) if results.exists() else {}
    if not options.write:
        for workload in (name for name in WORKLOADS if options.only in name):
            for threads in options.threads or (1, _cores()):
                kept.setdefault(workload, {})[str(threads)] = times = compare(workload, threads)
                results.write_text(json.dumps(kept, indent=1))
                print(
                    f"{workload}, {threads}: { ({name: round(ratio, 2) for name, ratio in times.items()}) }", flush=True
                )
    text = page(kept)
    print(text)
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
