"""What test_own.py sends to the emulated side."""

import torch

from armopt.runtime.bind import Binder
from tests.arm64 import jobs_bundles, kernel_cases


def run(cases, target, fast_math=False, own=True, threads=1):
    """For each case what the kernel gave, and what the layer got; with primitives of its own or without."""
    before = torch.get_num_threads()
    if not own:
        jobs_bundles.turn_off_own_primitives()
    torch.set_num_threads(threads)
    found = []
    try:
        for case in cases:
            tensors = kernel_cases.operands(case)
            module, (bound,) = Binder(fast_math=fast_math).bind(kernel_cases.program(case, target, tensors))
            with torch.no_grad():
                (result,) = module(kernel_cases.activations(case, tensors))
            found.append((result.contiguous(), bound))
    finally:
        torch.set_num_threads(before)
    return found
