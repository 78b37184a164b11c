"""Dense convolution, packed, on BF16 activations. Post-ops run as separate in-place operations."""

from __future__ import annotations

import functools

import torch

from armopt.ir.records import Site
from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, Rounding


def _refuses(site: Site) -> str | None:
    if any(step > 1 for step in site.dilation):
        return "a dilated convolution in BF16 is `ref:any` on aarch64 torch 2.10"
    return onednn.refuses_dense_2d(site)


KERNEL = Kernel(
    name="conv_bf16",
    op="conv",
    backend="acl",
    activations=torch.bfloat16,
    rounding=Rounding(torch.bfloat16, torch.bfloat16),
    summary="packed convolution, BF16 in and out (oneDNN + Compute Library)",
    refuses=_refuses,
    pack=onednn.pack_convolution,
    emit=functools.partial(onednn.emit_conv, fuse=False),
    block=onednn.bf16_block,
)
