"""Dense convolution, packed, on FP32 activations, multiplied in BF16. Needs DNNL_DEFAULT_FPMATH_MODE=BF16."""

from __future__ import annotations

import functools

import torch

from armopt.ir.records import Site
from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, Rounding


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    return onednn.pack_convolution(weight.float(), site)


KERNEL = Kernel(
    name="conv_fastmath",
    op="conv",
    backend="acl",
    activations=torch.float32,
    rounding=Rounding(torch.bfloat16, torch.bfloat16),
    summary="packed convolution, FP32 in and out, multiplied in BF16 (oneDNN + Compute Library)",
    refuses=onednn.refuses_dense_2d,
    pack=_pack,
    emit=functools.partial(onednn.emit_conv, fuse=True),
    fuses=onednn.FUSED,
    fast_math=True,
)
