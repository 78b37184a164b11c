"""Fuses pointwise functions into the layer in front of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import call_of, is_layer
from armopt.ir.records import Dim, PassResult, Skip
from armopt.kernels import post_ops

_aten = torch.ops.aten
_UNARY: dict[Any, str] = {
    _aten.relu.default: "relu",
    _aten.silu.default: "silu",
    _aten.hardswish.default: "hardswish",
    _aten.hardsigmoid.default: "hardsigmoid",
    _aten.sigmoid.default: "sigmoid",
    _aten.tanh.default: "tanh",
    _aten.relu6.default: "relu6",
}


@dataclass(frozen=True)
class FusePointwise:
    """relu(layer(x)), layer(x) + y, relu(layer(x) + y)… -> layer(x, post_op=…).

    Refuses a layer whose result is used elsewhere, an addition that broadcasts or scales, and a second function behind
    the first other than relu behind add.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten: list[str] = []
        skipped: list[Skip] = []
        order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
        for node in list(graph_module.graph.nodes):
            name = _unary(node)
            if name is not None:
                _fuse_unary(node, name, rewritten, skipped)
            elif node.op == "call_function" and node.target is _aten.add.Tensor:
                _fuse_add(node, order, rewritten, skipped)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _unary(node: fx.Node) -> str | None:
    """The post-op that a node is, by its arguments too."""
    if node.op != "call_function":
        return None
    if node.target is _aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    if node.target in (_aten.hardtanh.default, _aten.clamp.default):
        bounds = node.args[1:3]
        return "relu6" if bounds == (0, 6) else None
    if node.target is _aten.clamp_min.default and node.args[1] == 0:
        return "relu"
    return _UNARY.get(node.target)


def _layer(node: object) -> fx.Node | None:
    return node if isinstance(node, fx.Node) and is_layer(node) else None


def _fuse_unary(node: fx.Node, name: str, rewritten: list[str], skipped: list[Skip]) -> None:
    layer = _layer(node.args[0])
    if layer is None:
        return
    call = call_of(layer)
    if len(layer.users) > 1:
        skipped.append(Skip(node.name, f"{layer.name} is used by {len(layer.users)} nodes"))
    elif call.post_op == post_ops.NONE:
        _rewrite(node, layer, name, None, rewritten)
    elif call.post_op == post_ops.ADD and name == "relu":
        _rewrite(node, layer, post_ops.ADD_RELU, call.other, rewritten)
    else:
        skipped.append(Skip(node.name, f"{layer.name} has {call.post_op} fused already"))


def _fuse_add(node: fx.Node, order: dict[fx.Node, int], rewritten: list[str], skipped: list[Skip]) -> None:
    first, second = node.args[:2]
    layers = [n for n in (_layer(first), _layer(second)) if n is not None]
    if not layers:
        return
    free = [n for n in layers if call_of(n).post_op == post_ops.NONE and len(n.users) == 1]
    if not free or first is second:
        names = " and ".join(n.name for n in layers)
        skipped.append(Skip(node.name, f"{names}: used elsewhere, or with a post-op already"))
        return
    # the later one: its operand is then ready when it runs
    layer = max(free, key=lambda n: order.get(n, -1))
    other = second if layer is first else first
    if node.kwargs.get("alpha", 1) != 1:
        skipped.append(Skip(node.name, "the addition is scaled"))
    elif not isinstance(other, fx.Node) or not isinstance(other.meta.get("val"), torch.Tensor):
        skipped.append(Skip(node.name, "adds a number"))
    elif _kind(other) != _kind(layer):
        skipped.append(Skip(node.name, "the addition broadcasts or converts"))
    else:
        _rewrite(node, layer, post_ops.ADD, other, rewritten)


def _kind(node: fx.Node) -> tuple[tuple[Dim, ...], torch.dtype]:
    value = g.fake_value(node)
    return g.symbolic_shape(value.shape), value.dtype


def _rewrite(node: fx.Node, layer: fx.Node, post_op: str, other: object, rewritten: list[str]) -> None:
    """Moves the layer to where `node` is, so that everything it reads is defined."""
    node.prepend(layer)
    layer.args = call_of(layer).replace(other=other, post_op=post_op).args
    rewritten.append(node.name)
    g.replace_and_erase(node, layer)
