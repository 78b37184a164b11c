"""Linear as a packed 1x1 convolution on FP32 activations, multiplied in BF16.

Needs DNNL_DEFAULT_FPMATH_MODE=BF16; without it the same call packs FP32 weights.
"""

from __future__ import annotations

import functools

import torch

from armopt.ir.records import Site
from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, Rounding


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    return onednn.pack_linear_as_convolution(weight.float(), site)


KERNEL = Kernel(
    name="conv1x1_fastmath",
    op="linear",
    backend="acl",
    activations=torch.float32,
    rounding=Rounding(torch.bfloat16, torch.bfloat16),
    summary="packed 1x1 convolution, FP32 in and out, multiplied in BF16 (oneDNN + Compute Library)",
    refuses=onednn.refuses_linear,
    pack=_pack,
    emit=functools.partial(onednn.emit_linear, fuse=True),
    fuses=onednn.FUSED,
    fast_math=True,
)
