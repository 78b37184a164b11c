"""All kernels, by name."""

from __future__ import annotations

from armopt.errors import InputError
from armopt.kernels import (
    aten,
    blas_fp32,
    conv1x1_bf16,
    conv1x1_fastmath,
    conv1x1_fp32,
    conv_bf16,
    conv_blas_fp32,
    conv_fastmath,
    conv_fp32,
    conv_merged_fp32,
    conv_transpose_fp32,
    linear_fastmath,
)
from armopt.kernels.base import Kernel

ALL = (
    conv1x1_bf16.KERNEL,
    conv1x1_fastmath.KERNEL,
    conv1x1_fp32.KERNEL,
    linear_fastmath.KERNEL,
    blas_fp32.KERNEL,
    blas_fp32.KERNEL_BF16_WEIGHTS,
    conv_bf16.KERNEL,
    conv_fastmath.KERNEL,
    conv_fp32.KERNEL,
    conv_merged_fp32.KERNEL,
    conv_transpose_fp32.KERNEL,
    aten.LINEAR,
    aten.CONV,
)
#: What repair alone chooses, where a layer has to leave BF16.
REPAIRS = (conv_blas_fp32.KERNEL_BF16_WEIGHTS, conv_blas_fp32.KERNEL)
_BY_NAME = {kernel.name: kernel for kernel in (*ALL, *REPAIRS)}


def get(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        InputError: There is none: the bundle comes from another version of armopt.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise InputError(
            f"unknown kernel {name!r}",
            hint="The bundle needs another version of armopt: see armopt_version in its manifest.json",
        ) from None
