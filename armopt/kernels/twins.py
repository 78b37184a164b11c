"""The portable twins: what each kernel gives, with its roundings, on any CPU.

They are the operations of layers themselves: importing this module registers them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from armopt.ir.calls import ConvCall, LinearCall
from armopt.ir.operations import LIBRARY
from armopt.ir.records import Layout
from armopt.kernels import post_ops, table
from armopt.kernels.base import Kernel
from armopt.kernels.geometry import output_size


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


def _conv_in_blocks(call: ConvCall[torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A dense convolution that rounds between blocks. Its terms run over kernel rows, columns, then padded channels."""
    weight = call.weight.float()
    stride, padding, dilation = tuple(call.stride), tuple(call.padding), tuple(call.dilation)
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation, False, [0] * len(stride))
    if len(stride) == 1:
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    batch, channels = x.shape[:2]
    extra = _padded(channels) - channels
    columns = torch.nn.functional.unfold(x, tuple(weight.shape[2:]), dilation, padding, stride)
    columns = columns.reshape(batch, channels, -1, columns.shape[-1]).permute(0, 3, 2, 1)
    columns = torch.nn.functional.pad(columns, (0, extra)).flatten(2)
    rows = torch.nn.functional.pad(weight.flatten(2).transpose(1, 2), (0, extra)).flatten(1)
    y = _in_blocks(columns, rows, bias, call.block)
    return y.transpose(1, 2).reshape(batch, weight.shape[0], *size)


def _padded(channels: int) -> int:
    return -(-channels // 4) * 4


def _linear(*args: Any) -> torch.Tensor:
    call: LinearCall[torch.Tensor] = LinearCall.from_args(args)
    kernel = table.get(call.kernel)
    x, weight, bias = kernel.rounding.operand(call.x), call.weight.float(), _bias(kernel, call.bias)
    if call.block and x.shape[-1] > call.block:
        y = _in_blocks(x, weight, bias, call.block)
    else:
        y = torch.nn.functional.linear(x, weight, bias)
    return post_ops.apply(call.post_op, y.to(kernel.activations), call.other)


def _conv(*args: Any) -> torch.Tensor:
    call: ConvCall[torch.Tensor] = ConvCall.from_args(args)
    kernel, weight = table.get(call.kernel), call.weight
    x, bias = kernel.rounding.operand(call.x), _bias(kernel, call.bias)
    if call.block and _padded(weight.shape[1]) * math.prod(weight.shape[2:]) > call.block:
        y = _conv_in_blocks(call, x, bias)
    else:
        y = torch.convolution(x, weight.float(), bias, *call.geometry)
    return _laid_out(kernel, post_ops.apply(call.post_op, y.to(kernel.activations), call.other))


def _laid_out(kernel: Kernel, y: torch.Tensor) -> torch.Tensor:
    """A convolution's result in memory as the kernel gives it: where it has no layout of its own, as ATen does. One
    dimension is taken as two."""
    if kernel.layout != Layout.CHANNELS_LAST:
        return y
    if y.dim() == 3:
        return y.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2)
    return y.contiguous(memory_format=torch.channels_last if y.dim() == 4 else torch.channels_last_3d)


def _fake_linear(*args: Any) -> torch.Tensor:
    call: LinearCall[torch.Tensor] = LinearCall.from_args(args)
    shape = (*call.x.shape[:-1], call.weight.shape[0])
    return call.x.new_empty(shape, dtype=table.get(call.kernel).activations)


def _fake_conv(*args: Any) -> torch.Tensor:
    call: ConvCall[torch.Tensor] = ConvCall.from_args(args)
    x, weight = call.x, call.weight
    channels = weight.shape[1] * call.groups if call.transposed else weight.shape[0]
    spatial = output_size(x.shape[2:], weight.shape[2:], *call.geometry[:-1])
    kernel = table.get(call.kernel)
    return _laid_out(kernel, x.new_empty((x.shape[0], channels, *spatial), dtype=kernel.activations))


LIBRARY.impl("linear", _linear, "CPU")
LIBRARY.impl("conv", _conv, "CPU")
torch.library.register_fake("armopt::linear", _fake_linear, lib=LIBRARY)
torch.library.register_fake("armopt::conv", _fake_conv, lib=LIBRARY)
