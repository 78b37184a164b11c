"""Plain ATen: what runs where nothing else may. Weights as the model has them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from armopt.ir.records import Backend, Op, Site
from armopt.kernels.base import Kernel, KernelCall, Rounding, Use


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    return weight


def _emit_linear(call: KernelCall) -> fx.Node:
    y = call.call(torch.ops.aten.linear.default, call.x, call.weight, call.bias)
    return call.with_post_op(y)


def _emit_conv(call: KernelCall) -> fx.Node:
    site = call.site
    first = [list(part) for part in (site.stride, site.padding, site.dilation)]
    geometry = (*first, site.transposed, list(site.output_padding), site.groups)
    y = call.call(torch.ops.aten.convolution.default, call.x, call.weight, call.bias, *geometry)
    return call.with_post_op(y)


def _takes_all(site: Site) -> str | None:
    return None


def _kernel(op: Op, emit: Callable[[KernelCall], fx.Node]) -> Kernel:
    return Kernel(
        name=f"aten_{op}",
        op=op,
        backend=Backend.ATEN,
        activations=torch.float32,
        rounding=Rounding(torch.float32, torch.float32),
        covers="any",
        summary="plain ATen",
        refuses=_takes_all,
        pack=_pack,
        emit=emit,
        uses=frozenset({Use.FALLBACK}),
        colour="#6b7280",
    )


LINEAR = _kernel(Op.LINEAR, _emit_linear)
CONV = _kernel(Op.CONV, _emit_conv)
