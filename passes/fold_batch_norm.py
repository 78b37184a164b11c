"""Folds batch norm into the layer in front of it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import ConvCall, LayerCall, LinearCall, call_of, is_layer
from armopt.ir.records import PassResult, Skip
from armopt.kernels import post_ops

_aten = torch.ops.aten
_NORMS = (_aten._native_batch_norm_legit_no_training.default, _aten.batch_norm.default)


@dataclass(frozen=True)
class _Norm:
    """A batch norm at inference: its node, the node that holds its result, and its constants."""

    node: fx.Node
    result: fx.Node
    constants: tuple[fx.Node | None, ...]
    eps: float

    @property
    def key(self) -> tuple[object, ...]:
        return (*(c and c.target for c in self.constants), self.eps)


@dataclass(frozen=True)
class FoldBatchNorm:
    """batch_norm(conv(x, W, b)) -> conv(x, W', b'); linear likewise.

    W' and b' are computed in FP64. Refuses a layer whose result is used elsewhere, a fused post-op, running statistics
    that are no constants, and a weight shared with a layer that has another batch norm.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten, skipped = [], []
        folded: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        weights: dict[tuple[object, ...], torch.Tensor] = {}  # shared where biases differ
        for node in g.calls_to(graph_module.graph, *_NORMS):
            layer = node.args[0]
            if not (isinstance(layer, fx.Node) and is_layer(layer)):
                continue
            call, norm = call_of(layer), _parse(node)
            reason = _refusal(graph_module, layer, call, norm)
            if norm is None or reason:
                skipped.append(Skip(node.name, reason or "not a batch norm at inference"))
                continue
            name, bias = call.weight_name, call.bias
            key = (name, bias and bias.target, norm.key)
            if key not in folded:
                new_weight, new_bias = _fold(graph_module, call, norm)
                folded[key] = weights.setdefault((name, norm.key), new_weight), new_bias
            new_weight, new_bias = folded[key]
            layer.args = call.replace(
                weight=g.add_constant(graph_module, f"{name}_bn", new_weight, layer, [call.weight]),
                bias=g.add_constant(graph_module, f"{name}_bn_bias", new_bias, layer),
            ).args
            rewritten.append(node.name)
            norm.result.replace_all_uses_with(layer)
            for dead in dict.fromkeys((norm.result, norm.node)):
                graph_module.graph.erase_node(dead)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _parse(node: fx.Node) -> _Norm | None:
    arguments: Any = node.args
    constants = tuple(c if isinstance(c, fx.Node) else None for c in arguments[1:5])
    if node.target is _aten.batch_norm.default:
        if arguments[5] is not False:
            return None
        return _Norm(node, node, constants, float(arguments[7]))
    results = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    if len(results) != 1 or len(node.users) != 1:
        return None
    return _Norm(node, results[0], constants, float(arguments[6]))


def _refusal(graph_module: fx.GraphModule, layer: fx.Node, call: LayerCall[fx.Node], norm: _Norm | None) -> str | None:
    if norm is None:
        return "not a batch norm at inference"
    if len(layer.users) > 1:
        return f"{layer.name} is used by {len(layer.users)} nodes"
    if call.post_op != post_ops.NONE:
        return f"{layer.name} has a fused post-op"
    if any(c is not None and g.find_constant(graph_module, c) is None for c in norm.constants):
        return "its statistics are not constants"
    if norm.constants[2] is None or norm.constants[3] is None:
        return "it has no running statistics"
    if isinstance(call, LinearCall) and g.fake_value(layer).dim() != 2:
        return "it normalises another dimension than the Linear's features"
    if isinstance(call, ConvCall) and call.transposed and call.groups != 1:
        return "a grouped transposed convolution"
    return _sharing(graph_module, layer, call.weight_name, norm)


def _sharing(graph_module: fx.GraphModule, layer: fx.Node, weight: str, norm: _Norm) -> str | None:
    """Why a weight that another layer has too can't be folded into; None where it can."""
    held = graph_module.graph.find_nodes(op="get_attr", target=weight)
    for user in (u for n in held for u in n.users if u is not layer):
        followers = list(user.users)
        other = _parse(followers[0]) if len(followers) == 1 and followers[0].target in _NORMS else None
        if other is None or other.key != norm.key:
            return f"{weight} is shared with {user.name}, which has another batch norm"
    return None


def _fold(graph_module: fx.GraphModule, call: LayerCall[fx.Node], norm: _Norm) -> tuple[torch.Tensor, torch.Tensor]:
    _, _, mean_node, variance_node = norm.constants
    assert mean_node is not None
    mean = g.constant(graph_module, mean_node).double()

    def read(node: fx.Node | None, otherwise: float) -> torch.Tensor:
        return torch.full_like(mean, otherwise) if node is None else g.constant(graph_module, node).double()

    gamma, beta, variance = read(norm.constants[0], 1.0), read(norm.constants[1], 0.0), read(variance_node, 1.0)
    bias, weight = read(call.bias, 0.0), g.constant(graph_module, call.weight)
    scale = gamma / torch.sqrt(variance + norm.eps)
    shape = [1] * weight.dim()
    shape[1 if isinstance(call, ConvCall) and call.transposed else 0] = -1
    return (weight.double() * scale.reshape(shape)).float(), ((bias - mean) * scale + beta).float()
