"""A check of all inputs in one call of C: the one by which torch.compile knows whether a graph takes its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from armopt.ir.records import Dim


def of(specs: Sequence[tuple[str, Sequence[Dim], torch.dtype]]) -> Callable[..., bool]:
    """Whether inputs are plain tensors on the CPU, of these shapes and dtypes; as many have to be given.

    It is strict: False means that they have to be looked at, one by one.

    Args:
        specs: Name, shape and dtype of each input; names in shapes stand for any size.

    Returns:
        The check; one that nothing passes where this PyTorch has none.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards
    except ImportError:
        return _never
    sizes = [[size if isinstance(size, int) else None for size in shape] for _, shape, _ in specs]
    examples = [
        torch.empty((), dtype=dtype, device="cpu").expand([2 if size is None else size for size in shape])
        for shape, (*_, dtype) in zip(sizes, specs, strict=True)
    ]
    # PyTorch's stubs say that these are flat lists
    dynamic: dict[str, Any] = {"dynamic_dims_sizes": sizes, "dynamic_dims_strides": [[None] * len(s) for s in sizes]}
    try:
        check: Callable[..., bool] = TensorGuards(*examples, **dynamic).check
        return check if examples and check(*examples) else _never
    except (AttributeError, TypeError, RuntimeError):
        return _never


def _never(*tensors: torch.Tensor) -> bool:
    return False
