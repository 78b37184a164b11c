"""Counts several ways to do one thing on an emulated core: what pointwise.py and attention.py compare."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from armopt import targets
from armopt.emulation.folder import DEFAULT_TORCH
from armopt.ir.records import Target
from armopt.targets.emulated import core_named
from benchmarks.arm64 import counting, cycles, emulated_jobs
from benchmarks.arm64.emulated_jobs import Job, Machine


@dataclass(frozen=True)
class Counter:
    """An emulated core with a torch release, asked for on the command line.

    Attributes:
        target: Whose core it is.
        cpu: The product that is emulated for it.
        torch: The release.
    """

    target: Target
    cpu: str
    torch: str

    @staticmethod
    def asked_for(name: str, description: str | None, arguments: Sequence[str] | None) -> Counter:
        """That of ``--target`` and ``--torch``."""
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.arm64.{name}",
            description=description,
            formatter_class=argparse.RawTextHelpFormatter,
        )
        parser.add_argument("--target", default="graviton3")
        parser.add_argument("--torch", default=DEFAULT_TORCH)
        options = parser.parse_args(arguments)
        target = targets.product(options.target).target
        cpu = "yitian710" if target.core == "neoverse-v2" else options.target  # which runs the same code
        return Counter(target, cpu, options.torch)

    def count(self, jobs: Sequence[Job]) -> dict[int, tuple[int, float]]:
        """Instructions and cycles of a call of each job, but of those that oneDNN has no code for."""
        found: dict[int, tuple[int, float]] = {}

        def keep(index: int, result: Mapping[str, Any]) -> None:
            if "error" in result:
                if "OneDnnError" not in result["error"]:  # which says that it has no code
                    raise RuntimeError(result["error"])
                return
            blocks = cycles.without_python(cycles.blocks_of(result, core_named(self.cpu).name))
            ran = cycles.cycles(blocks, self.target.core)
            found[index] = ran.instructions, ran.cycles

        emulated_jobs.run(
            jobs,
            Machine(self.cpu, self.torch, counting.AS_RUN),
            "benchmarks.arm64.clock_region",
            lambda qemu: f"{qemu.clock},memory=off",
            lambda line: None,
            keep,
        )
        return found
