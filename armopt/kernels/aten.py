"""Plain ATen: what runs where nothing else may. Weights as the model has them."""

from __future__ import annotations

import torch
from torch import fx

from armopt.ir.records import Site
from armopt.kernels.base import Call, Kernel, Rounding

_FP32 = Rounding(torch.float32, torch.float32)


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    return weight


def _emit_linear(call: Call) -> fx.Node:
    y = call.call(torch.ops.aten.linear.default, call.x, call.weight, call.bias)
    return call.with_post_op(y)


def _emit_conv(call: Call) -> fx.Node:
    site = call.site
    first = [list(part) for part in (site.stride, site.padding, site.dilation)]
    geometry = (*first, site.transposed, list(site.output_padding), site.groups)
    y = call.call(torch.ops.aten.convolution.default, call.x, call.weight, call.bias, *geometry)
    return call.with_post_op(y)


def _takes_all(site: Site) -> str | None:
    return None


LINEAR = Kernel("aten_linear", "linear", "aten", torch.float32, _FP32, "plain ATen", _takes_all, _pack, _emit_linear)
CONV = Kernel("aten_conv", "conv", "aten", torch.float32, _FP32, "plain ATen", _takes_all, _pack, _emit_conv)
