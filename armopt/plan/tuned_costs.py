"""A host's own times as costs, in the unit of what is known without them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from armopt.ir.records import Site
from armopt.kernels import table
from armopt.kernels.base import Kernel
from armopt.kernels.timings import Timings
from armopt.plan.clocked_costs import ClockedCosts
from armopt.plan.costs import CostTable


@dataclass(frozen=True, slots=True)
class TunedCosts:
    """Measured times where there are any, a table or the clock elsewhere, in its unit.

    Attributes:
        tuning: The times.
        costs: What is known of the core; None for a host that has none, where times alone count.
    """

    tuning: Timings
    costs: CostTable | ClockedCosts | None = None

    @property
    def name(self) -> str:
        """The host that was measured."""
        return f"tuned on {self.tuning.host.get('core', 'a host')}, torch {self.tuning.host.get('torch', '')}"

    def describe(self, cost: float) -> str:
        """A cost with its unit: a time, or a time in the table's unit."""
        return f"{cost / 1e3:.3g} us here" if self.costs is None else f"{self.costs.describe(cost)}, by time here"

    def of(self, sites: Sequence[Site]) -> TunedCosts:
        """With what is not timed as it is in a graph with these layers."""
        return self if self.costs is None else replace(self, costs=self.costs.of(sites))

    def estimate(self, kernel: Kernel, site: Site) -> float | None:
        """The time of a kernel on a site, scaled to the table's unit by what both know of the site."""
        times = self.tuning.of(site)
        if not times:
            return None if self.costs is None else self.costs.estimate(kernel, site)
        if kernel.name not in times:
            return None
        return times[kernel.name] * self._scale(times, site)

    def pointwise(self, name: str, elements: int) -> float:
        """As in the table; where there is none, a microsecond and a third of a nanosecond for each element."""
        return 1000 + 0.3 * elements if self.costs is None else self.costs.pointwise(name, elements)

    def attention(self, dtype: str, heads: int, scores: int, products: int) -> float:
        """It is not timed."""
        return 0.0

    def _scale(self, times: Mapping[str, float], site: Site) -> float:
        if self.costs is None:
            return 1e9
        known = {name: self.costs.estimate(table.get(name), site) for name in times}
        ratios = [cost / times[name] for name, cost in known.items() if cost is not None]
        return statistics.median(ratios) if ratios else 1e9
