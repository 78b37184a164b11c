"""Gives whoever can see how a tensor lies in memory the strides that the model has there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir import strides
from armopt.ir.records import PassResult, Skip

_aten = torch.ops.aten


def _overloads(names: str) -> frozenset[Any]:
    packets = [getattr(_aten, name) for name in names.split()]
    return frozenset(getattr(packet, overload) for packet in packets for overload in packet.overloads())


#: What kernels answer in a layout of their own, and what later passes put together otherwise.
_OWN_LAYOUT = _overloads(
    """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution _convolution_mode
    matmul bmm baddbmm einsum tensordot bilinear scaled_dot_product_attention lstm gru rnn_tanh rnn_relu
    """
)
#: Products that are contiguous, whatever reads them, unless they are merged with another one of the same operand.
_PRODUCTS = _overloads("linear mm addmm mv addmv")
#: Their results are contiguous, however their operands lie.
_CONTIGUOUS = _PRODUCTS | _overloads("layer_norm native_layer_norm embedding")
_SUMS = _overloads("add add_")
#: What may be left out as a copy: see RemoveIdentities.
_COPIES = _overloads("clone pad constant_pad_nd _to_copy to lift_fresh_copy dropout feature_dropout")


@dataclass(frozen=True)
class KeepStrides:
    """output(y) -> output(contiguous(y)), and the same in front of all that reads strides, such as as_strided.

    A packed convolution gives channels_last where PyTorch gives contiguous, a pass may leave out a copy, and a constant
    is contiguous once it is stored. What
    contiguous stands for is the layout that `y` has in the model: channels_last or permuted where it is. It copies
    nothing where `y` has it already, and is left out where nothing in front of it can change it. Views are made again
    from the memory that they look into, so what else reads that stays as it was. Refuses memory with gaps.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        graph = graph_module.graph
        keeper = _Keeper(graph, _uncertain(graph))
        for node in list(graph.nodes):
            if strides.reads_strides(node):
                kept = fx.map_arg((node.args, node.kwargs), keeper.kept)
                node.args, node.kwargs = kept
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(keeper.rewritten), tuple(keeper.rewritten), tuple(keeper.skipped))


class _Keeper:
    """Puts what keeps strides behind the values that need it, once for each."""

    def __init__(self, graph: fx.Graph, uncertain: set[fx.Node]) -> None:
        self.rewritten: list[str] = []
        self.skipped: list[Skip] = []
        self._graph = graph
        self._uncertain = uncertain
        self._kept: dict[fx.Node, fx.Node] = {}

    def kept(self, node: fx.Node) -> fx.Node:
        """The same value with the model's strides."""
        if node not in self._kept:
            self._kept[node] = self._make(node)
        return self._kept[node]

    def _make(self, node: fx.Node) -> fx.Node:
        if node not in self._uncertain or strides.fixes_layout(node):
            return node
        after = node.next
        if strides.is_view(node):
            source: Any = node.args[0]
            kept = fx.map_arg(source, self.kept)
            if kept is source:
                return node
            target: Callable[..., Any] = node.target  # type: ignore[assignment]
            return g.insert_call(self._graph, after, target, (kept, *node.args[1:]), dict(node.kwargs))
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return node
        dims = strides.order(value)
        if dims is None:
            self.skipped.append(Skip(node.name, "it has gaps or overlaps in memory"))
            return node
        self.rewritten.append(node.name)
        result = node
        for target, more, kwargs in strides.calls(dims):
            result = g.insert_call(self._graph, after, target, (result, *more), kwargs)
        return result


def _uncertain(graph: fx.Graph) -> set[fx.Node]:
    """The values that may lie otherwise when the lowered graph runs."""
    found: set[fx.Node] = set()
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.all_input_nodes and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
        if node in constant and not _is_contiguous(node):
            found.add(node)
        if node.op == "call_function" and _is_uncertain(node, found):
            found.add(node)
    return found


def _is_contiguous(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or strides.is_dense(value, range(value.dim()))


def _is_uncertain(node: fx.Node, uncertain: set[fx.Node]) -> bool:
    if node.target in _OWN_LAYOUT and not _is_product(node):
        return True
    if _is_product(node):
        return any(_is_product(other) for operand in node.all_input_nodes for other in _others(operand, node))
    if node.target in _CONTIGUOUS:
        return False
    if _moves(node):
        return True
    return any(operand in uncertain for operand in node.all_input_nodes)


def _is_product(node: fx.Node) -> bool:
    """Whether it is, or becomes, a Linear: a product with a constant matrix."""
    if node.target is not _aten.matmul.default:
        return node.target in _PRODUCTS
    factor: Any = node.args[1]
    matrix = g.fake_value(factor).dim() == 2
    while strides.is_view(factor):
        factor = factor.args[0]
    return matrix and factor.op == "get_attr"


def _others(operand: fx.Node, node: fx.Node) -> list[fx.Node]:
    return [] if operand.op == "get_attr" else [user for user in operand.users if user is not node]


def _moves(node: fx.Node) -> bool:
    """Whether it is a copy in another layout, which a pass may leave out where only its values are read, or a sum of
    operands that lie otherwise, which may become part of the product that is one of them."""
    operands = [each.meta.get("val") for each in node.all_input_nodes]
    value = node.meta.get("val")
    tensors = [each for each in operands if isinstance(each, torch.Tensor)]
    if not isinstance(value, torch.Tensor) or not tensors:
        return False
    if strides.fixes_layout(node):
        return True
    if node.target in _SUMS:
        product = any(map(_is_product, node.all_input_nodes))
        return product and any(not strides.are_equal(each, value) for each in tensors if each.dim() == value.dim())
    return not strides.is_view(node) and node.target in _COPIES and not strides.are_equal(tensors[0], value)
