"""Compares what a kernel's own primitive gives with the same sums in FP64, at a few places of its result."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from armopt.ir.records import Op, Precision, Site
from armopt.kernels import post_ops
from armopt.kernels.base import Kernel
from armopt.kernels.onednn.primitives import OneDnnError

#: Results in BF16 are rounded, with a long sum more than once. FP32 multiplied in BF16 by mistake would be off by 3e-3.
_MOST_APART = {Precision.BF16: 1e-2, Precision.FP32: 1e-4}
#: Output channels of a dense layer that are looked at.
_CHANNELS = 24


def refusal(
    kernel: Kernel,
    site: Site,
    run: Callable[[torch.Tensor], torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    post_op: str,
) -> str | None:
    """Why an own primitive is not to be trusted with a site; None where its numbers are right.

    Args:
        kernel: The kernel.
        site: The site.
        run: The primitive as a function of its input.
        weight: As the kernel multiplies with it, in PyTorch's shape.
        bias: In the kernel's dtype.
        post_op: What its result has gone through; empty for nothing.
    """
    x = values(site.shape).to(kernel.activations)
    picked = torch.arange(0, site.n, max(1, site.n // _CHANNELS) if site.groups == 1 else 1)
    exact = _Exact(kernel, site, weight[picked], None if bias is None else bias[picked], post_op)
    try:
        error = exact.distance(x, run(x), picked)
        if error <= _MOST_APART[kernel.precision] and post_op:
            x.flatten()[0] = math.nan  # some give 0 for the relu of NaN
            error = exact.distance(x, run(x), picked)
    except OneDnnError as failed:
        return f"fails on this build: {failed}"
    return None if error <= _MOST_APART[kernel.precision] else f"gives wrong numbers: off by {error:.1e}"


@functools.cache
def _numbers() -> torch.Tensor:
    """Normal numbers. So many of them, a prime, that no size of a layer repeats them in step with its places."""
    return torch.randn(65537, generator=torch.Generator().manual_seed(0))


def values(shape: Sequence[int]) -> torch.Tensor:
    """A tensor of that shape: the same numbers again and again, because making them costs more than the product."""
    numbers, size = _numbers(), math.prod(shape)
    return numbers.repeat(-(-size // numbers.numel()))[:size].view(*shape)


@dataclass(frozen=True, slots=True)
class _Exact:
    """A layer in FP64. A Linear is taken as a convolution over its rows."""

    kernel: Kernel
    site: Site
    weight: torch.Tensor
    bias: torch.Tensor | None
    post_op: str

    def distance(self, x: torch.Tensor, found: torch.Tensor, picked: torch.Tensor) -> float:
        """How far a result is off in the picked channels of the first, a middle and the last place; relatively."""
        site, weight = self.site, self.weight
        stride, padding, dilation = site.stride, site.padding, site.dilation
        if site.op == Op.LINEAR:
            x, found = (t.reshape(-1, t.shape[-1]).t().unsqueeze(0) for t in (x, found))
            weight, stride, padding, dilation = weight.unsqueeze(2), (1,), (0,), (1,)
        steps = list(zip(weight.shape[2:], stride, padding, dilation, strict=True))
        patches, results = [], []
        for share in (0, 0.5, 1):
            image, *place = (int(share * (size - 1)) for size in (found.shape[0], *found.shape[2:]))
            patches.append(_patch(x[image].to(self.kernel.rounding.products), place, steps))
            result = found[image, picked]
            for at in place:
                result = result[:, at]
            results.append(result)
        ones = [1] * len(steps)
        bias = None if self.bias is None else self.bias.double()
        of_groups = (ones, [0] * len(ones), ones, False, ones, site.groups)
        exact = torch.convolution(torch.stack(patches).double(), weight.double(), bias, *of_groups).flatten(1)
        if self.post_op:
            exact = post_ops.apply(self.post_op, exact, None)
        given = torch.stack(results).double()
        if not torch.equal(given.isnan(), exact.isnan()):
            return math.inf
        return float((given - exact).nan_to_num().norm() / exact.nan_to_num().norm().clamp_min(1e-30))


def _patch(image: torch.Tensor, place: Sequence[int], steps: Sequence[tuple[int, int, int, int]]) -> torch.Tensor:
    """What the filters see of an image of channels at one place of the result."""
    for dimension, (at, (taps, stride, padding, dilation)) in enumerate(zip(place, steps, strict=True), 1):
        where = at * stride - padding + dilation * torch.arange(taps)
        inside = (where >= 0) & (where < image.shape[dimension])
        image = image.index_select(dimension, where.clamp(0, image.shape[dimension] - 1))
        image = image.where(inside.view(-1, *[1] * (image.dim() - dimension - 1)), 0)
    return image
