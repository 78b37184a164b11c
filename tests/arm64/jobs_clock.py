"""Jobs about what the clock's calls are measured with."""

import ctypes

import torch

from benchmarks.arm64 import clock_region, profile


def blas_threads(count: int) -> int:
    """How many threads PyTorch's BLAS would use after it was told."""
    clock_region.set_threads(count)
    assert torch.get_num_threads() == count
    (path,) = {path for *_, path in profile.mappings() if "libopenblas" in path}
    return int(ctypes.CDLL(path).openblas_get_num_threads())
