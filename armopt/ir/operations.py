"""The operations that passes rewrite to: ``armopt::linear`` and ``armopt::conv``, the layers, and three beside them.

A layer names its kernel. Run as they stand they are the kernel's portable twin, on any CPU
(:mod:`armopt.kernels.twins`); the runtime replaces them by the kernel's own calls where the host has what it takes.
Weights are always [N, K] or as torch.nn.functional.conv*d has them (transposed: [in, out / groups, …]); the dtype of
activations must be the kernel's.

``armopt::recurrence`` is the steps of a recurrent layer and has one form: :mod:`armopt.kernels.recurrence`.
``armopt::split_rows`` gives each of several layers its rows of one tensor, as data says, and ``armopt::join_rows`` puts
their results together again: so experts work on the rows that chose them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode

#: Where the twins are registered: :mod:`armopt.kernels` does it when it is imported.
LIBRARY: Any = torch.library.Library("armopt", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? other, str post_op, str kernel, int block) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "conv(Tensor x, Tensor weight, Tensor? bias, Tensor? other, int[] stride, SymInt[] padding, int[] dilation,"
    " bool transposed, int[] output_padding, int groups, str post_op, str kernel, int block) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "recurrence(Tensor gates, Tensor weight, Tensor? bias, Tensor h, Tensor? c, str cell, bool backwards)"
    " -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

LINEAR: torch._ops.OpOverload = torch.ops.armopt.linear.default
CONV: torch._ops.OpOverload = torch.ops.armopt.conv.default
RECURRENCE: torch._ops.OpOverload = torch.ops.armopt.recurrence.default

LIBRARY.define(
    "split_rows(Tensor(a -> *) x, Tensor ends) -> Tensor(a)[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.dynamic_output_shape),
)
LIBRARY.define("join_rows(Tensor[] parts, Tensor like) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

SPLIT_ROWS: torch._ops.OpOverload = torch.ops.armopt.split_rows.default
JOIN_ROWS: torch._ops.OpOverload = torch.ops.armopt.join_rows.default


def split_rows(x: torch.Tensor, ends: torch.Tensor) -> Sequence[torch.Tensor]:
    """The rows of `x` up to each of `ends`, from where the part before ends: views, as many as there are ends.

    Args:
        x: [rows, …].
        ends: int64 [parts], none less than the one before. Rows behind the last belong to no part.
    """
    return torch.tensor_split(x, ends)[:-1]


def join_rows(parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The rows of all parts in their order, and zeros behind them: as many rows as `like` has.

    Raises:
        RuntimeError: The parts have more rows.
    """
    y = torch.cat(parts)  # type: ignore[arg-type]
    missing = like.shape[0] - y.shape[0]
    return torch.cat((y, y.new_zeros((missing, *y.shape[1:])))) if missing else y


def _fake_split_rows(x: torch.Tensor, ends: torch.Tensor) -> list[torch.Tensor]:
    return [x.new_empty((_any_size(x), *x.shape[1:])) for _ in range(ends.shape[0])]


def _any_size(x: torch.Tensor) -> Any:
    """A new symbol for a size, also where the model itself may have none: Dynamo's graphs for torch.compile."""
    mode = detect_fake_mode([x])
    if mode is None or mode.shape_env is None:
        return torch.library.get_ctx().new_dynamic_size()  # says what is missing
    size = mode.shape_env.create_unbacked_symint()
    torch._check(size >= 0)  # type: ignore[no-untyped-call]
    return size


def _fake_join_rows(parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return parts[0].new_empty((like.shape[0], *parts[0].shape[1:]))


LIBRARY.impl("split_rows", split_rows, "CPU")
LIBRARY.impl("join_rows", join_rows, "CPU")
torch.library.register_fake("armopt::split_rows", _fake_split_rows, lib=LIBRARY)
torch.library.register_fake("armopt::join_rows", _fake_join_rows, lib=LIBRARY)
