"""Which modules hold Linears and convolutions, by their parameters."""

from __future__ import annotations

import torch

#: Modules whose matrices are no Linear's or convolution's weights.
_OTHERS = (torch.nn.Embedding, torch.nn.EmbeddingBag, torch.nn.RNNBase, torch.nn.RNNCellBase)


def has_layers(module: torch.nn.Module) -> bool:
    """Whether a module, or one inside it, holds a matrix that a kernel may multiply with."""
    return any(
        parameter.dim() > 1
        for part in module.modules()
        if not isinstance(part, _OTHERS)
        for parameter in part.parameters(recurse=False)
    )
