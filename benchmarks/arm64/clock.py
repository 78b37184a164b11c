"""The clock: fits its figures to some of the timings that others published, and judges it by all others.

    python -m benchmarks.arm64.clock fit        # prints the figures for armopt/targets/*.toml
    python -m benchmarks.arm64.clock judge      # writes docs/clock.md

Both read measures.json, which ``python -m benchmarks.arm64.measuring`` fills.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.optimize import minimize

from armopt import targets
from armopt.targets.clock import Clock, Work
from benchmarks.arm64 import measuring, published
from benchmarks.arm64.measuring import LINE, Measure
from benchmarks.arm64.published import FITTED, Case, Row

#: What is fitted, the same for all products, with bounds; all else has a source of its own.
_BOUNDS = {
    "block_cycles": (1.0, 60.0),
    "fault_us": (0.1, 2.0),
    "llc_gbs": (5.0, 100.0),
    "memory_gbs": (2.0, 45.0),
    "region_us": (0.05, 10.0),
    "overlap": (0.01, 1.0),
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
    second, last = measure.lines_of_all[1], measure.lines_of_all[2]
    return Work(
        cycles=measure.cycles,
        blocks=measure.blocks,
        faults=measure.faults,
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


def judge(figures: Mapping[str, float] | None = None) -> list[Judged]:
    """Every timing that was measured, with the figures of the targets or with others."""
    held = measuring.read()
    found = []
    for row in published.rows():
        if isinstance(row.case, Case) and (measure := held.get(measuring.key(row.case))):
            clock = replace(clock_of(row.case), **(figures or {}))
            time = clock.microseconds(work_of(measure), row.case.threads) / 1e3 * row.case.parts
            found.append(Judged(row, row.case, measure, time))
    return found


def fit() -> dict[str, float]:
    """The figures with the least squares of the logarithms of the ratios, over what they may be fitted to."""
    names = list(_BOUNDS)

    def loss(values: Sequence[float]) -> float:
        ratios = [each.ratio for each in judge(dict(zip(names, values, strict=True))) if each.fitted]
        return sum(min(abs(math.log(ratio)), 1.0) for ratio in ratios)

    best = None
    for start in (0.2, 0.5, 0.8):
        first = [low * (high / low) ** start for low, high in _BOUNDS.values()]
        found = minimize(loss, first, method="Nelder-Mead", bounds=list(_BOUNDS.values()), options={"maxiter": 4000})
        if best is None or found.fun < best.fun:
            best = found
    assert best is not None
    return dict(zip(names, (float(value) for value in best.x), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.arm64.clock", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=("fit", "judge"))
    options = parser.parse_args(arguments)
    figures = fit() if options.command == "fit" else None
    if figures:
        print("\n".join(f"{name} = {value:.3g}" for name, value in figures.items()))
    for each in judge(figures):
        print(f"{each.row.line:4} {'fit' if each.fitted else '   '} {each.ratio:6.2f} {each.row.milliseconds:9.4f} {each.row.where[:20]} {each.case.job.name} {dict(each.case.env)}")
    judging = [each.ratio for each in judge(figures) if not each.fitted]
    errors = sorted(abs(math.log(ratio)) for ratio in judging)
    if errors:
        print(f"median {math.exp(statistics.median(errors)):.2f}, nine of ten {math.exp(errors[int(0.9 * len(errors))]):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
