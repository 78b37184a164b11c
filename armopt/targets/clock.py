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
        llc_bytes: That come to the cores from the last level of cache or from memory, and go back; of all threads.
        memory_bytes: That come to the last level from memory and go back.
        regions: Parallel regions that it opens.
    """

    cycles: float
    blocks: float = 0.0
    faults: float = 0.0
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
        fault_us: Of the kernel for one page, in microseconds.
        llc_gbs: GB/s between one core and the last level of cache.
        memory_gbs: GB/s between one core and memory.
        memory_gbs_all: GB/s between all cores and memory.
        region_us: Microseconds for waking and awaiting threads, per parallel region and doubling of the threads.
        overlap: The share of the smaller of the two, arithmetic and moving bytes, that is hidden behind the other.
        error: Nine of ten published timings lie within this factor of the estimate.
    """

    ghz: float
    llc_kib: int
    block_cycles: float
    fault_us: float
    llc_gbs: float
    memory_gbs: float
    memory_gbs_all: float
    region_us: float
    overlap: float
    error: float

    def microseconds(self, work: Work, threads: int) -> float:
        """The time of a call, whose work is of the thread that calls and of bytes that `threads` threads move.

        Args:
            work: The call.
            threads: That share it, each on a core of its own.
        """
        arithmetic = (work.cycles + work.blocks * self.block_cycles) / self.ghz / 1e3
        rate = min(threads * self.memory_gbs, self.memory_gbs_all)
        bytes_ = (work.memory_bytes / rate + work.llc_bytes / (threads * self.llc_gbs)) / 1e3
        hidden = self.overlap * min(arithmetic, bytes_)
        waiting = work.regions * self.region_us * math.log2(threads) if threads > 1 else 0.0
        return arithmetic + bytes_ - hidden + work.faults * self.fault_us + waiting
