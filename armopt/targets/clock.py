"""What turns work into time on a product: an estimate, from a few figures that each mean something (docs/clock.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """What one call of something does.

    Attributes:
        cycles: That the instructions of the thread that calls need, with all data in its first cache.
        blocks: Different blocks of instructions that it runs.
        faults: Minor page faults.
        l2_bytes: That come to the first level of the cores' caches from the second, and go back; of all threads.
        llc_bytes: That come to the cores from the last level of cache or from memory, and go back; of all threads.
        memory_bytes: That come to the last level from memory and go back.
        regions: Parallel regions that it opens.
    """

    cycles: float
    blocks: float = 0.0
    faults: float = 0.0
    l2_bytes: float = 0.0
    llc_bytes: float = 0.0
    memory_bytes: float = 0.0
    regions: float = 0.0


@dataclass(frozen=True, slots=True)
class Clock:
    """The figures of a product, as the table ``[clock]`` of its TOML has them.

    Attributes:
        ghz: Cycles in a nanosecond.
        llc_kib: The last level of cache, which all cores share.
        block_cycles: Cycles for finding a block of instructions, once a call: its lines of code, where it branches to.
        fault_us: Microseconds that the operating system needs for a page of 4 KiB that is touched first.
        l2_gbs: GB/s between a core and its second level of cache.
        llc_gbs: GB/s between one core and the last level of cache.
        memory_gbs: GB/s between one core and memory.
        memory_gbs_all: GB/s between all cores and memory.
        region_us: Microseconds for starting and awaiting threads, per parallel region and doubling of the threads,
            where they spin in between.
        wake_us: The same where they sleep in between.
        error: Nine of ten published timings lie within this factor of the estimate.
        usual_threads: Of the instance that is meant where nobody says how many.
    """

    ghz: float
    llc_kib: int
    block_cycles: float
    fault_us: float
    l2_gbs: float
    llc_gbs: float
    memory_gbs: float
    memory_gbs_all: float
    region_us: float
    wake_us: float
    error: float
    usual_threads: int

    def microseconds(self, work: Work, threads: int, *, sleeps: bool = False) -> float:
        """The time of a call, whose work is of the thread that calls and of bytes that `threads` threads move.

        Args:
            work: The call.
            threads: That share it, each on a core of its own.
            sleeps: Whether they sleep between two regions.
        """
        arithmetic = (work.cycles + work.blocks * self.block_cycles) / self.ghz / 1e3
        memory = work.memory_bytes / min(threads * self.memory_gbs, self.memory_gbs_all)
        # data streams through all levels at once: the slowest one counts
        moving = max(work.l2_bytes / self.l2_gbs / threads, work.llc_bytes / self.llc_gbs / threads, memory) / 1e3
        waiting = work.regions * math.log2(threads) * (self.wake_us if sleeps else self.region_us)
        return arithmetic + moving + work.faults * self.fault_us + waiting
