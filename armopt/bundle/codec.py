"""torch.fx graphs as JSON and back. No pickle and no code: operations are names, resolved against an allow-list."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from armopt.bundle.program import Program
from armopt.errors import BundleError, CaptureError
from armopt.ir import graph as g
from armopt.ir.calls import call_of
from armopt.ir.records import Site
from armopt.kernels import sites

_NAMESPACES = ("aten", "armopt", "torchvision", "prims")
#: Operations that reach beyond their tensors.
_BANNED = frozenset({"aten::from_file", "aten::_from_file"})
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            *("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "abs"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not", "sym_ite", "sym_sqrt")
        if hasattr(torch, name)
    },
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}


def encode(source: Program, prefix: str = "") -> dict[str, Any]:
    """A program as JSON; the names of its weights begin with `prefix`.

    Raises:
        CaptureError: The graph holds something that has no form here.
    """
    nodes = []
    output: Any = None
    for node in source.graph_module.graph.nodes:
        if node.op == "output":
            output = _encode(node.args[0], node)
        elif node.op == "placeholder":
            nodes.append({"name": node.name, "op": "input"})
        elif node.op == "get_attr":
            nodes.append({"name": node.name, "op": "weight", "target": f"{prefix}{node.target}"})
        else:
            entry = {"name": node.name, "op": "call", "target": target_name(node.target)}
            entry["args"] = [_encode(arg, node) for arg in node.args]
            if node.kwargs:
                entry["kwargs"] = {key: _encode(value, node) for key, value in node.kwargs.items()}
            if node.name in source.sites:
                entry["shape"] = list(source.sites[node.name].shape)
                entry["output"] = list(source.shapes[node.name])
            if line := g.source_line(node):
                entry["source"] = line
            nodes.append(entry)
    return {"bucket": dict(source.bucket), "nodes": nodes, "output": output}


def target_name(target: Any) -> str:
    """An operation by name.

    Raises:
        CaptureError: It is on no allow-list.
    """
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace in _NAMESPACES and target._schema.name not in _BANNED:
            return str(target)
        raise CaptureError(
            f"the model calls {target}, an operation of another package",
            hint="Bundles hold operations of torch and torchvision alone; see docs/capture.md",
        )
    if target in _NAMES:
        return _NAMES[target]
    raise CaptureError(f"the model calls {getattr(target, '__name__', target)}, which a bundle can't hold")


def _encode(value: Any, node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (list, tuple)):
        return [_encode(item, node) for item in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in _CONSTANTS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise CaptureError(f"node {node.name} has an argument of type {type(value).__name__}, which a bundle can't hold")


def decode(data: Mapping[str, Any], weights: Mapping[str, torch.Tensor], where: str, prefix: str = "") -> Program:
    """A program from JSON; `prefix` as it was encoded.

    Raises:
        BundleError: An unknown operation, node or weight.
    """
    graph = fx.Graph()
    root = torch.nn.Module()
    nodes: dict[str, fx.Node] = {}
    found: dict[str, Site] = {}
    shapes: dict[str, tuple[int | None, ...]] = {}
    try:
        for entry in data["nodes"]:
            name = entry["name"]
            if entry["op"] == "input":
                node = graph.placeholder(name)
            elif entry["op"] == "weight":
                target = entry["target"].removeprefix(prefix)
                if not hasattr(root, target):
                    root.register_buffer(target, weights[entry["target"]])
                node = graph.get_attr(target)
            else:
                args = tuple(_decode(arg, nodes) for arg in entry["args"])
                kwargs = {key: _decode(value, nodes) for key, value in entry.get("kwargs", {}).items()}
                node = graph.create_node("call_function", resolve(entry["target"], where), args, kwargs, name=name)
            nodes[name] = node
            if "source" in entry:
                node.meta["source"] = entry["source"]
            if "shape" in entry:
                weight = getattr(root, call_of(node).weight_name)
                found[node.name] = sites.describe(node, entry["shape"], weight.shape)
                shapes[node.name] = tuple(entry["output"])
        graph.output(tuple(_decode(data["output"], nodes)))
    except BundleError:
        raise
    except Exception as error:  # whatever a wrong graph.json makes torch or Python say
        raise BundleError(f"graph.json does not fit: {error!r}", where=where, hint="Make the bundle again") from error
    return Program(data["bucket"], fx.GraphModule(root, graph), found, shapes)


def resolve(name: str, where: str) -> Callable[..., Any]:
    """The operation of that name, from the allow-list.

    Raises:
        BundleError: It is not on the list, or this build of torch does not have it.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) == 3 and parts[0] in _NAMESPACES and f"{parts[0]}::{parts[1]}" not in _BANNED:
        if parts[0] == "torchvision":
            from armopt.models import torchvision_ops

            torchvision_ops.ensure_torchvision()
        found: Any = getattr(torch.ops, parts[0])
        for part in parts[1:]:
            found = getattr(found, part, None)
        if isinstance(found, torch._ops.OpOverload):
            return found
        raise BundleError(
            f"the graph calls {name}, which torch {torch.__version__} does not have",
            where=where,
            hint="Install the versions in the bundle's requirements.txt",
        )
    raise BundleError(f"the graph calls {name!r}, which is not allowed in a bundle", where=where)


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "float":
        return float(content)
    if kind == "complex":
        return complex(*content)
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content)
    if not isinstance(found, _CONSTANTS[kind]):
        raise TypeError(f"{content} is no {kind}")
    return found
