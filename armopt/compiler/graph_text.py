"""A graph as text: the form of the golden files, and of ``armopt plan --text``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from armopt.bundle import codec
from armopt.ir import graph as g

_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
    torch.complex64: "c64",
}


def graph_text(graph_module: fx.GraphModule) -> str:
    """One line for each node: name, dtype and shape, operation."""
    lines = []
    for node in graph_module.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_shown(node.args[0])}")
            continue
        if node.op == "placeholder":
            call = "input"
        elif node.op == "get_attr":
            call = "weight" if node.name == node.target else f"weight {node.target}"
        else:
            arguments = [_shown(arg) for arg in node.args]
            arguments += [f"{key}={_shown(value)}" for key, value in node.kwargs.items()]
            call = f"{operation_name(node.target)}({', '.join(arguments)})"
        lines.append(f"{node.name}: {type_text(node.meta.get('val'))} = {call}")
    return "\n".join(lines)


def operation_name(target: Any) -> str:
    """The name of what a node calls, also of what no bundle may call."""
    return str(target) if isinstance(target, torch._ops.OpOverload) else codec.target_name(target)


def type_text(value: Any) -> str:
    """A value's dtype and shape: ``f32[2,16]``."""
    if isinstance(value, Tensor):
        return f"{_SHORT.get(value.dtype, str(value.dtype))}[{','.join(map(str, g.symbolic_shape(value.shape)))}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(type_text(part) for part in value) + ")"
    return type(value).__name__


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    return str(value).removeprefix("torch.")
