"""Convolution, packed, in FP32: depthwise, grouped and 3-d ones on any core, dense ones on cores without BF16.

oneDNN answers with its SVE kernels (jit_dw, brgconv) or, dense, with the Compute Library.
"""

from __future__ import annotations

import functools

import torch

from armopt.ir.records import Site
from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, Rounding


def _refuses(site: Site) -> str | None:
    if site.op != "conv":
        return f"covers conv, not {site.op}"
    if site.transposed:
        return "covers convolution, not transposed convolution"
    if onednn.is_narrow_grouped(site):
        return f"{site.weight[1]} input channels in a group: oneDNN answers with `gemm:ref` below sixteen"
    if 0 in site.shape or 0 in site.weight:
        return "an empty input"
    return None


KERNEL = Kernel(
    name="conv_fp32",
    op="conv",
    backend="onednn",
    activations=torch.float32,
    rounding=Rounding(torch.float32, torch.float32),
    summary="packed convolution in FP32 (oneDNN)",
    refuses=_refuses,
    pack=onednn.pack_convolution,
    emit=functools.partial(onednn.emit_conv, fuse=True),
    fuses=onednn.FUSED,
)
