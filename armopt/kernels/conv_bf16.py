"""Dense convolution, packed, on BF16 activations. Post-ops run as separate in-place operations."""

from __future__ import annotations

from dataclasses import replace

import torch

from armopt.ir.records import Backend, Layout, Op, Site
from armopt.kernels import examples
from armopt.kernels import onednn_convolution as onednn
from armopt.kernels.base import Kernel, Rounding
from armopt.kernels.examples import Example

_LAYERS = (
    examples.STEM,
    examples.FEW_CHANNELS,
    examples.WIDE_FILTER,
    examples.MIDDLE,
    Example((1, 64, 8, 8), 64, (1, 1)),
    Example((2, 128, 7, 7), 48, (1, 1), stride=2),
    Example((1, 1024, 4, 4), 100, (1, 1), stride=2),
    Example((1, 2048, 2, 2), 128, (1, 1)),
    Example((1, 32, 9, 9), 48, (5, 5), padding=2),
    examples.STRIDED,
    Example((1, 20, 10, 10), 24, (7, 7), padding=3),
    Example((1, 37, 7, 7), 33, (3, 3), padding=1),
    examples.ONE_ROW_OF_TAPS,
    examples.FEW_ROWS,
    Example((1, 256, 4, 4), 128, (3, 3), stride=2, padding=1),
    Example((1, 32, 8, 8), 96, (7, 7)),
    Example((2, 256, 4, 4), 64, (3, 3), stride=2, padding=1),
    Example((3, 256, 2, 2), 48, (3, 3), padding=1),
)
_WITH_POST_OP = replace(examples.SMALL, bias=False, post_op="relu")


def _refuses(site: Site) -> str | None:
    if any(step > 1 for step in site.dilation):
        return "a dilated convolution in BF16 is `ref:any` on aarch64 torch 2.10"
    return onednn.refuses_dense_2d(site)


KERNEL = Kernel(
    name="conv_bf16",
    op=Op.CONV,
    backend=Backend.ONEDNN,
    activations=torch.bfloat16,
    rounding=Rounding(torch.bfloat16, torch.bfloat16),
    covers="dense convolution, 1-d and 2-d",
    summary="packed: Compute Library, BFMMLA",
    refuses=_refuses,
    pack=onednn.pack_convolution,
    emit=onednn.emit_conv,
    own=onednn.own_convolution,
    layout=Layout.CHANNELS_LAST,
    block=onednn.bf16_block,
    colour="#1d4ed8",
    examples={"graviton3": (*_LAYERS, _WITH_POST_OP), "yitian710": (*_LAYERS[::2], examples.FEW_ROWS)},
)
