"""Linear as a packed 1x1 convolution on BF16 activations.

The Compute Library answers with BFMMLA on every aarch64 build seen. The bias has to be BF16 too: with an FP32 bias
torch 2.10 answers ``ref:any``.
"""

from __future__ import annotations

import torch

from armopt.ir.records import Backend, Op
from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, Rounding
from armopt.kernels.examples import Example, linear

#: Around the edges of blocks, and with few columns.
_SIZES = linear(
    *((64, 64, 64), (64, 256, 10), (32, 340, 48), (32, 344, 48), (32, 676, 24), (64, 680, 33), (64, 684, 33)),
    *((24, 1000, 48), (16, 1027, 65), (16, 2048, 64), (8, 4096, 64), (1, 4096, 1000), (9, 1376, 1000)),
    *((64, 512, 7), (128, 100, 3), (256, 768, 2), (40, 1360, 60)),
)
_WITH_POST_OPS = (
    Example((64, 400), 48, bias=False, post_op="relu"),
    Example((64, 400), 48, post_op="silu"),
)

KERNEL = Kernel(
    name="conv1x1_bf16",
    op=Op.LINEAR,
    backend=Backend.ONEDNN,
    activations=torch.bfloat16,
    rounding=Rounding(torch.bfloat16, torch.bfloat16),
    covers="Linear",
    summary="a packed 1x1 convolution: Compute Library, BFMMLA",
    refuses=onednn.refuses_linear,
    pack=onednn.pack_linear_as_convolution,
    emit=onednn.emit_linear,
    own=onednn.own_linear,
    block=onednn.bf16_block,
    colour="#2563eb",
    examples={"graviton3": (*_SIZES, *_WITH_POST_OPS), "yitian710": (*_SIZES[4:13:2], *_SIZES[13:])},
)
