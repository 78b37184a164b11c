"""Dense convolution of one or two dimensions through BLAS in FP32: image to columns, then a product.

For layers that need FP32 where the process has fast math, in which oneDNN multiplies every dense FP32 convolution in
BF16: ATen's own convolution does not reach oneDNN. Slower than those, so only repair chooses it. Weights are kept as
they are, or in BF16 and widened once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from armopt.ir.records import Backend, Op, Site
from armopt.kernels import examples
from armopt.kernels.base import Kernel, KernelCall, Rounding, Use
from armopt.kernels.examples import Example
from armopt.kernels.onednn_convolution import refuses_dense_2d

_aten = torch.ops.aten


def pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    """A weight as the call takes it: one dimension as two."""
    weight = weight.float().contiguous()
    return weight.unsqueeze(2) if len(site.shape) == 3 else weight


def emit(call: KernelCall) -> fx.Node:
    """Inserts the call, and the post-op behind it."""
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


def _kernel(name: str, weights: torch.dtype, layers: Sequence[Example]) -> Kernel:
    return Kernel(
        name=name,
        op=Op.CONV,
        backend=Backend.BLAS,
        activations=torch.float32,
        rounding=Rounding(torch.float32, weights),
        covers="dense convolution, 1-d and 2-d",
        summary="image to columns and BLAS",
        refuses=refuses_dense_2d,  # those that fast math multiplies in BF16
        pack=pack,
        emit=emit,
        uses=frozenset({Use.REPAIR}),
        examples={"graviton3": layers},
    )


_LAYERS = (examples.STEM, examples.MIDDLE, examples.ONE_ROW_OF_TAPS, examples.DILATED)
KERNEL = _kernel("conv_blas_fp32", torch.float32, _LAYERS)
#: The same call on weights that the bundle holds in BF16.
KERNEL_BF16_WEIGHTS = _kernel("conv_blas_fp32_w16", torch.bfloat16, _LAYERS[:2])
