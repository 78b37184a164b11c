"""A bundle's program in standard operations and FP32, from which torch.onnx translates.

A product planned in BF16 gets the form on which ONNX Runtime's BF16 flag takes effect (see docs/onnx.md): a Linear is
MatMul with a constant of shape [K, N] and a subtraction of the negated bias, because MatMul and Add would be fused to
Gemm; a convolution with a filter of one pixel is the same with its channels last. All others are Gemm and Conv, which
stay in FP32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.bundle.program import Program
from armopt.errors import InputError
from armopt.ir import graph as g
from armopt.ir.calls import ConvCall, LayerCall, call_of, is_layer
from armopt.ir.operations import CONV, JOIN_ROWS, RECURRENCE, SPLIT_ROWS
from armopt.ir.records import Op, Precision, Site
from armopt.kernels import post_ops, table
from armopt.onnx_export import recurrence, rows

#: armopt's own operations in those that are translated.
_IN_STANDARD: dict[Any, Any] = {RECURRENCE: recurrence.run, SPLIT_ROWS: rows.split, JOIN_ROWS: rows.join}
#: Values of a constant from which ONNX Runtime multiplies by it in BF16 (seen on emulated cores; its source agrees).
LEAST_CONSTANT = 32
#: A convolution of one pixel in this form moves every value of its input and output once more, for half of the
#: instructions of its product. Both are even at about 22 multiply-adds for each value moved, by the counts in
#: docs/onnx.md: 64 channels to 64 have 32 and gain a sixth, 16 to 64 have 13 and lose a third.
LEAST_PIXEL = 24
#: Between an operation and the model's line, in the name that torch.export carries for each node.
CALLED_IN = ", called in "
_EMBEDDING = torch.ops.aten.embedding.default
#: How a constant of the bundle stands in the ONNX graph: views and exact operations.
_FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda t: t,
    "kn": lambda t: t.t(),
    "pixel": lambda t: t.flatten(1).t(),
    "negated": lambda t: -t,
    "zeros": lambda t: t.new_zeros(t.shape[0]),
}


@dataclass(frozen=True, slots=True)
class Standard:
    """A program that torch.export can trace.

    Attributes:
        graph_module: The program; its matrices, filters and embedding tables are placeholders that take no memory.
        weights: For each placeholder, what makes its value in FP32.
        fast: Names of the layers in the form that the BF16 flag takes effect on.
    """

    graph_module: fx.GraphModule
    weights: Mapping[str, Callable[[], torch.Tensor]]
    fast: tuple[str, ...]


def standard(program: Program, *, fast_math: bool) -> Standard:
    """Rewrites a program.

    Args:
        program: A bundle's program; left as it is.
        fast_math: Whether products planned in BF16 get the form for ONNX Runtime's BF16 flag.

    Raises:
        InputError: The model writes to a buffer.
    """
    _refuse_state(program.graph_module.graph, program.weights)
    return _Builder(program).build(fast_math)


def takes_fast_math(node: fx.Node, site: Site) -> bool:
    """Whether a layer has a form that ONNX Runtime's BF16 flag takes effect on, and is planned in BF16."""
    if table.get(call_of(node).kernel).precision == Precision.FP32:
        return False
    if site.op == Op.LINEAR:
        return site.k * site.n >= LEAST_CONSTANT
    pixel = not site.transposed and site.groups == 1 and set(site.weight[2:]) == {1} and not any(site.padding)
    return pixel and site.k * site.n >= LEAST_PIXEL * (site.k + site.n)


def label(node: fx.Node) -> str:
    """What messages call a node: its operation, and the model's line that it comes from where that is known."""
    source = g.source_line(node)
    return f"{node.target}{CALLED_IN}{source}" if source else str(node.target)


def _refuse_state(graph: fx.Graph, names: Mapping[str, str]) -> None:
    written = g.written_constants(graph)
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in written:
            raise InputError(
                f"the model writes to its buffer {names.get(node.target, node.target)}, and an ONNX model has no state",
                hint="Return the new value from forward, or export a model without that buffer",
            )


class _Builder:
    def __init__(self, program: Program) -> None:
        source = program.graph_module
        self._source = source.graph
        self._sites = program.sites
        self._constants = dict(source.named_buffers())
        self._names = program.weights
        self._graph = fx.Graph()
        self._root = torch.nn.Module()
        self._made: dict[fx.Node, Any] = {}
        self._attributes: dict[tuple[str, str], fx.Node] = {}
        self._weights: dict[str, Callable[[], torch.Tensor]] = {}
        filters = [ConvCall.of(node).weight_name for node in g.calls_to(source.graph, CONV)]
        self._tables = {str(node.all_input_nodes[0].target) for node in g.calls_to(source.graph, _EMBEDDING)}
        self._whole = {*filters, *self._tables}

    def build(self, fast_math: bool) -> Standard:
        fast = []
        for node in self._source.nodes:
            if node.op == "get_attr":
                continue
            if is_layer(node):
                is_fast = fast_math and takes_fast_math(node, self._sites[node.name])
                call = self._layer(call_of(node), is_fast)
                if is_fast:
                    fast.append(self._sites[node.name].node)
            else:
                call = self._graph.node_copy(node, self._new)
                call.args, call.kwargs = _in_fp32(call.args), _in_fp32(call.kwargs)
                call.target = _IN_STANDARD.get(call.target, call.target)
            if node.op == "call_function":
                call.meta = {"stack_trace": label(node)}
            self._made[node] = call
        return Standard(fx.GraphModule(self._root, self._graph), self._weights, tuple(fast))

    def _new(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            return self._constant(node, "", is_weight=str(node.target) in self._whole)
        made: fx.Node = self._made[node]
        return made

    def _constant(self, node: fx.Node, form: str, *, is_weight: bool = False) -> fx.Node:
        """A constant in some form; each form of each constant is there once. A matrix that is an embedding's table too
        is that table turned, which ONNX Runtime does once, when it loads."""
        key = str(node.target), form
        if key not in self._attributes and form == "kn" and key[0] in self._tables:
            self._attributes[key] = self._call(torch.t, self._constant(node, "", is_weight=True))
        if key not in self._attributes:
            stored = self._constants[key[0]]
            shown = self._names.get(key[0], key[0])
            wanted = f"{shown.removesuffix('_bf16')}_{form}".rstrip("_")
            name = g.attribute_name(self._root, wanted)
            if is_weight:
                self._weights[name] = lambda: _FORMS[form](stored).float().contiguous()
                shape = _FORMS[form](stored.to("meta")).shape
                value = torch.zeros(()).expand(shape)
            else:
                value = _FORMS[form](stored.float() if stored.dtype == torch.bfloat16 else stored)
            self._root.register_buffer(name, value)
            self._attributes[key] = self._graph.get_attr(name)
        return self._attributes[key]

    def _layer(self, layer: LayerCall[fx.Node], fast: bool) -> fx.Node:
        return self._conv(layer, fast) if isinstance(layer, ConvCall) else self._linear(layer, fast)

    def _linear(self, layer: LayerCall[fx.Node], fast: bool) -> fx.Node:
        x, other = self._new(layer.x), layer.other and self._new(layer.other)
        matrix = self._constant(layer.weight, "kn", is_weight=True)
        if fast:
            negated = layer.bias and self._constant(layer.bias, "negated")
            return self._call(_matmul, x, matrix, negated, other, layer.post_op)
        addend = self._constant(layer.bias, "") if layer.bias else self._constant(layer.weight, "zeros")
        return self._call(_gemm, x, matrix, addend, other, layer.post_op)

    def _conv(self, layer: ConvCall[fx.Node], fast: bool) -> fx.Node:
        x, other = self._new(layer.x), layer.other and self._new(layer.other)
        if fast:
            matrix = self._constant(layer.weight, "pixel", is_weight=True)
            negated = layer.bias and self._constant(layer.bias, "negated")
            return self._call(_pixel, x, matrix, negated, other, layer.post_op, list(layer.stride))
        weight, bias = self._new(layer.weight), layer.bias and self._new(layer.bias)
        return self._call(_conv, x, weight, bias, other, layer.post_op, *layer.geometry)

    def _call(self, function: Callable[..., torch.Tensor], *args: Any) -> fx.Node:
        return self._graph.call_function(function, args)


def _in_fp32(arguments: Any) -> Any:
    """Arguments without BF16: a cast to it becomes one to FP32, which is dropped in translation."""
    return fx.node.map_aggregate(arguments, lambda value: torch.float32 if value == torch.bfloat16 else value)


# --- the forms of a layer; torch.export traces them ------------------------------------------------


def _matmul(
    x: torch.Tensor, matrix: torch.Tensor, negated: torch.Tensor | None, other: torch.Tensor | None, post_op: str
) -> torch.Tensor:
    y = torch.matmul(x, matrix)
    return post_ops.apply(post_op, y if negated is None else y - negated, other)


def _gemm(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor, other: torch.Tensor | None, post_op: str
) -> torch.Tensor:
    if x.dim() == 2:
        y = torch.addmm(bias, x, matrix)
    else:
        y = torch.addmm(bias, x.reshape(-1, matrix.shape[0]), matrix).reshape(*x.shape[:-1], matrix.shape[1])
    return post_ops.apply(post_op, y, other)


def _pixel(
    x: torch.Tensor,
    matrix: torch.Tensor,
    negated: torch.Tensor | None,
    other: torch.Tensor | None,
    post_op: str,
    stride: list[int],
) -> torch.Tensor:
    for dimension, step in enumerate(stride, start=2):
        if step != 1:
            x = torch.ops.aten.slice.Tensor(x, dimension, 0, None, step)
    y = torch.matmul(x.movedim(1, -1), matrix)
    y = y if negated is None else y - negated
    return post_ops.apply(post_op, y.movedim(-1, 1), other)


def _conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    post_op: str,
    *geometry: Any,
) -> torch.Tensor:
    return post_ops.apply(post_op, torch.convolution(x, weight, bias, *geometry), other)
