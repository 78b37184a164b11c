"""The clock: fits its figures to some of the timings that others published, and judges it by all others.

    python -m benchmarks.arm64.clock fit        # prints the figures for armopt/targets/*.toml
    python -m benchmarks.arm64.clock judge      # writes docs/clock.md
    python -m benchmarks.arm64.clock compare FILE…     # judges by what `armopt tune --report` wrote on real machines

The first two read measures.json, which ``python -m benchmarks.arm64.measuring`` fills.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from armopt import targets
from armopt.emulation.folder import DEFAULT_TORCH
from armopt.plan import clock_report, costs
from armopt.targets.clock import Clock, Work
from benchmarks.arm64 import measuring, published, tables
from benchmarks.arm64.measuring import LINE, Measure
from benchmarks.arm64.published import FITTED, Case, Row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clock.md"
BEGIN, END = "<!-- judged: python -m benchmarks.arm64.clock judge -->", "<!-- end of judged -->"
#: Bytes of one.
_PAGE = 4096
#: Published times nearer to each other than this have no order.
_EQUAL = 1.05
#: What is fitted, the same for all products, with bounds; all else has a source of its own.
_BOUNDS = {
    "block_cycles": (1.0, 60.0),
    "fault_us": (0.2, 1.5),
    "region_us": (0.05, 10.0),
    "wake_us": (0.1, 30.0),
}


@dataclass(frozen=True)
class Judged:
    """A published timing with its estimate, in milliseconds."""

    row: Row
    case: Case
    measure: Measure
    estimate: float

    @property
    def ratio(self) -> float:
        """Estimated over published."""
        return self.estimate / self.row.milliseconds

    @property
    def fitted(self) -> bool:
        """Whether the figures were fitted to it."""
        return self.row.line in FITTED


def work_of(measure: Measure) -> Work:
    """What the clock takes of a measure."""
    first, second, last = measure.lines_of_all
    return Work(
        cycles=measure.cycles,
        blocks=measure.blocks,
        faults=measure.faults,
        l2_bytes=LINE * sum(first),
        llc_bytes=LINE * sum(second),
        memory_bytes=LINE * sum(last),
        regions=measure.regions,
    )


def clock_of(case: Case) -> Clock:
    """The clock of the product that a timing is of."""
    clock = targets.product(case.target).clock
    if clock is None:
        raise ValueError(f"{case.target} has no clock")
    return clock


def estimate(case: Case | None, held: Mapping[str, Measure]) -> float | None:
    """Milliseconds of a call; None where it was not measured."""
    measure = held.get(measuring.key(case)) if case else None
    if case is None or measure is None:
        return None
    return clock_of(case).microseconds(work_of(measure), case.threads) / 1e3 * case.parts


def judge(held: Mapping[str, Measure], figures: Mapping[str, float] | None = None) -> list[Judged]:
    """Every timing that was measured, with the figures of the targets or with others."""
    found = []
    for row in published.rows():
        if isinstance(row.case, Case) and (measure := held.get(measuring.key(row.case))):
            clock = replace(clock_of(row.case), **(figures or {}))
            if row.case.huge_pages:  # one fault for 512 pages: what is left is that the kernel clears them
                clock = replace(clock, fault_us=_PAGE / clock.memory_gbs / 1e3)
            time = clock.microseconds(work_of(measure), row.case.threads, sleeps=row.case.sleeps) / 1e3 * row.case.parts
            found.append(Judged(row, row.case, measure, time))
    return found


def fit() -> dict[str, float]:
    """The figures of the least sum of the ratios' logarithms, over what they may be fitted to; no ratio counts for more
    than a factor of e.
    """
    from scipy.optimize import differential_evolution  # which judging does not need

    held = measuring.read()

    def loss(values: Sequence[float]) -> float:
        ratios = [each.ratio for each in judge(held, dict(zip(_BOUNDS, values, strict=True))) if each.fitted]
        return sum(min(abs(math.log(ratio)), 1.0) for ratio in ratios)

    found = differential_evolution(loss, list(_BOUNDS.values()), seed=1, tol=1e-6)
    return dict(zip(_BOUNDS, map(float, found.x), strict=True))


def spread(ratios: Sequence[float]) -> tuple[float, float]:
    """The factor within which half of the estimates lie, and nine of ten."""
    errors = sorted(abs(math.log(ratio)) for ratio in ratios)
    return math.exp(statistics.median(errors)), math.exp(errors[math.ceil(0.9 * len(errors)) - 1])


def order(found: Sequence[Judged]) -> tuple[int, int]:
    """Pairs within a published table whose order is right, and all pairs that have one."""
    right = pairs = 0
    tables_of = {each.row.where for each in found}
    for where in tables_of:
        for a, b in itertools.combinations([each for each in found if each.row.where == where], 2):
            published_ratio = a.row.milliseconds * a.case.parts / (b.row.milliseconds * b.case.parts)
            if max(published_ratio, 1 / published_ratio) > _EQUAL:
                pairs += 1
                right += (published_ratio > 1) == (a.estimate * a.case.parts > b.estimate * b.case.parts)
    return right, pairs


def page(found: Sequence[Judged]) -> str:
    """The part of docs/clock.md that a run of this makes."""
    judging = [each for each in found if not each.fitted]
    half, nine = spread([each.ratio for each in judging])
    fitted_half, fitted_nine = spread([each.ratio for each in found if each.fitted])
    right, pairs = order(found)
    lines = [
        f"Of {len(published.rows())} published points {len(found)} were measured on the emulated machine. The figures "
        f"were fitted to {len(found) - len(judging)} of them; the other {len(judging)} judge.",
        "",
        tables.table(
            [
                ["those that judge", f"{half:.2f}x", f"{nine:.2f}x"],
                ["those that it was fitted to", f"{fitted_half:.2f}x", f"{fitted_nine:.2f}x"],
                ["goal", "1.20x", "1.50x"],
            ],
            ["", "half of the estimates lie within", "nine of ten within"],
        ),
        "",
        f"Within the published tables {right} of {pairs} pairs of times are in the right order.",
        "",
        "## Every point",
        "",
        "Milliseconds. A row is a line of benchmarks/arm64/published.csv, which names the source.",
        "",
        tables.table([_cells(each) for each in found], _COLUMNS),
        "",
        "## What can't be reproduced",
        "",
    ]
    measured = {each.row.line for each in found}
    reasons = Counter(
        row.case if isinstance(row.case, str) else "not measured: the emulator needs an hour or more for each"
        for row in published.rows()
        if row.line not in measured
    )
    lines.append(tables.table([[reason, str(count)] for reason, count in reasons.most_common()], ["reason", "points"]))
    return "\n".join(lines)


_COLUMNS = ["line", "source", "call", "torch", "threads", "published", "estimate", "ratio", ""]


def _cells(each: Judged) -> list[str]:
    setting = ", ".join(f"{name}={value}" for name, value in each.case.env.items())
    call = f"{each.case.job.name}{', ' + setting if setting else ''}"
    times = (f"{each.row.milliseconds:.4g}", f"{each.estimate:.4g}", f"{each.ratio:.2f}")
    source, torch = each.row.where.split(",")[0], each.case.torch
    return [str(each.row.line), source, call, torch, str(each.case.threads), *times, "fitted" if each.fitted else ""]


def figures_table() -> str:
    """The figures of every product that has a clock."""
    products = [targets.product(name) for name in targets.names()]
    clocks = {product.target.name: product.clock for product in products if product.clock}
    rows = [[f.name, *(f"{getattr(clock, f.name):g}" for clock in clocks.values())] for f in fields(Clock)]
    held = [(costs.find(targets.load(name), DEFAULT_TORCH), targets.load(name).core) for name in clocks]
    counted = ["yes" if found and found.has_cycles and found.core == core else "no" for found, core in held]
    return tables.table([*rows, ["kernels' cycles are measured", *counted]], ["figure", *clocks])


def compare(reports: Sequence[Path]) -> str:
    """What each report of a real machine says of the clock."""
    rows = []
    for path in reports:
        report = json.loads(path.read_text())
        middle, half, nine = clock_report.spread(report["points"])
        who = [report["product"], report["host"].get("torch", ""), str(report["threads"]), str(len(report["points"]))]
        rows.append([path.name, *who, f"{middle:.2f}", f"{half:.2f}x", f"{nine:.2f}x"])
    headers = [
        "report",
        "product",
        "torch",
        "threads",
        "points",
        "estimate / time",
        "half within",
        "nine of ten within",
    ]
    return tables.table(rows, headers)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.arm64.clock", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=("fit", "judge", "compare"))
    parser.add_argument("reports", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "compare":
        print(compare(options.reports))
        return 0
    figures = fit() if options.command == "fit" else None
    found = judge(measuring.read(), figures)
    if figures:
        print("\n".join(f"{name} = {value:.3g}" for name, value in figures.items()))
        print(tables.table([_cells(each) for each in found], _COLUMNS))
        print(
            "judged: half within {:.2f}x, nine of ten within {:.2f}x".format(
                *spread([e.ratio for e in found if not e.fitted])
            )
        )
        print("order: {} of {}".format(*order(found)))
        return 0
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    made = f"{figures_table()}\n\n{page(found)}"
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
