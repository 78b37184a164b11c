"""Grouped convolution in FP32 whose groups are too narrow for oneDNN's SVE kernel: neighbouring groups merged.

Below sixteen input channels in a group oneDNN answers with ``gemm:ref`` on aarch64 (torch 2.10, 2.13). Merging groups
puts zeros into the weight: more multiplications, but in the SVE kernel, and the same sums.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from armopt.ir.records import Backend, Layout, Op, Site
from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, KernelCall, Rounding
from armopt.kernels.examples import Example
from armopt.kernels.onednn.layer import Wanted


def _factor(site: Site) -> int:
    """How many groups become one: the fewest that give sixteen input channels; 0 where that leaves no groups."""
    for factor in range(2, site.groups):
        if site.groups % factor == 0 and factor * site.weight[1] >= onednn.LEAST_GROUP_CHANNELS:
            return factor
    return 0


def _refuses(site: Site) -> str | None:
    if not onednn.is_narrow_grouped(site):
        return "covers narrow groups"
    if _factor(site) == 0:
        return "merging its groups would make it dense, which fast math multiplies in BF16"
    return None


def _merged(site: Site) -> Site:
    factor = _factor(site)
    outputs, channels, *filters = site.weight
    return replace(site, groups=site.groups // factor, weight=(outputs, channels * factor, *filters))


def _merge(weight: torch.Tensor, site: Site) -> torch.Tensor:
    factor = _factor(site)
    outputs, channels = weight.shape[:2]
    merged = weight.new_zeros(
        site.groups // factor, factor, outputs // site.groups, factor, channels, *weight.shape[2:]
    )
    parts = weight.reshape(site.groups // factor, factor, outputs // site.groups, channels, *weight.shape[2:])
    for i in range(factor):
        merged[:, i, :, i] = parts[:, i]
    return merged.reshape(outputs, factor * channels, *weight.shape[2:])


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    return onednn.pack_convolution(_merge(weight, site), _merged(site))


def _own(kernel: Kernel, site: Site) -> Wanted:
    return onednn.own_convolution(kernel, _merged(site))


def _emit(call: KernelCall) -> fx.Node:
    return onednn.emit_conv(replace(call, site=_merged(call.site)))


KERNEL = Kernel(
    name="conv_merged_fp32",
    op=Op.CONV,
    backend=Backend.ONEDNN,
    activations=torch.float32,
    rounding=Rounding(torch.float32, torch.float32),
    covers="grouped, under 16 input channels a group",
    summary="packed, neighbouring groups merged: oneDNN has only `gemm:ref` for narrow ones",
    refuses=_refuses,
    pack=_pack,
    emit=_emit,
    own=_own,
    arrange=_merge,
    layout=Layout.CHANNELS_LAST,
    fuses=onednn.fuses,
    # without SVE of 256 bits all groups are `gemm:ref`, unless depthwise
    examples={
        "graviton3": (
            Example((1, 32, 9, 9), 64, (3, 3), padding=1, groups=4),
            Example((2, 128, 6, 6), 128, (3, 3), padding=1, groups=32),
        )
    },
)
