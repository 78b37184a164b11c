"""Linear as a packed 1x1 convolution on FP32 activations, multiplied in BF16.

Needs DNNL_DEFAULT_FPMATH_MODE=BF16; without it the same call packs FP32 weights.
"""

from __future__ import annotations

import torch

from armopt.ir.records import Backend, Op, Site
from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, Rounding, Use
from armopt.kernels.examples import FAST_LINEAR


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    return onednn.pack_linear_as_convolution(weight.float(), site)


KERNEL = Kernel(
    name="conv1x1_fastmath",
    op=Op.LINEAR,
    backend=Backend.ONEDNN,
    activations=torch.float32,
    rounding=Rounding(torch.bfloat16, torch.bfloat16),
    covers="Linear",
    summary="a packed 1x1 convolution on FP32 activations: Compute Library, BFMMLA",
    refuses=onednn.refuses_linear,
    pack=_pack,
    emit=onednn.emit_linear,
    own=onednn.own_linear,
    uses=frozenset(Use),
    fast_math=True,
    fuses=onednn.fuses,
    colour="#d97706",
    examples={"graviton3": FAST_LINEAR, "yitian710": FAST_LINEAR[1:4:2]},
)
