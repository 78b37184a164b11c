"""nn.TransformerEncoder in a graph as in eager mode: there its fast path writes zeros into padded rows.

PyTorch takes that path, which leaves padding out of the computation, in eager mode alone: neither torch.export nor
torch.compile follow it. So a graph computes padded rows and overwrites them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def match_eager(model: nn.Module) -> list[nn.TransformerEncoder]:
    """Makes the encoders in a model give in a graph what they give in eager mode.

    Returns:
        Those that were changed: each has got a ``forward`` of its own.
    """
    encoders = [part for part in model.modules() if isinstance(part, nn.TransformerEncoder) and _has_fast_path(part)]
    for encoder in encoders:
        encoder.__dict__["forward"] = functools.partial(_forward, encoder)
    return encoders


@contextlib.contextmanager
def matching_eager(model: nn.Module) -> Iterator[None]:
    """The same for a while."""
    encoders = match_eager(model)
    try:
        yield
    finally:
        for encoder in encoders:
            del encoder.__dict__["forward"]


def _has_fast_path(part: nn.TransformerEncoder) -> bool:
    own = type(part).forward is nn.TransformerEncoder.forward and "forward" not in part.__dict__
    return own and bool(getattr(part, "use_nested_tensor", False))


def _forward(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """The encoder's own forward. In a graph, where eager mode would take the fast path, padded rows are overwritten."""
    y: Tensor = nn.TransformerEncoder.forward(encoder, src, mask, src_key_padding_mask, is_causal)
    slow = mask is not None or src.dim() != 3 or encoder.layers[0].training or torch.is_autocast_enabled("cpu")
    if src_key_padding_mask is None or slow or not torch.compiler.is_compiling():
        return y
    if not torch.backends.mha.get_fastpath_enabled():
        return y
    padded = src_key_padding_mask != 0
    count = padded.logical_not().sum(dim=1, keepdim=True)
    at_the_end = padded == (torch.arange(padded.shape[1], device=padded.device) >= count)
    written = y.new_zeros(y.shape[-1])
    if encoder.norm is not None:
        written = encoder.norm(written)
    return torch.where((padded & at_the_end.all()).unsqueeze(-1), written, y)
