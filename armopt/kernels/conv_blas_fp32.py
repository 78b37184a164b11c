"""Dense convolution of one or two dimensions through BLAS in FP32: image to columns, then a product.

For layers that need FP32 where the process has fast math, in which oneDNN multiplies every dense FP32 convolution in
BF16: ATen's own convolution does not reach oneDNN. Slower than those, so only repair chooses it. Weights are kept as
they are, or in BF16 and widened once.
"""

from __future__ import annotations

import torch
from torch import fx

from armopt.ir.records import Site
from armopt.kernels.base import Call, Kernel, Rounding
from armopt.kernels.onednn_convolution import refuses_dense_2d

_aten = torch.ops.aten


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    weight = weight.float().contiguous()
    return weight.unsqueeze(2) if len(site.shape) == 3 else weight


def _emit(call: Call) -> fx.Node:
    site, flat = call.site, len(call.site.shape) == 3
    x = call.call(_aten.unsqueeze.default, call.x, 2) if flat else call.x
    lead = 1 if flat else 0  # one dimension is taken as two
    filters, stride, dilation = ([*[1] * lead, *part] for part in (site.weight[2:], site.stride, site.dilation))
    padding = [*[0] * lead, *site.padding]
    if all(step == 1 for step in dilation):
        y = call.call(_aten._slow_conv2d_forward.default, x, call.weight, filters, call.bias, stride, padding)
    else:
        y = call.call(_aten.slow_conv_dilated2d.default, x, call.weight, filters, call.bias, stride, padding, dilation)
    return call.with_post_op(call.call(_aten.squeeze.dim, y, 2) if flat else y)


def _kernel(name: str, weights: torch.dtype, summary: str) -> Kernel:
    return Kernel(
        name=name,
        op="conv",
        backend="blas",
        activations=torch.float32,
        rounding=Rounding(torch.float32, weights),
        summary=summary,
        refuses=refuses_dense_2d,  # those that fast math multiplies in BF16
        pack=_pack,
        emit=_emit,
    )


KERNEL = _kernel("conv_blas_fp32", torch.float32, "convolution through BLAS in FP32")
#: The same call on weights that the bundle holds in BF16.
KERNEL_BF16_WEIGHTS = _kernel(
    "conv_blas_fp32_w16", torch.bfloat16, "convolution through BLAS in FP32 on weights rounded to BF16"
)
