"""Convolution, packed, in FP32: depthwise, grouped and 3-d ones on any core, dense ones on cores without BF16.

oneDNN answers with its SVE kernels (jit_dw, brgconv) or, dense, with the Compute Library.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from armopt.ir.records import Backend, Layout, Op, Site
from armopt.kernels import examples
from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, Rounding
from armopt.kernels.examples import Example

_GROUPED = Example((1, 32, 9, 9), 32, (3, 3), padding=1, groups=2)
#: Multiplied in BF16 in a process with fast math: compared on a core without BF16.
_DENSE = (
    *(Example((1, 16, 10, 10), 24, (3, 3), stride=2, padding=1), examples.DILATED, examples.STEM),
    *(examples.FEW_CHANNELS, examples.WIDE_FILTER, examples.MIDDLE, examples.FEW_ROWS),
)


def _refuses(site: Site) -> str | None:
    if site.op != Op.CONV:
        return f"covers conv, not {site.op}"
    if site.transposed:
        return "covers convolution, not transposed convolution"
    if onednn.is_narrow_grouped(site):
        return f"{site.weight[1]} input channels in a group: oneDNN answers with `gemm:ref` below sixteen"
    if 0 in site.shape or 0 in site.weight:
        return "an empty input"
    return None


KERNEL = Kernel(
    name="conv_fp32",
    op=Op.CONV,
    backend=Backend.ONEDNN,
    activations=torch.float32,
    rounding=Rounding(torch.float32, torch.float32),
    covers="any but transposed",
    summary="packed: oneDNN's SVE kernels for depthwise, grouped and 3-d",
    refuses=_refuses,
    pack=onednn.pack_convolution,
    emit=onednn.emit_conv,
    own=onednn.own_convolution,
    layout=Layout.CHANNELS_LAST,
    fuses=onednn.fuses,
    examples={
        "graviton3": (
            *(examples.DEPTHWISE, _GROUPED, replace(_GROUPED, post_op="hardswish")),
            *(replace(examples.DEPTHWISE, post_op=name) for name in ("silu", "hardswish", "gelu", "gelu_tanh")),
        ),
        "yitian710": (examples.DEPTHWISE,),
        "graviton2": (examples.DEPTHWISE, *_DENSE),
    },
)
