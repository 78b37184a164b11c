"""Counts a small product in FP32 through PyTorch and through BLAS's own interface, on the emulated Graviton3.

    python -m benchmarks.arm64.blas_calls                  # prints the table
    python -m benchmarks.arm64.blas_calls --torch 2.13.0

Thousands of instructions of one call. Through ctypes `cblas_sgemm` gets what is known beforehand as objects of C, made
once; only the address of the input is asked for. A bias is copied to where the result goes, and added to.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: Rows, inputs and outputs.
SHAPES = ((1, 32, 32), (8, 32, 32), (3, 200, 60), (10, 512, 256), (64, 256, 256))
WAYS = ("mm", "mm, cblas", "addmm", "addmm, cblas")
_COLUMN_MAJOR, _AS_IT_IS = 102, 111


def make(shape: Sequence[int], way: str) -> Callable[[], Any]:
    """One call, on the emulated side; the result of BLAS's own has been compared with PyTorch's."""
    import torch

    torch._C._set_grad_enabled(False)
    m, k, n = shape
    x, weight, bias = torch.randn(m, k), torch.randn(k, n), torch.randn(n)
    if way == "mm":
        return functools.partial(torch.mm, x, weight)
    if way == "addmm":
        return functools.partial(torch.addmm, bias, x, weight)
    y, image = torch.empty(m, n), bias.repeat(m, 1)
    add = way.startswith("addmm")
    at, one, beta = ctypes.c_void_p, ctypes.c_float(1), ctypes.c_float(float(add))
    where, w = at(y.data_ptr()), at(weight.data_ptr())
    if m == 1:
        call = functools.partial(_function("cblas_sgemv"), _COLUMN_MAJOR, _AS_IT_IS, n, k, one, w, n)
        behind: tuple[Any, ...] = (1, beta, where, 1)
    else:
        # rows are the columns of the transposed product
        call = functools.partial(_function("cblas_sgemm"), _COLUMN_MAJOR, _AS_IT_IS, _AS_IT_IS, n, m, k, one, w, n)
        behind = (k, beta, where, n)
    fill = functools.partial(_function("memcpy"), where, at(image.data_ptr()), ctypes.c_size_t(image.nbytes))

    def run() -> torch.Tensor:
        if add:
            fill()
        call(at(x.data_ptr()), *behind)
        return y

    expected = torch.addmm(bias, x, weight) if add else torch.mm(x, weight)
    torch.testing.assert_close(run(), expected, atol=1e-3, rtol=1e-3)
    run.__dict__["memory"] = weight, image
    return run


def _function(name: str) -> Any:
    """A function of the BLAS that this process's PyTorch has, or of C's library, whose arguments are not checked."""
    maps = Path("/proc/self/maps").read_text()
    found = re.search(r"/\S*/torch/lib/\S*(openblas|nvpl_blas_lp64)\S*", maps)
    assert found is not None
    library = ctypes.CDLL(found[0] if name.startswith("cblas") else None)
    return ctypes.CFUNCTYPE(None)(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0)


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
