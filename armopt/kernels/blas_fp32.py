"""Linear through BLAS in FP32: addmm on a weight stored [K, N].

That layout goes to BLAS on every build at every size, with mkldnn left on, so it is thread-safe; a call costs a tenth
of a packed convolution before any arithmetic. Weights are kept in BF16 in the bundle and widened once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from armopt.ir.records import Backend, Op, Site
from armopt.kernels.base import Kernel, KernelCall, Rounding, Use
from armopt.kernels.examples import Example, linear

_aten = torch.ops.aten


def _refuses(site: Site) -> str | None:
    return None if site.op == Op.LINEAR else f"covers linear, not {site.op}"


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    return weight.float().t().contiguous()


def _emit(call: KernelCall) -> fx.Node:
    flat = len(call.site.shape) == 2
    x = call.x if flat else call.call(_aten.reshape.default, call.x, [-1, call.site.k])
    if call.bias is None:
        y = call.call(_aten.mm.default, x, call.weight)
    else:
        y = call.call(_aten.addmm.default, call.bias, x, call.weight)
    if not flat:
        y = call.call(_aten.reshape.default, y, list(call.shape))
    return call.with_post_op(y)


def _kernel(name: str, weights: torch.dtype, colour: str, examples: Mapping[str, Sequence[Example]]) -> Kernel:
    return Kernel(
        name=name,
        op=Op.LINEAR,
        backend=Backend.BLAS,
        activations=torch.float32,
        rounding=Rounding(torch.float32, weights),
        covers="Linear",
        summary="`addmm` on a weight stored [K, N]: OpenBLAS or NVPL",
        refuses=_refuses,
        pack=_pack,
        emit=_emit,
        uses=frozenset(Use),
        colour=colour,
        examples=examples,
    )


_ROWS = linear((1, 1024, 64), (33, 684, 10))
KERNEL = _kernel("blas_fp32", torch.float32, "#15803d", {"graviton3": linear((64, 684, 33)), "graviton2": _ROWS})
#: The same call on weights that the bundle holds in BF16.
KERNEL_BF16_WEIGHTS = _kernel(
    "blas_fp32_w16",
    torch.bfloat16,
    "#059669",
    {"graviton3": (*_ROWS, Example((3, 400), 48, bias=False, post_op="silu"))},
)
