"""All kernels, one line each, in the order of preference: of plans, of what a load falls back to, and of repair."""

from __future__ import annotations

from armopt.errors import InputError
from armopt.ir.records import Backend, Op
from armopt.kernels import (
    aten,
    blas_fp32,
    conv1x1_bf16,
    conv1x1_fastmath,
    conv1x1_fp32,
    conv_bf16,
    conv_blas_fp32,
    conv_direct_fp32,
    conv_fastmath,
    conv_fp32,
    conv_merged_fp32,
    conv_transpose_fp32,
    linear_fastmath,
)
from armopt.kernels.base import Kernel, Use

_KERNELS = [
    conv1x1_bf16.KERNEL,
    conv1x1_fastmath.KERNEL,
    conv1x1_fp32.KERNEL,
    linear_fastmath.KERNEL,
    blas_fp32.KERNEL_BF16_WEIGHTS,
    blas_fp32.KERNEL,
    conv_bf16.KERNEL,
    conv_fastmath.KERNEL,
    conv_fp32.KERNEL,
    conv_direct_fp32.KERNEL,
    conv_merged_fp32.KERNEL,
    conv_transpose_fp32.KERNEL,
    conv_blas_fp32.KERNEL_BF16_WEIGHTS,
    conv_blas_fp32.KERNEL,
    aten.LINEAR,
    aten.CONV,
]


def kernels(op: Op | None = None, *uses: Use) -> tuple[Kernel, ...]:
    """The kernels for an operation that have one of these uses; all where nothing is said."""
    return tuple(k for k in _KERNELS if op in (None, k.op) and (not uses or not k.uses.isdisjoint(uses)))


def get(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        InputError: There is none: the bundle comes from another version of armopt.
    """
    for kernel in _KERNELS:
        if kernel.name == name:
            return kernel
    raise InputError(
        f"unknown kernel {name!r}",
        hint="The bundle needs another version of armopt: see armopt_version in its manifest.json",
    )


def plain(op: Op) -> Kernel:
    """Plain ATen, which takes every site."""
    return next(kernel for kernel in kernels(op) if kernel.backend == Backend.ATEN)


def register(kernel: Kernel, *, before: str = "") -> None:
    """Adds a kernel of another package: to plans, loads, repair, drawings and documentation.

    Args:
        kernel: The kernel.
        before: The kernel that it is preferred to; plain ATen if nothing is said.

    Raises:
        InputError: There is one of that name, or none called `before`.
    """
    if any(other.name == kernel.name for other in _KERNELS):
        raise InputError(f"there is a kernel {kernel.name!r} already", hint="Give it another name")
    _KERNELS.insert(_KERNELS.index(get(before) if before else plain(kernel.op)), kernel)


def unregister(kernel: Kernel) -> None:
    """Takes a kernel out again."""
    _KERNELS.remove(kernel)
