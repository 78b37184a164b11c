"""Linear as a packed 1x1 convolution in FP32: for cores without BF16."""

from __future__ import annotations

import torch

from armopt.ir.records import Backend, Op
from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, Rounding, Use
from armopt.kernels.examples import linear

KERNEL = Kernel(
    name="conv1x1_fp32",
    op=Op.LINEAR,
    backend=Backend.ONEDNN,
    activations=torch.float32,
    rounding=Rounding(torch.float32, torch.float32),
    covers="Linear",
    summary="a packed 1x1 convolution, on cores without BF16: Compute Library",
    refuses=onednn.refuses_linear,
    pack=onednn.pack_linear_as_convolution,
    emit=onednn.emit_linear,
    own=onednn.own_linear,
    uses=frozenset({Use.PLAN}),
    fuses=onednn.fuses,
    examples={"graviton2": linear((64, 64, 64), (8, 2048, 33), (64, 100, 3))},
)
