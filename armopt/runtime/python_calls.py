"""Calls operations through PyTorch's own Python bindings: half the instructions of a call of the operator object.

``torch.ops.aten.permute.default(x, …)`` parses its arguments by schema at run time (19 thousand instructions on the
emulated Graviton3); ``torch.permute(x, …)`` is compiled for its arguments (10 thousand) and does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from armopt.ir.operations import JOIN_ROWS, SPLIT_ROWS, join_rows, split_rows

_aten = torch.ops.aten
#: PyTorch's own, which a release may lack: there the operation itself is called.
_functions, _nn = (getattr(torch._C, name, None) for name in ("_VariableFunctions", "_nn"))

#: Operations with a binding that takes the operation's own arguments, by where the binding is.
_IN_TORCH = (
    *("add.Tensor", "addmm.default", "bitwise_and.Scalar", "bmm.default", "cat.default", "clone.default"),
    *("constant_pad_nd.default", "maximum.default"),
    *("convolution.default", "div.Tensor", "embedding.default", "flatten.using_ints", "layer_norm.default"),
    *("matmul.default", "max_pool2d.default", "mean.dim", "mm.default", "mul.Tensor", "narrow.default"),
    *("permute.default", "relu.default", "relu_.default", "reshape.default", "rsqrt.default", "select.int"),
    *("sigmoid.default", "sigmoid_.default", "softmax.int", "split.Tensor", "split_with_sizes.default"),
    *("squeeze.dim", "squeeze.dims", "stack.default", "sub.Tensor", "tanh.default", "tanh_.default"),
    *("threshold_.default", "transpose.int", "unbind.int", "unflatten.int", "unsqueeze.default"),
)
_IN_NN = (
    *("adaptive_avg_pool2d.default", "avg_pool2d.default", "gelu.default", "gelu_.default", "hardsigmoid.default"),
    *("hardsigmoid_.default", "hardswish.default", "hardswish_.default", "hardtanh.default", "hardtanh_.default"),
    *("linear.default", "scaled_dot_product_attention.default", "silu.default", "silu_.default"),
)
_METHODS = (
    *("add_.Tensor", "addcmul_.default", "copy_.default", "expand.default", "mul_.Tensor"),
    *("view.default", "view.dtype"),
)


def _operation(name: str) -> Any:
    packet, overload = name.split(".")
    return getattr(getattr(_aten, packet), overload)


#: The binding of each operation that has one.
BINDINGS: dict[Any, Callable[..., Any]] = {
    _operation(name): binding
    for place, names in ((_functions, _IN_TORCH), (_nn, _IN_NN), (torch.Tensor, _METHODS))
    for name in names
    if (binding := getattr(place, name.split(".")[0], None)) is not None
} | {
    SPLIT_ROWS: split_rows,
    JOIN_ROWS: join_rows,
}


#: Casts by dtype. One returns its input where that has the dtype already; such casts have left the graph as identities.
CASTS: dict[torch.dtype, Callable[..., Any]] = {
    torch.bfloat16: torch.Tensor.bfloat16,
    torch.float32: torch.Tensor.float,
}


def rebind(node: fx.Node) -> None:
    """Gives a node that calls an operation its binding, where there is one."""
    if node.target is _aten._to_copy.default:
        dtype = node.kwargs.get("dtype")
        if len(node.kwargs) == 1 and isinstance(dtype, torch.dtype) and dtype in CASTS:
            node.target, node.kwargs = CASTS[dtype], {}
    else:
        node.target = BINDINGS.get(node.target, node.target)
