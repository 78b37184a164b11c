"""Makes the cost tables in armopt/plan/costs: counts every kernel on a grid of shapes, then fits what a call costs.

    python -m benchmarks.arm64.costs measure --cpu graviton3 --torch 2.10.0     # adds what is missing to the samples
    python -m benchmarks.arm64.costs fit                                        # writes armopt/plan/costs/*.json
    python -m benchmarks.arm64.costs compare --torch 2.15.0 --known 2.13.0      # does a release's table do for another

Samples are kept in benchmarks/arm64/samples, one file for each core and torch release: instructions by class for each
kernel and shape, and the floor M * N * K / 32, the BFMMLA instructions of 256 bits that the product needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from armopt.emulation.folder import DEFAULT_TORCH, NEWEST_TORCH
from benchmarks.arm64 import sampling, tables


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.arm64.costs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--cpu", default="graviton3")
    measuring.add_argument("--torch", default=DEFAULT_TORCH)
    measuring.add_argument("--only", default="", help="kernels whose name holds this")
    commands.add_parser("fit")
    comparing = commands.add_parser("compare")
    comparing.add_argument("--cpu", default="graviton3")
    comparing.add_argument("--torch", default=NEWEST_TORCH)
    comparing.add_argument("--known", default="2.13.0", help="the release that has samples")
    comparing.add_argument("--every", type=int, default=16, help="count one of so many samples")
    options = parser.parse_args(arguments)
    if options.command == "measure":
        sampling.measure(options.cpu, options.torch, options.only)
        return 0
    if options.command == "compare":
        rows = sampling.compare(options.cpu, options.torch, options.known, options.every)
        print(tables.table(rows, ["kernel", "samples", "within 5 %", "median", "furthest", "where"]))
        return 0
    from benchmarks.arm64 import fitting  # scipy, which counting does not need

    for path in sorted(sampling.SAMPLES.glob("*.json")):
        fitting.fit(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
