"""The pointwise functions that can stand behind a Linear or a convolution.

``name`` is what a graph holds. Where oneDNN fuses one, ``attribute``, ``scalars`` and ``algorithm`` are what its calls
take; ``inplace`` is the ATen operation that does the same to a fresh tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class PostOp:
    """One pointwise function: as ATen operation out of place and in place, and as oneDNN attribute.

    Attributes:
        scale: By what a layer's weight and bias are multiplied as they are packed, if its activations are in FP32 and
            its kernel doesn't fuse the function and that is quicker apart (pointwise.is_quicker_apart).
        emit_scaled: Inserts the function of a result that was scaled so; takes what inserts a call, and the result.
    """

    name: str
    apply: Callable[..., torch.Tensor]
    inplace: Any
    inplace_args: tuple[Any, ...]
    attribute: str
    scalars: tuple[float, ...] = ()
    algorithm: str | None = None
    scale: float = 1.0
    emit_scaled: Callable[[Callable[..., fx.Node], fx.Node], fx.Node] | None = None

    @property
    def inplace_kwargs(self) -> dict[str, str]:
        """What `inplace` takes by name."""
        return {"approximate": "tanh"} if self.algorithm == "tanh" else {}


def _unary(name: str, op: Any, inplace: Any, attribute: str, *args: Any, **more: Any) -> PostOp:
    return PostOp(name, lambda y: op(y, *args), inplace, args, attribute, **more)


def _silu_of_half(call: Callable[..., fx.Node], half: fx.Node) -> fx.Node:
    """silu(2u) = u + u tanh(u): tanh takes half the instructions of the exponential. Halving is exact.

    Not in BF16, where tanh would be rounded before the sum cancels.
    """
    return call(_aten.addcmul_.default, half, half, call(_aten.tanh.default, half))


_SILU_OF_HALF = {"scale": 0.5, "emit_scaled": _silu_of_half}
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
        _unary("silu", _aten.silu.default, _aten.silu_.default, "swish", **_SILU_OF_HALF),
        _unary("hardswish", _aten.hardswish.default, _aten.hardswish_.default, "hardswish"),
        _unary("hardsigmoid", _aten.hardsigmoid.default, _aten.hardsigmoid_.default, "hardsigmoid"),
        _unary("sigmoid", _aten.sigmoid.default, _aten.sigmoid_.default, "sigmoid"),
        _unary("tanh", _aten.tanh.default, _aten.tanh_.default, "tanh"),
        _unary("relu6", _aten.hardtanh.default, _aten.hardtanh_.default, "hardtanh", 0.0, 6.0, scalars=(0.0, 6.0)),
    )
}
#: From this many elements on, relu in BF16 is a threshold on the bits: six tenths of the instructions, after two calls
#: instead of one. As integers, numbers of minus sign end at minus infinity; above it are NaN of minus sign, then 0, all
#: numbers of plus sign and their NaN.
RELU_AS_INTEGERS = 1 << 14
#: The bits of minus infinity in BF16.
MINUS_INFINITY = -128
NONE = "none"
ADD = "add"
ADD_RELU = "add_relu"


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
