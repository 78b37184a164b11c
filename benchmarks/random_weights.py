"""Random weights for a model that has no trained ones, on which a comparison of numerics means something."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

_Model = TypeVar("_Model", bound=nn.Module)


def randomize(model: _Model, input_shapes: Sequence[Sequence[int]] = (), *, seed: int = 0) -> _Model:
    """Give a randomly initialised model weights on which a comparison of numerics means something.

    Initialisation leaves biases at 0, norms at 1, some heads at 0 and ConvNeXt's layer scales at 1e-6: such a
    model hides errors in whatever is multiplied away. Parameters left at one value get noise; batch norms get
    the statistics of random input, so that activations neither fade nor explode.

    Args:
        model: Changed in place, and left in eval mode.
        input_shapes: One shape for each input; empty leaves the batch norms as they are.
        seed: Of the random numbers; equal seeds give equal weights for equal models.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and parameter.min() == parameter.max():
                _roughen(parameter, generator)
        if input_shapes:
            _calibrate_batch_norm(model, input_shapes, generator)
    return model


def _roughen(parameter: Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    value = parameter.flatten()[0].item()
    if value == 0 and parameter.dim() == 2:  # a head
        parameter.copy_(noise / math.sqrt(parameter.shape[1]))
    elif 0 < abs(value) < 1e-3:  # a layer scale
        parameter.copy_(0.1 + 0.02 * noise)
    else:
        parameter.add_(0.1 * noise)


def _calibrate_batch_norm(model: nn.Module, shapes: Sequence[Sequence[int]], generator: torch.Generator) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average: one forward gives just its statistics
        norm.train()  # the rest stays in eval: no dropout, no auxiliary heads
    # Many examples: after global pooling a norm sees one value of each, and with too few, EfficientNet's
    # statistics fit them so closely that other inputs explode. Large examples bring many values themselves.
    batch = max(8, min(32, (1 << 17) * 3 // max(math.prod(shape[1:]) for shape in shapes)))
    model(*(torch.randn((batch, *shape[1:]), generator=generator) for shape in shapes))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
        if norm.running_var is not None:
            # A channel that happened to be silent would amplify the next input three hundredfold.
            norm.running_var.clamp_(min=0.01 * norm.running_var.mean().item())
