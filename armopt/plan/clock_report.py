"""A host's own times beside the clock's estimates: by them whoever has the hardware can judge the clock. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from armopt.ir.records import Site
from armopt.kernels import table
from armopt.kernels.timings import Timings
from armopt.plan.clocked_costs import ClockedCosts

SCHEMA = 1


def make(times: Timings, sites: Iterable[Site], costs: ClockedCosts, product: str) -> dict[str, Any]:
    """The report: what was measured and estimated, and no more of the host than its core, torch and threads.

    Args:
        times: Seconds of each kernel on each site.
        sites: What was measured.
        costs: Of the product, at as many threads.
        product: Whose clock it is.
    """
    held = costs.of(())  # a kernel that is timed alone finds its weights in the cache, where they fit
    points = [
        {
            "op": site.op,
            "input": list(site.shape),
            "weight": list(site.weight),
            "post_op": site.post_op,
            "kernel": name,
            "measured_us": round(seconds * 1e6, 3),
            "estimated_us": round(estimate, 3),
        }
        for site in sites
        for name, seconds in times.of(site).items()
        if (estimate := held.estimate(table.get(name), site)) is not None
    ]
    return {
        "schema_version": SCHEMA,
        "product": product,
        "threads": costs.threads,
        "host": {name: times.host[name] for name in ("core", "torch") if name in times.host},
        "clock": asdict(costs.clock),
        "cycles": costs.table.name,
        "points": points,
    }


def spread(points: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Estimated over measured: its median; and the factors around 1 within which half and nine of ten lie."""
    logs = sorted(math.log(point["estimated_us"] / point["measured_us"]) for point in points)
    errors = sorted(map(abs, logs))
    nine = errors[math.ceil(0.9 * len(errors)) - 1]
    return math.exp(statistics.median(logs)), math.exp(statistics.median(errors)), math.exp(nine)
