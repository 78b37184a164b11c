"""Convolution of few input channels in FP32 by oneDNN's own code: what stands at the front of vision models.

The Compute Library, which oneDNN offers first up to torch 2.13, gathers the inputs of each output before it multiplies,
with as much work for one channel as for four. oneDNN's own ``brgconv`` gathers nothing. A stem of 3x3 filters with
stride 2, 3x224x224 to 16 channels, takes 1.7 million instructions and 0.4 million cycles on Neoverse-V1 instead of 4.7
and 1.4 in BF16, and no cast of the image. From torch 2.14 on oneDNN takes that code by itself, in BF16 too; torch 2.10
has none for vectors of 128 bits. Source: `python -m benchmarks.arm64.offered "mobilenet_v3_large 224"`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from armopt.ir.records import Backend, Layout, Op, Site
from armopt.kernels import conv_blas_fp32, examples, post_ops
from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, KernelCall, Rounding, Use
from armopt.kernels.examples import Example
from armopt.kernels.onednn import pointwise
from armopt.kernels.onednn.layer import Wanted

_aten = torch.ops.aten
#: Beyond so many the Compute Library's product in BF16 takes less.
MOST_CHANNELS = 16


def _refuses(site: Site) -> str | None:
    if site.op != Op.CONV:
        return f"covers conv, not {site.op}"
    if site.transposed or site.groups > 1 or len(site.shape) > 4:
        return "covers dense convolution, 1-d and 2-d"
    if site.weight[1] > MOST_CHANNELS:
        return f"more than {MOST_CHANNELS} input channels"
    if 0 in site.shape or 0 in site.weight:
        return "an empty input"
    return None


def _fuses(site: Site) -> bool:
    """What oneDNN's own code does for less than a call behind it, and without losing NaN."""
    fused = site.post_op in ("sigmoid", "hardswish", "silu", "gelu", "gelu_tanh")
    return fused and not pointwise.is_quicker_apart(site.post_op)


def _own(kernel: Kernel, site: Site) -> Wanted:
    return replace(onednn.own_convolution(kernel, site), preferred=("brgconv",))


def _emit(call: KernelCall) -> fx.Node:
    """PyTorch's call of oneDNN would multiply in BF16 in a process with fast math."""
    flat = len(call.site.shape) == 3
    y = conv_blas_fp32.emit(replace(call, site=replace(call.site, post_op=post_ops.NONE)))
    y = call.call(_aten.unsqueeze.default, y, 2) if flat else y
    y = call.call(_aten.clone.default, y, memory_format=torch.channels_last)
    return call.post_op(call.call(_aten.squeeze.dim, y, 2) if flat else y)


KERNEL = Kernel(
    name="conv_direct_fp32",
    op=Op.CONV,
    backend=Backend.ONEDNN,
    activations=torch.float32,
    rounding=Rounding(torch.float32, torch.float32),
    covers="dense convolution of up to 16 input channels, 1-d and 2-d",
    summary="a primitive of its own: oneDNN's SVE kernels; without one image to columns and BLAS",
    refuses=_refuses,
    pack=conv_blas_fp32.pack,
    emit=_emit,
    own=_own,
    layout=Layout.CHANNELS_LAST,
    uses=frozenset({Use.PLAN}),
    stand_in=Backend.BLAS,
    beats_bf16=True,
    fuses=_fuses,
    examples={
        "graviton3": (
            *(replace(examples.FEW_CHANNELS, post_op=name) for name in ("none", "relu", "silu", "hardswish", "gelu")),
            *(examples.STEM, replace(examples.WIDE_FILTER, bias=False), Example((2, 1, 50), 24, (10,), stride=5)),
        ),
        "yitian710": (examples.FEW_CHANNELS, replace(examples.STEM, post_op="hardswish")),
        "graviton2": (),
    },
)
