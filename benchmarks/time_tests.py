"""Times `.ci/run` from a clean checkout, on an otherwise idle machine, and writes the table in CONTRIBUTING.md.

    python -m benchmarks.time_tests              # three runs with a warm cache of the emulated machine, three with none
    python -m benchmarks.time_tests --runs 1     # one of each
    python -m benchmarks.time_tests --write      # and writes the table

A run is a clone of this checkout's last commit in a temporary folder, removed afterwards. Its output is shown as it
comes. The table is written after each pair of runs; where one fails, it and what follows is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- times: made by python -m benchmarks.time_tests --write -->\n", "<!-- end of times -->\n"


@dataclass(frozen=True)
class Run:
    """Seconds that one run took, those of pytest in it, and its slowest tests as pytest lists them."""

    cold: bool
    seconds: float
    pytest: float
    slowest: tuple[str, ...]


def measure(cold: bool) -> Run:
    """Clones, runs and times; the cache of the emulated machine is empty if asked for."""
    with tempfile.TemporaryDirectory(prefix="armopt-time-") as folder:
        clone = Path(folder) / "armopt"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if cold:
            env["ARMOPT_ARM64_CACHE"] = str(Path(folder) / "arm64")
        start, lines = time.monotonic(), []
        process = subprocess.Popen(
            [str(clone / ".ci" / "run")], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
        if process.wait():
            raise SystemExit(f".ci/run exited with {process.returncode}")
        seconds, text = time.monotonic() - start, "".join(lines)
    took = re.findall(r" in ([\d.]+)s (?:\([\d:]+\) )?=+$", text, re.M)[-1]
    slowest = re.findall(r"^([\d.]+s \w+ +tests/\S.*)$", text, re.M)
    return Run(cold, seconds, float(took), tuple(slowest[-10:]))


def table(runs: list[Run]) -> str:
    """The table, and the ten slowest tests of the last run with a warm cache."""
    rows = ["| cache | `.ci/run` | pytest in it |", "| --- | --- | --- |"]
    rows += [
        f"| {'empty' if run.cold else 'warm'} | {_minutes(run.seconds)} | {_minutes(run.pytest)} |" for run in runs
    ]
    shown = [run for run in runs if not run.cold] or runs
    return "\n".join([*rows, "", "The slowest:", "", *(f"    {line}" for line in shown[-1].slowest)]) + "\n"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="of each kind (3)")
    parser.add_argument("--write", action="store_true", help="write the table into CONTRIBUTING.md")
    options = parser.parse_args()
    runs: list[Run] = []
    for _ in range(options.runs):
        runs += [measure(cold) for cold in (False, True)]
        text = table(sorted(runs, key=lambda run: run.cold))
        print(text, flush=True)
        if options.write:  # after each pair: a later run may fail
            before, _, rest = PAGE.read_text().partition(BEGIN)
            _, _, after = rest.partition(END)
            PAGE.write_text(before + BEGIN + text + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
