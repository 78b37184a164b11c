"""The pointwise functions that can stand behind a Linear or a convolution.

``name`` is what a graph holds. Where oneDNN fuses one, ``attribute``, ``scalars`` and ``algorithm`` are what its calls
take; ``inplace`` is the ATen operation that does the same to a fresh tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class PostOp:
    """One pointwise function: as ATen operation out of place and in place, and as oneDNN attribute."""

    name: str
    apply: Callable[..., torch.Tensor]
    inplace: Any
    inplace_args: tuple[Any, ...]
    attribute: str
    scalars: tuple[float, ...] = ()
    algorithm: str | None = None


def _unary(name: str, op: Any, inplace: Any, attribute: str, *args: Any, **onednn: Any) -> PostOp:
    return PostOp(name, lambda y: op(y, *args), inplace, args, attribute, **onednn)


#: In FP32 silu(2u) = u + u tanh(u): tanh takes half the instructions of the exponential. The layer in front gives u,
#: since its weight and bias are packed as halves, which is exact. In BF16 tanh would be rounded before the sum cancels.
SILU = "silu"

#: Unary functions by name. `add` and `add_relu` take a second tensor and stand apart.
UNARY = {
    post.name: post
    for post in (
        _unary("relu", _aten.relu.default, _aten.relu_.default, "relu"),
        _unary("gelu", _aten.gelu.default, _aten.gelu_.default, "gelu", algorithm="none"),
        PostOp(
            "gelu_tanh",
            lambda y: _aten.gelu.default(y, approximate="tanh"),
            _aten.gelu_.default,
            (),
            "gelu",
            algorithm="tanh",
        ),
        _unary(SILU, _aten.silu.default, _aten.silu_.default, "swish"),
        _unary("hardswish", _aten.hardswish.default, _aten.hardswish_.default, "hardswish"),
        _unary("hardsigmoid", _aten.hardsigmoid.default, _aten.hardsigmoid_.default, "hardsigmoid"),
        _unary("sigmoid", _aten.sigmoid.default, _aten.sigmoid_.default, "sigmoid"),
        _unary("tanh", _aten.tanh.default, _aten.tanh_.default, "tanh"),
        _unary("relu6", _aten.hardtanh.default, _aten.hardtanh_.default, "hardtanh", 0.0, 6.0, scalars=(0.0, 6.0)),
    )
}
#: From this many elements on, relu in BF16 is the integer maximum of the bits and 0: a third of the instructions, after
#: two calls instead of one. A NaN stays one if its sign is plus, which is the only kind that Arm's arithmetic makes.
RELU_AS_INTEGERS = 1 << 14
NONE = "none"
ADD = "add"
ADD_RELU = "add_relu"


def scale(name: str, dtype: torch.dtype) -> float:
    """By what a layer's weight and bias are multiplied when they are packed, because its post-op expects it."""
    return 0.5 if name == SILU and dtype == torch.float32 else 1.0


def apply(name: str, y: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """The function `name` of `y` (and of `other`, for the binary ones), out of place.

    In BF16 a residual is added to the rounded product: every kernel in BF16 does it as a separate operation.
    """
    if name == NONE:
        return y
    if name in (ADD, ADD_RELU):
        assert other is not None, f"{name} without a second tensor"
        total = y + other
        return torch.relu(total) if name == ADD_RELU else total
    return UNARY[name].apply(y)
