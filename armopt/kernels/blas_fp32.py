"""Linear through BLAS in FP32: addmm on a weight stored [K, N].

That layout goes to BLAS on every build at every size, with mkldnn left on, so it is thread-safe; a call costs a tenth
of a packed convolution before any arithmetic. Weights are kept in BF16 in the bundle and widened once.
"""

from __future__ import annotations

import torch
from torch import fx

from armopt.ir.records import Site
from armopt.kernels.base import Call, Kernel, Rounding

_aten = torch.ops.aten


def _refuses(site: Site) -> str | None:
    return None if site.op == "linear" else f"covers linear, not {site.op}"


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    return weight.float().t().contiguous()


def _emit(call: Call) -> fx.Node:
    flat = len(call.site.shape) == 2
    x = call.x if flat else call.call(_aten.reshape.default, call.x, [-1, call.site.k])
    if call.bias is None:
        y = call.call(_aten.mm.default, x, call.weight)
    else:
        y = call.call(_aten.addmm.default, call.bias, x, call.weight)
    if not flat:
        y = call.call(_aten.reshape.default, y, list(call.shape))
    return call.with_post_op(y)


def _kernel(name: str, weights: torch.dtype, summary: str) -> Kernel:
    return Kernel(
        name=name,
        op="linear",
        backend="blas",
        activations=torch.float32,
        rounding=Rounding(torch.float32, weights),
        summary=summary,
        refuses=_refuses,
        pack=_pack,
        emit=_emit,
    )


KERNEL = _kernel("blas_fp32", torch.float32, "BLAS in FP32")
#: The same call on weights that the bundle holds in BF16.
KERNEL_BF16_WEIGHTS = _kernel("blas_fp32_w16", torch.bfloat16, "BLAS in FP32 on weights rounded to BF16")
