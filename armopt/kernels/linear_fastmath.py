"""Linear as oneDNN's packed inner product on FP32 activations, multiplied in BF16.

The cheapest call for one row on oneDNN up to 3.9 (torch 2.10), which reads two bytes for each weight. From oneDNN 3.10
(torch 2.13) the same call is ``gemm:ref`` in FP32, so there the probe refuses it and the next kernel runs. Needs
DNNL_DEFAULT_FPMATH_MODE=BF16.
"""

from __future__ import annotations

import torch
from torch import fx

from armopt.ir.records import Site
from armopt.kernels.base import Call, Kernel, Rounding
from armopt.kernels.onednn_convolution import refuses_linear

_mkldnn = torch.ops.mkldnn


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    return _mkldnn._reorder_linear_weight(weight.float(), site.m)  # type: ignore[no-any-return]


def _emit(call: Call) -> fx.Node:
    y = call.call(_mkldnn._linear_pointwise.default, call.x, call.weight, call.bias, "none", [], "")
    return call.with_post_op(y)


KERNEL = Kernel(
    name="linear_fastmath",
    op="linear",
    backend="acl",
    activations=torch.float32,
    rounding=Rounding(torch.bfloat16, torch.bfloat16),
    summary="packed inner product, FP32 in and out, multiplied in BF16 (oneDNN up to 3.9 + Compute Library)",
    refuses=refuses_linear,
    pack=_pack,
    emit=_emit,
    fast_math=True,
)
