"""Counts a small product in FP32 through PyTorch and through BLAS's own interface, on the emulated Graviton3.

    python -m benchmarks.arm64.blas_calls                  # prints the table
    python -m benchmarks.arm64.blas_calls --torch 2.13.0

Thousands of instructions of one call. The direct way is what bundles run for a layer with a bias
(armopt/runtime/blas.py): the result is in the arena, and the input too or the caller's own. PyTorch's way makes a new
result.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

#: Rows, inputs and outputs.
SHAPES = ((1, 32, 32), (8, 32, 32), (3, 200, 60), (10, 512, 256), (64, 256, 256))
WAYS = ("mm", "addmm", "direct, caller's input", "direct")


def make(shape: Sequence[int], way: str) -> Callable[[], Any]:
    """One call, on the emulated side."""
    import torch

    from armopt.kernels.onednn.arguments import keep
    from armopt.kernels.onednn.workspaces import Workspaces
    from armopt.runtime import blas

    torch._C._set_grad_enabled(False)
    m, k, n = shape
    x, weight, bias = torch.randn(m, k), torch.randn(k, n), torch.randn(n)
    if way == "mm":
        return functools.partial(torch.mm, x, weight)
    if way == "addmm":
        return functools.partial(torch.addmm, bias, x, weight)
    layer, workspaces = blas.Product(m, weight, bias, (m, n)), Workspaces()
    workspaces.layers.append(layer)
    workspaces.arena, workspaces.places = layer.size, {0: 0}
    workspace, call = workspaces.take(), layer.function(0)
    torch.testing.assert_close(call(workspace, x), torch.addmm(bias, x, weight), rtol=0, atol=0)
    if way == "direct":
        keep(x)
    return functools.partial(call, workspace, x)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from armopt.emulation.folder import DEFAULT_TORCH
    from benchmarks.arm64 import counting, tables
    from benchmarks.arm64.emulated_jobs import Job

    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm64.blas_calls", description=__doc__)
    parser.add_argument("--torch", default=DEFAULT_TORCH)
    options = parser.parse_args(arguments)
    keys = [(shape, way) for shape in SHAPES for way in WAYS]
    place = "benchmarks.arm64.blas_calls:make"
    jobs = [Job(str(key), place, {"shape": list(key[0]), "way": key[1]}, 2) for key in keys]
    counts = dict(zip(keys, counting.count(jobs, torch_version=options.torch), strict=True))
    failed = [counted.error for counted in counts.values() if counted.error]
    if failed:
        print(failed[0], file=sys.stderr)
        return 1
    rows = [
        [f"{m} x {k} to {n}", *(f"{counts[(m, k, n), way].total / 1e3:,.1f}" for way in WAYS)] for m, k, n in SHAPES
    ]
    print(tables.table(rows, ["product", *WAYS]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
