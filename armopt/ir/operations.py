"""The operations that passes rewrite to: ``armopt::linear``, ``armopt::conv`` and ``armopt::recurrence``.

The first two, the layers, name their kernel. Run as they stand they are the kernel's portable twin, on any CPU
(:mod:`armopt.kernels.twins`); the runtime replaces them by the kernel's own calls where the host has what it takes.
Weights are always [N, K] or as torch.nn.functional.conv*d has them (transposed: [in, out / groups, …]); the dtype of
activations must be the kernel's. A recurrence has one form: :mod:`armopt.kernels.recurrence`.
"""

from __future__ import annotations

from typing import Any

import torch

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
