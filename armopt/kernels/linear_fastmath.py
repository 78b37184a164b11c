"""Linear as oneDNN's packed inner product on FP32 activations, multiplied in BF16.

The cheapest call for one row on oneDNN up to 3.9 (torch 2.10), which reads two bytes for each weight. From oneDNN 3.10
(torch 2.13) the same call is ``gemm:ref`` in FP32, so there the probe refuses it and the next kernel runs. Needs
DNNL_DEFAULT_FPMATH_MODE=BF16.
"""

from __future__ import annotations

import torch
from torch import fx

from armopt.ir.records import Backend, Op, Site
from armopt.kernels.base import Kernel, KernelCall, Rounding, Use
from armopt.kernels.examples import FAST_LINEAR, Example
from armopt.kernels.onednn.layer import Wanted
from armopt.kernels.onednn_convolution import refuses_linear

_mkldnn = torch.ops.mkldnn


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    packed: torch.Tensor = _mkldnn._reorder_linear_weight(weight.float(), site.m)
    return packed


def _emit(call: KernelCall) -> fx.Node:
    y = call.call(_mkldnn._linear_pointwise.default, call.x, call.weight, call.bias, "none", [], "")
    return call.with_post_op(y)


def _own(kernel: Kernel, site: Site) -> Wanted:
    shapes = ((site.m, site.k), (site.n, site.k), (site.m, site.n))
    return Wanted(*shapes, kernel.activations, kernel.rounding.products, None)


KERNEL = Kernel(
    name="linear_fastmath",
    op=Op.LINEAR,
    backend=Backend.ONEDNN,
    activations=torch.float32,
    rounding=Rounding(torch.bfloat16, torch.bfloat16),
    covers="Linear",
    summary="packed `_linear_pointwise`: Compute Library up to oneDNN 3.9, refused after",
    refuses=refuses_linear,
    pack=_pack,
    emit=_emit,
    own=_own,
    uses=frozenset({Use.PLAN}),
    fast_math=True,
    colour="#b45309",
    examples={"graviton3": (*FAST_LINEAR[:3], Example((64, 400), 48, post_op="silu"))},
)
