"""Dense convolution, packed, on FP32 activations, multiplied in BF16. Needs DNNL_DEFAULT_FPMATH_MODE=BF16."""

from __future__ import annotations

from dataclasses import replace

import torch

from armopt.ir.records import Backend, Layout, Op, Site
from armopt.kernels import examples
from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, Rounding, Use

_LAYERS = (examples.STEM, examples.MIDDLE, examples.STRIDED, examples.FEW_ROWS, examples.DILATED)
_WITH_POST_OPS = tuple(replace(examples.SMALL, post_op=name) for name in ("relu", "relu6", "silu"))


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    return onednn.pack_convolution(weight.float(), site)


KERNEL = Kernel(
    name="conv_fastmath",
    op=Op.CONV,
    backend=Backend.ONEDNN,
    activations=torch.float32,
    rounding=Rounding(torch.bfloat16, torch.bfloat16),
    covers="dense convolution, 1-d and 2-d",
    summary="packed, on FP32 activations: Compute Library, BFMMLA",
    refuses=onednn.refuses_dense_2d,
    pack=_pack,
    emit=onednn.emit_conv,
    own=onednn.own_convolution,
    layout=Layout.CHANNELS_LAST,
    uses=frozenset(Use),
    fast_math=True,
    fuses=onednn.fuses,
    colour="#c2410c",
    examples={"graviton3": (*_LAYERS, *_WITH_POST_OPS), "yitian710": _LAYERS[::2]},
)
