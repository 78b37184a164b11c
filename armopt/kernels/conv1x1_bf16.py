"""Linear as a packed 1x1 convolution on BF16 activations.

The Compute Library answers with BFMMLA on every aarch64 build seen. The bias has to be BF16 too: with an FP32 bias
torch 2.10 answers ``ref:any``.
"""

from __future__ import annotations

import functools

import torch

from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, Rounding

KERNEL = Kernel(
    name="conv1x1_bf16",
    op="linear",
    backend="acl",
    activations=torch.bfloat16,
    rounding=Rounding(torch.bfloat16, torch.bfloat16),
    summary="packed 1x1 convolution, BF16 in and out (oneDNN + Compute Library)",
    refuses=onednn.refuses_linear,
    pack=onednn.pack_linear_as_convolution,
    emit=functools.partial(onednn.emit_linear, fuse=False),
    block=onednn.bf16_block,
)
