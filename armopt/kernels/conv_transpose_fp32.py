"""Transposed convolution of two dimensions, packed, in FP32: the Compute Library has no other on aarch64."""

from __future__ import annotations

import torch
from torch import fx

from armopt.ir.records import Backend, Layout, Op, Site
from armopt.kernels.base import Kernel, KernelCall, Rounding

_mkldnn = torch.ops.mkldnn


def _refuses(site: Site) -> str | None:
    if site.op != Op.CONV or not site.transposed:
        return "covers transposed convolution"
    if len(site.shape) != 4:
        return f"a transposed convolution of {len(site.shape) - 2} dimensions: oneDNN packs two"
    if site.groups > 1:
        return "a grouped transposed convolution is `ref` on aarch64"
    if 0 in site.shape or 0 in site.weight:
        return "an empty input"
    return None


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    packed: torch.Tensor = _mkldnn._reorder_convolution_transpose_weight(
        weight.contiguous(),
        list(site.padding),
        list(site.output_padding),
        list(site.stride),
        list(site.dilation),
        site.groups,
        list(site.shape),
    )
    return packed


def _emit(call: KernelCall) -> fx.Node:
    site = call.site
    geometry = [list(part) for part in (site.padding, site.output_padding, site.stride, site.dilation)]
    y = call.call(
        _mkldnn._convolution_transpose_pointwise.default,
        call.x,
        call.weight,
        call.bias,
        *geometry,
        site.groups,
        "none",
        [],
        "",
    )
    return call.with_post_op(y)


KERNEL = Kernel(
    name="conv_transpose_fp32",
    op=Op.CONV,
    backend=Backend.ONEDNN,
    activations=torch.float32,
    rounding=Rounding(torch.float32, torch.float32),
    covers="transposed with a dilation, 2-d",
    summary="packed: Compute Library",
    refuses=_refuses,
    pack=_pack,
    emit=_emit,
    layout=Layout.CHANNELS_LAST,
)
