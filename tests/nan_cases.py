"""Layers with NaN of both signs and infinities in their operands, made alike on the host and on the emulated core."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from armopt.bundle.program import Program
from armopt.ir.records import Backend, Op
from armopt.kernels import post_ops, table
from armopt.kernels.base import Kernel
from armopt.kernels.examples import Example
from tests.arm64 import kernel_cases
from tests.arm64.kernel_cases import Case

#: FP32's bits: quiet and signalling NaN of both signs, with few and with all bits of a payload, and infinities.
SPECIAL = (
    *(0x7FC00000, 0xFFC00000, 0x7F810000, 0xFF810000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF),
    *(0x7F800000, 0xFF800000),
)
_LINEAR = Example((512, 32), 48)
_CONV = Example((len(SPECIAL), 32, 8, 8), 48, (3, 3), padding=1)
_DEPTHWISE = Example((len(SPECIAL), 32, 5, 5), 32, (3, 3), padding=1, groups=32)
_GROUPED = replace(_DEPTHWISE, groups=2)
_VOLUME = Example((len(SPECIAL), 16, 4, 4, 4), 16, (3, 3, 3), padding=1)
_OF_KERNEL = {
    "conv_fp32": _DEPTHWISE,
    "conv_direct_fp32": replace(_CONV, shape=(len(SPECIAL), 3, 8, 8)),
    "conv_merged_fp32": replace(_DEPTHWISE, outputs=64, groups=4),
}


def _post_ops(kernel: Kernel) -> tuple[str, ...]:
    """What is behind a kernel: all behind one in BF16 and one in FP32, else what is fused or works on bits."""
    if kernel.name in ("conv1x1_bf16", "blas_fp32"):
        return ("none", "add", "add_relu", *post_ops.UNARY)
    if kernel.activations == torch.bfloat16:
        return "relu", "add_relu"
    return ("relu", "sigmoid") if kernel.backend == Backend.ONEDNN else ("relu",)


#: Large enough for relu on the bits, but the last two.
CASES = (
    *(
        Case(
            kernel.name,
            replace(_OF_KERNEL.get(kernel.name, _LINEAR if kernel.op == Op.LINEAR else _CONV), post_op=post),
        )
        for kernel in table.kernels()
        if kernel.name != "conv_transpose_fp32"
        for post in _post_ops(kernel)
    ),
    *(Case("conv_fp32", replace(layer, post_op=post)) for layer in (_GROUPED, _VOLUME) for post in ("relu", "sigmoid")),
    *(Case("conv1x1_bf16", replace(_LINEAR, shape=(16, 400), post_op=post)) for post in ("relu", "add_relu")),
)


def special(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Numbers with one special value in each of the first rows or images, at changing places."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    half = dtype == torch.bfloat16
    rows = values.view(torch.int16 if half else torch.int32).flatten(1)
    for i, bits in enumerate(SPECIAL):
        is_nan = bits & 0x7FFFFF != 0
        wanted = (bits >> 16) | (is_nan and bits & 0x7F0000 == 0) if half else bits  # no NaN becomes an infinity
        size = 1 << (16 if half else 32)
        rows[i, (7 * i + 3) % rows.shape[1]] = wanted - size if wanted >= size // 2 else wanted
    return values


def prepared(case: Case, target: str) -> tuple[Program, list[torch.Tensor], torch.Tensor]:
    """A case's program, its inputs, and what eager PyTorch gives in FP64; with a NaN in each addend's own rows."""
    kernel, tensors = table.get(case.kernel), kernel_cases.operands(case)
    program = kernel_cases.program(case, target, tensors)
    inputs = [special(case.layer.shape, kernel.activations)]
    if case.layer.post_op.startswith("add"):
        (output,) = program.shapes.values()
        inputs.append(special(output, kernel.activations).roll(len(SPECIAL) if len(output) == 2 else 0, 0))
    inputs = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    return program, inputs, kernel_cases.eager(case, exact, [x.double() for x in inputs])


def apart(wanted: torch.Tensor, found: torch.Tensor) -> tuple[int, int]:
    """How many values are NaN in the first alone, and in the second alone."""
    a, b = wanted.isnan(), found.isnan()
    assert a.shape == b.shape
    return int((a & ~b).sum()), int((b & ~a).sum())
