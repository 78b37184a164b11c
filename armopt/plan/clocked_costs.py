"""Time as cost: what a product's clock makes of the cycles and bytes of each kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from armopt.ir.records import Precision, Site
from armopt.kernels.base import Kernel
from armopt.plan import costs
from armopt.plan.costs import CostTable
from armopt.targets.clock import Clock, Work

#: PyTorch's pointwise operations share so few elements among no threads.
_GRAIN = 32768
#: Cycles of a pointwise operation that was not measured: of a call and of each element; and its blocks.
_MIDDLING = (2000.0, 0.6, 1500.0)


@dataclass(frozen=True, slots=True)
class ClockedCosts:
    """Microseconds of a call on so many threads: an estimate (docs/clock.md).

    Attributes:
        table: The cycles of each kernel.
        clock: Of the product.
        threads: That share a call, each on a core of its own.
        streamed: Whether the graph's weights come from memory: together they don't fit into the last level of cache.
    """

    table: CostTable
    clock: Clock
    threads: int
    streamed: bool = True

    @property
    def name(self) -> str:
        """Whose cycles, and how many threads."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.table.name}; time on {threads}, within {self.clock.error:.1f}x"

    def describe(self, cost: float) -> str:
        """A cost with its unit."""
        return f"about {cost:.3g} us" if cost < 1000 else f"about {cost / 1e3:.3g} ms"

    def of(self, sites: Sequence[Site]) -> ClockedCosts:
        """With the weights of these layers, in BF16, in mind."""
        weights = sum(2 * math.prod(site.weight) for site in sites)
        return replace(self, streamed=weights > self.clock.llc_kib * 1024)

    def estimate(self, kernel: Kernel, site: Site) -> float | None:
        """The time of one call with its post-op; None where its cycles were not measured."""
        variants = self.table.kernels.get(kernel.name)
        if not variants:
            return None
        variant = costs.answering(variants, site)
        if not variant.clocked:
            return None
        serial, *shared = (c * v for c, v in zip(variant.clocked, costs.terms(variant, site), strict=True))
        weights = math.prod(site.weight) * (2 if kernel.precision == Precision.BF16 else 4)
        work = Work(
            cycles=serial + sum(shared) / self.threads,
            blocks=variant.blocks,
            l2_bytes=weights,
            llc_bytes=weights,
            memory_bytes=weights if self.streamed else 0,
            regions=1,
        )
        behind = sum(self.pointwise(name, site.m * site.n) for name in costs.unfused(kernel, site))
        return self.clock.microseconds(work, self.threads) + behind

    def pointwise(self, name: str, elements: int) -> float:
        """The time of one pointwise operation; a middling one where it was not measured."""
        call, element, blocks = self.table.pointwise_cycles.get(name, _MIDDLING)
        threads = max(1, min(self.threads, -(-elements // _GRAIN)))
        work = Work(call + element * elements / threads, blocks, regions=float(threads > 1))
        return self.clock.microseconds(work, self.threads)

    def attention(self, dtype: str, heads: int, scores: int, products: int) -> float:
        """The time of attention; zero where it was not measured."""
        head, score, product = self.table.attention_cycles.get(dtype, (0.0, 0.0, 0.0))
        cycles = (head * heads + score * scores + product * products) / self.threads
        return self.clock.microseconds(Work(cycles), self.threads)
