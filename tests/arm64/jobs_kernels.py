"""What test_rounding.py sends to the emulated side."""

import torch

from armopt.runtime.bind import Binder
from tests.arm64 import kernel_cases


def run(cases, target, threads=1):
    """For each case what the kernel gave, the kernel that ran, and why it is another one than asked for."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = []
    try:
        for case in cases:
            tensors = kernel_cases.operands(case)
            program = kernel_cases.program(case, target, tensors)
            module, (bound,) = Binder(fast_math=True).bind(program)
            with torch.no_grad():
                (result,) = module(kernel_cases.activations(case, tensors))
            found.append((result.contiguous(), bound.kernel, bound.reason))
    finally:
        torch.set_num_threads(before)
    return found
