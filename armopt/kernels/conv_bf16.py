"""Dense convolution, packed, on BF16 activations. Post-ops run as separate in-place operations."""

from __future__ import annotations

import functools

import torch

from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, Rounding

KERNEL = Kernel(
    name="conv_bf16",
    op="conv",
    backend="acl",
    activations=torch.bfloat16,
    rounding=Rounding(torch.bfloat16, torch.bfloat16),
    summary="packed convolution, BF16 in and out (oneDNN + Compute Library)",
    refuses=onednn.refuses_dense_2d,
    pack=onednn.pack_convolution,
    emit=functools.partial(onednn.emit_conv, fuse=False),
    block=onednn.bf16_block,
)
