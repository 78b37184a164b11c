"""Folds batch norm into the layer in front of it."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.records import PassResult, Skip
from armopt.kernels.ops import CONV, LINEAR, POST_OP

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
        for node in g.calls(graph_module.graph, *_NORMS):
            layer = node.args[0]
            if not (isinstance(layer, fx.Node) and layer.target in (CONV, LINEAR)):
                continue
            norm = _parse(node)
            reason = _refusal(graph_module, layer, norm)
            if norm is None or reason:
                skipped.append(Skip(node.name, reason or "not a batch norm at inference"))
                continue
            weight, bias = layer.args[1], layer.args[2]
            assert isinstance(weight, fx.Node)
            key = (weight.target, isinstance(bias, fx.Node) and bias.target, norm.key)
            if key not in folded:
                new_weight, new_bias = _fold(graph_module, layer, norm)
                folded[key] = weights.setdefault((weight.target, norm.key), new_weight), new_bias
            new_weight, new_bias = folded[key]
            args = list(layer.args)
            args[1] = g.add_constant(graph_module, f"{weight.target}_bn", new_weight, layer, [weight])
            args[2] = g.add_constant(graph_module, f"{weight.target}_bn_bias", new_bias, layer)
            layer.args = tuple(args)
            rewritten.append(node.name)
            norm.result.replace_all_uses_with(layer)
            for dead in dict.fromkeys((norm.result, norm.node)):
                graph_module.graph.erase_node(dead)
        g.sweep(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _parse(node: fx.Node) -> _Norm | None:
    constants = tuple(c if isinstance(c, fx.Node) else None for c in node.args[1:5])
    if node.target is _aten.batch_norm.default:
        if node.args[5] is not False:
            return None
        return _Norm(node, node, constants, float(node.args[7]))  # type: ignore[arg-type]
    results = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    if len(results) != 1 or len(node.users) != 1:
        return None
    return _Norm(node, results[0], constants, float(node.args[6]))  # type: ignore[arg-type]


def _refusal(graph_module: fx.GraphModule, layer: fx.Node, norm: _Norm | None) -> str | None:
    if norm is None:
        return "not a batch norm at inference"
    if len(layer.users) > 1:
        return f"{layer.name} is used by {len(layer.users)} nodes"
    if layer.args[POST_OP[layer.target]] != "none":
        return f"{layer.name} has a fused post-op"
    if any(c is not None and g.constant(graph_module, c) is None for c in norm.constants):
        return "its statistics are not constants"
    if norm.constants[2] is None or norm.constants[3] is None:
        return "it has no running statistics"
    if layer.target is LINEAR and g.value(layer).dim() != 2:
        return "it normalises another dimension than the Linear's features"
    if layer.target is CONV and layer.args[7] and layer.args[9] != 1:
        return "a grouped transposed convolution"
    weight = layer.args[1]
    assert isinstance(weight, fx.Node)
    for user in (u for n in _readers(graph_module, weight) for u in n.users if u is not layer):
        followers = list(user.users)
        other = _parse(followers[0]) if len(followers) == 1 and followers[0].target in _NORMS else None
        if other is None or other.key != norm.key:
            return f"{weight.target} is shared with {user.name}, which has another batch norm"
    return None


def _readers(graph_module: fx.GraphModule, weight: fx.Node) -> list[fx.Node]:
    return [n for n in graph_module.graph.nodes if n.op == "get_attr" and n.target == weight.target]


def _fold(graph_module: fx.GraphModule, layer: fx.Node, norm: _Norm) -> tuple[torch.Tensor, torch.Tensor]:
    def read(node: object, otherwise: float, like: torch.Tensor) -> torch.Tensor:
        tensor = g.constant(graph_module, node)
        return torch.full_like(like, otherwise) if tensor is None else tensor.detach().double()

    mean = g.constant(graph_module, norm.constants[2])
    assert mean is not None
    mean = mean.detach().double()
    gamma, beta = read(norm.constants[0], 1.0, mean), read(norm.constants[1], 0.0, mean)
    variance = read(norm.constants[3], 1.0, mean)
    bias = read(layer.args[2], 0.0, mean)
    weight = g.constant(graph_module, layer.args[1])
    assert weight is not None
    scale = gamma / torch.sqrt(variance + norm.eps)
    shape = [1] * weight.dim()
    shape[1 if layer.target is CONV and layer.args[7] else 0] = -1
    return (
        (weight.detach().double() * scale.reshape(shape)).float(),
        ((bias - mean) * scale + beta).float(),
    )
