"""The two operations that passes rewrite to: ``armopt::linear`` and ``armopt::conv``.

Each names its kernel. Run as they stand they are the kernel's portable twin, on any CPU; the runtime replaces them by
the kernel's own calls where the host has what it takes. Weights are always [N, K] or as torch.nn.functional.conv*d has
them (transposed: [in, out / groups, …]); the activation's dtype must be the kernel's.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from armopt.kernels import post_ops, table
from armopt.kernels.base import Kernel
from armopt.kernels.geometry import output_size

_LIBRARY: Any = torch.library.Library("armopt", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? other, str post_op, str kernel, int block) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "conv(Tensor x, Tensor weight, Tensor? bias, Tensor? other, int[] stride, SymInt[] padding, int[] dilation,"
    " bool transposed, int[] output_padding, int groups, str post_op, str kernel, int block) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _bias(kernel: Kernel, bias: torch.Tensor | None) -> torch.Tensor | None:
    """A bias as the kernel stores it (in the dtype of its activations), widened to FP32."""
    return None if bias is None else bias.to(kernel.activations).float()


def _in_blocks(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, block: int) -> torch.Tensor:
    """A product whose sum is rounded to BF16 after every `block` terms: the Compute Library's, with BF16 results."""
    y = torch.nn.functional.linear(x[..., :block], weight[:, :block], bias).bfloat16()
    for start in range(block, x.shape[-1], block):
        part = torch.nn.functional.linear(x[..., start : start + block], weight[:, start : start + block])
        y = (y.float() + part).bfloat16()
    return y


def _conv_in_blocks(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    block: int,
) -> torch.Tensor:
    """The same for a dense convolution: its terms run over kernel rows, columns, then input channels padded to four."""
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation, False, [0] * len(stride))
    if len(stride) == 1:
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    batch, channels = x.shape[:2]
    extra = _padded(channels) - channels
    columns = torch.nn.functional.unfold(x, weight.shape[2:], dilation, padding, stride)  # type: ignore[arg-type]
    columns = columns.reshape(batch, channels, -1, columns.shape[-1]).permute(0, 3, 2, 1)
    columns = torch.nn.functional.pad(columns, (0, extra)).flatten(2)
    rows = torch.nn.functional.pad(weight.flatten(2).transpose(1, 2), (0, extra)).flatten(1)
    y = _in_blocks(columns, rows, bias, block)
    return y.transpose(1, 2).reshape(batch, weight.shape[0], *size)


def _padded(channels: int) -> int:
    return -(-channels // 4) * 4


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    post_op: str,
    kernel: str,
    block: int,
) -> torch.Tensor:
    kind = table.get(kernel)
    x, wide = kind.rounding.operand(x), weight.float()
    if block and x.shape[-1] > block:
        y = _in_blocks(x, wide, _bias(kind, bias), block)
    else:
        y = torch.nn.functional.linear(x, wide, _bias(kind, bias))
    return post_ops.apply(post_op, y.to(kind.activations), other)


def _conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    post_op: str,
    kernel: str,
    block: int,
) -> torch.Tensor:
    kind = table.get(kernel)
    x, wide, wide_bias = kind.rounding.operand(x), weight.float(), _bias(kind, bias)
    if block and _padded(weight.shape[1]) * math.prod(weight.shape[2:]) > block:
        y = _conv_in_blocks(x, wide, wide_bias, stride, padding, dilation, block)
    else:
        y = torch.convolution(x, wide, wide_bias, stride, padding, dilation, transposed, output_padding, groups)
    return post_ops.apply(post_op, y.to(kind.activations), other)


def _fake_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    post_op: str,
    kernel: str,
    block: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=table.get(kernel).activations)


def _fake_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    post_op: str,
    kernel: str,
    block: int,
) -> torch.Tensor:
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    spatial = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation, transposed, output_padding)
    return x.new_empty((x.shape[0], channels, *spatial), dtype=table.get(kernel).activations)


_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("conv", _conv, "CPU")
torch.library.register_fake("armopt::linear", _fake_linear, lib=_LIBRARY)
torch.library.register_fake("armopt::conv", _fake_conv, lib=_LIBRARY)

LINEAR = torch.ops.armopt.linear.default
CONV = torch.ops.armopt.conv.default
#: Where arguments stand in both.
OTHER = 3
POST_OP: dict[Any, int] = {LINEAR: 4, CONV: 10}
KERNEL: dict[Any, int] = {LINEAR: 5, CONV: 11}
BLOCK: dict[Any, int] = {LINEAR: 6, CONV: 12}
