"""What test_own.py sends to the emulated side."""

import warnings

import torch
from torch.nn import functional

from armopt.kernels import post_ops
from armopt.kernels.onednn import compute_library, pointwise, primitives
from armopt.kernels.onednn.attention import Wanted
from armopt.kernels.onednn.workspaces import Workspaces
from armopt.runtime import attend, blas
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


#: Images, heads, queries, keys, size of a head and of the values, and what hides keys.
ATTENTION = (
    *((1, 12, 128, 128, 64, 64, ""), (1, 12, 64, 64, 64, 64, "causal"), (6, 3, 49, 49, 32, 32, "windows")),
    *((2, 2, 10, 77, 40, 24, ""), (1, 2, 200, 197, 80, 80, "padding")),
)


def attention(dtype):
    """Of each that oneDNN has code for: who multiplies, why it is refused, and how far it is from FP64."""
    found = []
    for batch, heads, queries, keys, size, width, mask in ATTENTION:
        wanted = Wanted(batch, heads, queries, keys, size, width, dtype, size**-0.5, mask == "causal")
        added = torch.randn(batch, heads, queries, keys) if mask == "windows" else None
        kinds = {"padding": torch.bool, "windows": torch.float32}
        planned = attend.Planned(wanted, kinds.get(mask), added)
        made, workspaces = attend.make(planned, multiplies_bf16=False), Workspaces()
        if made is None:
            continue
        workspaces.layers.append(made)
        q, k, v = (
            torch.randn(batch, rows, heads, columns).transpose(1, 2).to(dtype)
            for rows, columns in ((queries, size), (keys, size), (keys, width))
        )
        given = torch.arange(keys).expand(batch, 1, 1, -1) < keys // 2 if mask == "padding" else None
        result = made.function(0)(workspaces.take(), q, k, v, given)
        other = added.double() if mask == "windows" else given
        exact = functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), other, is_causal=mask == "causal"
        )
        error = float((result.double() - exact).norm() / exact.norm())
        found.append((made.implementation, attend.refusal(planned, made), error))
    return found
