"""Optimizes, loads and compares every known model for one target: docs/coverage.md.

    python -m benchmarks.coverage                        # all, prints the table
    python -m benchmarks.coverage --write                # all, and writes docs/coverage.md
    python -m benchmarks.coverage --only resnet18 bert   # some; with --write the others' rows stay as last measured
    python -m benchmarks.coverage --resume --write       # those that went through before are not measured again
    python -m benchmarks.coverage --only none --write    # writes what was measured so far

Each model runs in a process of its own with a time limit: one model in memory at a time, and one that crashes fails
its own row. The bundle goes to a temporary folder and is removed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: and a process without threads can be forked
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.coverage import huggingface, page, processes, timm, torchvision
from benchmarks.coverage.cases import Case
from benchmarks.coverage.measure import passed
from benchmarks.coverage.page import NOT_YET

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / ".cache" / "coverage"  # one file for each model, so that some can be measured again
PAGE = ROOT / "docs" / "coverage.md"


def cases() -> list[Case]:
    """All models, in the order of the page."""
    return [*torchvision.cases(), *timm.cases(), *huggingface.cases()]


def run(wanted: Sequence[Case], limit: float, resume: bool) -> None:
    """Measures each model, giants last, and keeps its result."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    processes.warm_up()
    for i, case in enumerate(sorted(wanted, key=lambda case: case.parameters), start=1):
        stored = _stored(case)
        if resume and stored.is_file() and passed(json.loads(stored.read_text())):
            continue
        print(f"[{i}/{len(wanted)}] {case.name}: ", end="", flush=True, file=sys.stderr)
        row = processes.apart(case, limit, stored.with_suffix(".log"))
        stored.write_text(json.dumps(row, indent=1))
        figures = "" if "error" in row else f"{row['form']}, {row['share']:.0%}, cosine {row['cosine']:.6f}"
        print(row.get("error") or f"{figures} ({row['seconds']} s)", file=sys.stderr, flush=True)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models, families or sections alone")
    parser.add_argument("--write", action="store_true", help="write docs/coverage.md")
    parser.add_argument("--resume", action="store_true", help="skip models that went through before")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="for each model (900)")
    options = parser.parse_args()
    every = cases()
    asked = set(options.only or ()) - {"none"}
    wanted = [case for case in every if not options.only or asked & {case.name, case.family, case.section}]
    if unknown := asked - {name for case in wanted for name in (case.name, case.family, case.section)}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if wanted:
        run(wanted, options.limit, options.resume)
    rows = [_row(case) for case in (every if options.write else wanted)]
    if options.write:
        PAGE.write_text(page.page(rows))
        print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)
    else:
        print(page.table(rows))
    failed = [row["model"] for row in rows if not passed(row)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _row(case: Case) -> dict[str, Any]:
    """What was measured of a model, last."""
    if _stored(case).is_file():
        return dict(json.loads(_stored(case).read_text()))
    return {"section": case.section, "family": case.family, "model": case.name, "error": NOT_YET}


def _stored(case: Case) -> Path:
    return RESULTS / f"{case.section}-{case.name}.json".replace(" ", "-").replace("/", "-")


if __name__ == "__main__":
    sys.exit(main())
