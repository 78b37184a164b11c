"""Linear as a packed 1x1 convolution in FP32: for cores without BF16."""

from __future__ import annotations

import functools

import torch

from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, Rounding

KERNEL = Kernel(
    name="conv1x1_fp32",
    op="linear",
    backend="acl",
    activations=torch.float32,
    rounding=Rounding(torch.float32, torch.float32),
    summary="packed 1x1 convolution in FP32 (oneDNN + Compute Library)",
    refuses=onednn.refuses_linear,
    pack=onednn.pack_linear_as_convolution,
    emit=functools.partial(onednn.emit_linear, fuse=True),
    fuses=onednn.FUSED,
)
