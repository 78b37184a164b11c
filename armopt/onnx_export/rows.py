"""The rows of experts in operations that ONNX has: as many for each as data says."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_split: torch._ops.OpOverload = torch.ops.aten.split_with_sizes.default


def split(x: torch.Tensor, ends: torch.Tensor) -> Sequence[torch.Tensor]:
    """What :func:`armopt.ir.operations.split_rows` gives."""
    counts = [count.item() for count in torch.diff(ends, prepend=ends.new_zeros(1)).unbind()]
    for count in counts:
        torch._check(count >= 0)  # type: ignore[no-untyped-call]
    rest = x.shape[0] - sum(counts)
    torch._check(rest >= 0)  # type: ignore[no-untyped-call]
    parts: Sequence[torch.Tensor] = _split(x, [*counts, rest])
    return parts[:-1]


def join(parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """What :func:`armopt.ir.operations.join_rows` gives."""
    rest = like.shape[0] - sum(part.shape[0] for part in parts)
    torch._check(rest >= 0)  # type: ignore[no-untyped-call]
    return torch.cat([*parts, parts[0].new_zeros((rest, *parts[0].shape[1:]))])
