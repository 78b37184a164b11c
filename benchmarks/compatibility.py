"""Runs the tests on one release of torch and one host, and keeps what came of it for docs/compatibility.md.

    python -m benchmarks.compatibility x86 --torch 2.15.0         # in build/torch-2.15.0: a virtual environment with it
    python -m benchmarks.compatibility graviton3 --torch 2.15.0   # on the emulated core; also yitian710, graviton2
    python -m benchmarks.compatibility --write                    # writes the page

On x86 the tests of units and passes run, but for the slow ones; on a core all tests of tests/arm64 that take a release.
Failures are kept too. A release, its CUDA libraries included, takes 5 GB in build/; another interpreter that has it is
named by --python.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.version import Version

from armopt.emulation.folder import NEWEST_TORCH, torch_requirements

ROOT = Path(__file__).resolve().parents[1]
KEPT = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- runs: python -m benchmarks.compatibility --write -->\n", "<!-- end of runs -->\n"
X86 = "x86"
#: Emulated cores by product.
CORES = {"graviton3": "Neoverse-V1", "yitian710": "Neoverse-N2", "graviton2": "Neoverse-N1"}
#: What runs, as arguments of pytest.
ON_X86 = ("-m", "not slow", "tests/unit", "tests/passes")


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one run.

    Attributes:
        torch: The release.
        host: ``x86``, or the product of an emulated core.
        what: What ran, as arguments of pytest.
        passed: Tests that passed.
        failed: Tests that failed, and what can't be set up.
        skipped: Tests that say that they can't run there.
        failures: Their names.
        date: Of the run, ISO 8601.
    """

    torch: str
    host: str
    what: str
    passed: int
    failed: int
    skipped: int
    failures: tuple[str, ...]
    date: str


def run(host: str, release: str, python: Path | None, selected: Sequence[str] = ()) -> Run:
    """Runs the tests; shows their output as it comes.

    Args:
        host: Where.
        release: Of torch.
        python: An interpreter that has it, for x86; None makes one.
        selected: More arguments of pytest, which are kept with what came of it.

    Raises:
        SystemExit: pytest did not run to its end.
    """
    if host == X86:
        chosen, what = str(python or _environment(release)), [*ON_X86, *selected]
    else:
        what = ["--full", "--arm64", f"--newest-torch={release}", "tests/arm64", "-k", f"{host}-newest", *selected]
        chosen = sys.executable
    command = [chosen, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-ra", "-q", *what]
    lines = []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    if process.returncode not in (0, 1):
        raise SystemExit(f"pytest exited with {process.returncode}")
    return read(lines, host, release, " ".join(f"'{word}'" if " " in word else word for word in what))


def read(lines: Sequence[str], host: str, release: str, what: str) -> Run:
    """What pytest's last lines say."""
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    failures = tuple(found[1] for line in lines if (found := re.match(r"(?:FAILED|ERROR) (\S+)", line)))
    failed = counts.get("failed", 0) + counts.get("error", 0)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Run(release, host, what, counts.get("passed", 0), failed, counts.get("skipped", 0), failures, today)


def _environment(release: str) -> Path:
    """The interpreter of a virtual environment with that release and all that tests need."""
    folder = ROOT / "build" / f"torch-{release}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
    subprocess.run([*install, *torch_requirements(release), "--editable", f"{ROOT}[dev]"], check=True)
    return python


def load() -> list[Run]:
    """The runs that are kept."""
    return [Run(**{**entry, "failures": tuple(entry["failures"])}) for entry in json.loads(KEPT.read_text())]


def keep(done: Run) -> None:
    """Keeps a run in place of an earlier one of the same tests."""
    runs = {(each.torch, each.host, each.what): each for each in load()}
    runs[done.torch, done.host, done.what] = done
    ordered = sorted(runs.values(), key=_place)
    KEPT.write_text(json.dumps([asdict(each) for each in ordered], indent=1) + "\n")


def _place(each: Run) -> tuple[Version, int, str]:
    return Version(each.torch), [X86, *CORES].index(each.host), each.what


def table(runs: Iterable[Run]) -> str:
    """The table of the page."""
    rows = [
        "| torch | host | passed | failed | skipped | date | tests |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in sorted(runs, key=_place):
        host = f"{CORES[each.host]}, emulated" if each.host in CORES else each.host
        counts = f"{each.passed} | {each.failed} | {each.skipped}"
        rows.append(f"| {each.torch} | {host} | {counts} | {each.date} | `{each.what}` |")
    return "\n".join(rows) + "\n"


def page(text: str, runs: Iterable[Run]) -> str:
    """The page with its table anew."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(runs) + END + rest.partition(END)[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("host", nargs="?", choices=[X86, *CORES])
    parser.add_argument("--torch", default=NEWEST_TORCH, metavar="RELEASE")
    parser.add_argument("--python", type=Path, help="an interpreter that has that release, for x86")
    parser.add_argument("--write", action="store_true", help="write docs/compatibility.md")
    options, selected = parser.parse_known_args(arguments)
    failed = 0
    if options.host:
        done = run(options.host, options.torch, options.python, selected)
        keep(done)
        failed = done.failed
    if options.write:
        PAGE.write_text(page(PAGE.read_text(), load()))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
