"""torch.fx graphs as records and back. No pickle and no code: operations are names, resolved against a closed list.

torch.fx makes Python's source text of a graph, its names among it. So a graph that is read gets names of armopt's own
making (n0, n1… and w0, w1…), and those of the bundle are kept beside them for people.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import msgspec
import torch
from torch import fx

from armopt.bundle import graph_file, operations, schema
from armopt.bundle.program import Program
from armopt.errors import BundleError, CaptureError, InputError
from armopt.ir import graph as g
from armopt.ir.calls import call_of
from armopt.ir.operations import CONV, LINEAR
from armopt.ir.records import Site
from armopt.kernels import post_ops, sites, table

_LAYERS = (LINEAR, CONV)
_COPY = torch.ops.aten.copy_.default
_POST_OPS = frozenset({post_ops.NONE, post_ops.ADD, post_ops.ADD_RELU, *post_ops.UNARY})
_CONSTANTS: Mapping[type, Any] = {
    torch.dtype: graph_file.DtypeName,
    torch.memory_format: graph_file.MemoryFormat,
    torch.layout: graph_file.Layout,
}


def encode(
    source: Program, prefix: str = "", names: Mapping[str, str] = MappingProxyType({})
) -> graph_file.StoredProgram:
    """A program as a record; its weights' names begin with `prefix`, and `names` has those that they are stored by.

    Raises:
        CaptureError: The graph holds something that has no form here.
    """
    nodes: list[graph_file.Input | graph_file.Weight | graph_file.Call] = []
    output: Any = ()
    for node in source.graph_module.graph.nodes:
        name = g.shown_name(node)
        if node.op == "output":
            output = tuple(_encode(value, node) for value in node.args[0])
        elif node.op == "placeholder":
            nodes.append(graph_file.Input(name))
        elif node.op == "get_attr":
            target = str(node.target)
            weight = f"{prefix}{source.weights.get(target, target)}"
            nodes.append(graph_file.Weight(name, names.get(weight, weight)))
        else:
            nodes.append(_encode_call(node, name, source))
    made = graph_file.StoredProgram(dict(source.bucket), tuple(nodes), output)
    try:
        return msgspec.convert(schema.builtins(made), graph_file.StoredProgram)
    except msgspec.ValidationError as error:
        raise CaptureError(f"the graph can't be held in a bundle: {error}") from error


def _encode_call(node: fx.Node, name: str, source: Program) -> graph_file.Call:
    site = source.sites.get(node.name)
    line = g.source_line(node)
    try:
        target = target_name(node.target)
    except CaptureError as error:
        raise CaptureError(error.what, where=line, hint=error.hint) from None
    args = tuple(_encode(arg, node) for arg in node.args)
    kwargs = {key: _encode(value, node) for key, value in node.kwargs.items()}
    try:
        operations.check_arguments(node.target, args, kwargs)  # type: ignore[arg-type]
    except operations.UnlistedError as error:
        raise _unlisted(error, line) from None
    return graph_file.Call(
        name,
        target,
        args,
        kwargs,
        shape=None if site is None else tuple(site.shape),
        output=None if site is None else tuple(source.shapes[node.name]),
        source=line,
    )


def target_name(target: Any) -> str:
    """An operation by name.

    Raises:
        CaptureError: It is not on the list.
    """
    try:
        return operations.name_of(target)
    except operations.UnlistedError as error:
        raise _unlisted(error) from None


def _unlisted(error: operations.UnlistedError, line: str = "") -> CaptureError:
    hint = "Bundles hold operations of torch and torchvision alone; see docs/capture.md"
    return CaptureError(f"the model calls {error}", where=line, hint=hint)


def _encode(value: Any, node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return graph_file.Ref(g.shown_name(value))
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return graph_file.quotable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else graph_file.SpecialFloat(str(value))  # type: ignore[arg-type]
    if isinstance(value, complex) and cmath.isfinite(value):
        return graph_file.Complex(value.real, value.imag)
    if isinstance(value, (list, tuple)):
        return [_encode(item, node) for item in value]
    if isinstance(value, torch.device):
        return graph_file.Device(str(value))  # type: ignore[arg-type]
    for kind, record in _CONSTANTS.items():
        if isinstance(value, kind):
            return record(str(value).removeprefix("torch."))
    raise CaptureError(f"node {node.name} has an argument of type {type(value).__name__}, which a bundle can't hold")


def decode(
    stored: graph_file.StoredProgram, weights: Mapping[str, torch.Tensor], where: str, prefix: str = ""
) -> Program:
    """A program from a record; `prefix` as it was encoded.

    Raises:
        BundleError: An unlisted operation, an argument that it does not take, an unknown node or weight.
    """
    reader = _Reader(stored, weights, prefix)
    node: Any = None
    try:
        for node in stored.nodes:
            reader.add(node)
        node = None
        return reader.finish()
    except operations.LackingError as error:
        raise BundleError(
            f"the graph calls {error}, which torch {torch.__version__} does not have",
            where=where,
            hint="Install the versions in the bundle's requirements.txt",
        ) from None
    except operations.UnlistedError as error:
        what = f"the graph calls {error}"
    except (_UnfitError, InputError) as error:
        what = str(error)
    except Exception as error:  # whatever a wrong graph.json makes torch or Python say
        what = f"does not fit: {error!r}"
    place = "output" if node is None else f"node {node.name}"
    raise BundleError(what, where=f"{where}: {place}", hint="Make the bundle again")


class _UnfitError(Exception):
    """What is wrong with a node."""


class _Reader:
    """Makes a graph of what a bundle says, node by node."""

    def __init__(self, stored: graph_file.StoredProgram, weights: Mapping[str, torch.Tensor], prefix: str) -> None:
        self._stored, self._weights, self._prefix = stored, weights, prefix
        # the same name for a weight in all programs, as they share what is packed of it
        self._own = {name: f"w{i}" for i, name in enumerate(sorted(weights))}
        self._graph, self._root = fx.Graph(), torch.nn.Module()
        self._nodes: dict[str, fx.Node] = {}
        self._numbers = operations.Numbers()
        self._sites: dict[str, Site] = {}
        self._shapes: dict[str, tuple[int | None, ...]] = {}
        self._named: dict[str, str] = {}

    def add(self, stored: graph_file.Input | graph_file.Weight | graph_file.Call) -> None:
        """The next node."""
        if stored.name in self._nodes:
            raise _UnfitError("its name is there twice")
        own = f"n{len(self._nodes)}"
        if isinstance(stored, graph_file.Input):
            node = self._graph.create_node("placeholder", own, name=own)
        elif isinstance(stored, graph_file.Weight):
            node = self._graph.create_node("get_attr", self._weight(stored.target), name=own)
        else:
            node = self._call(stored, own)
        node.meta["name"] = stored.name
        self._nodes[stored.name] = node
        if isinstance(stored, graph_file.Call):
            self._describe(node, stored)

    def finish(self) -> Program:
        """The program."""
        self._graph.output(tuple(self._decode(value) for value in self._stored.output))
        module = fx.GraphModule(self._root, self._graph)
        return Program(self._stored.bucket, module, self._sites, self._shapes, self._named)

    def _weight(self, target: str) -> str:
        if target not in self._own:
            raise _UnfitError(f"there is no weight {target}")
        own = self._own[target]
        if own not in self._named:
            self._root.register_buffer(own, self._weights[target])
            self._named[own] = target.removeprefix(self._prefix)
        return own

    def _call(self, stored: graph_file.Call, own: str) -> fx.Node:
        target = operations.find(stored.target)
        operations.check_arguments(target, stored.args, stored.kwargs)
        args = tuple(self._decode(arg) for arg in stored.args)
        kwargs = {name: self._decode(value) for name, value in stored.kwargs.items()}
        self._numbers.note(stored.name, target, stored.args)
        if target is _COPY and not self._is_constant(args[0]):
            raise operations.UnlistedError(f"{stored.target} on something other than a weight")
        return self._graph.create_node("call_function", target, args, kwargs, name=own)

    def _describe(self, node: fx.Node, stored: graph_file.Call) -> None:
        if stored.source:
            node.meta["source"] = stored.source
        if (node.target in _LAYERS) != (stored.shape is not None and stored.output is not None):
            raise _UnfitError("a layer has a shape and an output, and nothing else has")
        if stored.shape is None or stored.output is None:
            return
        call = call_of(node)
        if not self._is_constant(call.weight) or not (call.bias is None or self._is_constant(call.bias)):
            raise _UnfitError("the weight or bias of a layer is no weight of the bundle")
        kernel = table.get(call.kernel)
        site = sites.describe(node, stored.shape, getattr(self._root, call.weight_name).shape)
        if kernel.op != site.op or call.post_op not in _POST_OPS:
            raise _UnfitError(f"{site.op} with the kernel {kernel.name} and the post-op {call.post_op}")
        self._sites[node.name] = replace(site, node=stored.name)
        self._shapes[node.name] = stored.output

    @staticmethod
    def _is_constant(value: Any) -> bool:
        return isinstance(value, fx.Node) and value.op == "get_attr"

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if isinstance(value, graph_file.Ref):
            if value.name not in self._nodes:
                raise _UnfitError(f"there is no node {value.name} before it")
            return self._nodes[value.name]
        if isinstance(value, graph_file.SpecialFloat):
            return float(value.name)
        if isinstance(value, graph_file.Complex):
            return complex(value.real, value.imag)
        if isinstance(value, graph_file.Device):
            return torch.device(value.name)
        if isinstance(value, (graph_file.DtypeName, graph_file.MemoryFormat, graph_file.Layout)):
            return getattr(torch, value.name)
        return value
