"""What test_own.py sends to the emulated side."""

import warnings

import torch

from armopt.kernels import post_ops
from armopt.kernels.onednn import compute_library, pointwise, primitives
from armopt.kernels.onednn.workspaces import Workspaces
from armopt.runtime import blas
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


def threads_of_the_compute_library(case, more):
    """A layer is called on as many threads as the library has, and `more`: the library's number, and what is said."""
    compute_library.warn_of_other_threads.cache_clear()
    tensors, before = kernel_cases.operands(case), torch.get_num_threads()
    module, (bound,) = Binder(fast_math=False).bind(kernel_cases.program(case, "graviton3", tensors))
    assert "acl" in bound.implementation, bound
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.set_num_threads(compute_library.threads() + more)
        try:
            module(kernel_cases.activations(case, tensors))
        finally:
            torch.set_num_threads(before)
    return compute_library.threads(), [str(each.message) for each in said]


def product(rows, bias):
    """A Linear of 32 to 48 that BLAS multiplies in an arena, and what PyTorch gives."""
    generator = torch.Generator().manual_seed(0)
    x, weight, added = (torch.randn(*shape, generator=generator) for shape in ((rows, 32), (32, 48), (48,)))
    layer, workspaces = blas.Product(rows, weight, added if bias else None, (rows, 48)), Workspaces()
    workspaces.layers.append(layer)
    workspaces.arena, workspaces.places = layer.size, {0: 0}
    found = layer.function(0)(workspaces.take(), x)
    return found, torch.addmm(added, x, weight) if bias else x.mm(weight)


def functions():
    """By dtype what oneDNN's code runs of the pointwise functions, whether silu is made of a tanh, and how far off."""
    api, taken, furthest = primitives.api(), {}, 0.0
    for dtype in (torch.float32, torch.bfloat16):
        taken[dtype] = {name for name in pointwise.FUNCTIONS if pointwise.takes(name, dtype)}
        for name in taken[dtype]:
            x = torch.linspace(-9, 9, 3001).to(dtype)
            found = x.clone()
            pointwise.in_place(api, name, found)()
            expected = post_ops.apply(name, x.double(), None)
            furthest = max(furthest, float((found - expected).norm() / expected.norm() / torch.finfo(dtype).eps))
    return taken, pointwise.is_quicker_apart("silu"), furthest
