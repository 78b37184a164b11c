"""Merges the pointwise convolution of a residual block's shortcut into the one that it is added to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import ConvCall
from armopt.ir.operations import CONV
from armopt.ir.records import PassResult, Skip
from armopt.kernels import post_ops

_aten = torch.ops.aten


@dataclass(frozen=True)
class MergeShortcut:
    """conv(x, A, a) + conv(y, B, b) -> conv(cat(x, y), cat(A, B), a + b), for 1x1 convolutions.

    The sum is then the product's own: one call less, no addition (2 instructions an element in BF16 on the emulated
    Graviton3), and nothing rounded in between. A stride becomes a slice. Refuses groups, padding, a weight that another
    layer shares, and a shortcut that is used elsewhere.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten, skipped = [], []
        for node in g.calls_to(graph_module.graph, CONV):
            call = ConvCall.of(node)
            if call.other is None or call.other.target is not CONV:
                continue
            shortcut = ConvCall.of(call.other)
            reason = _refusal(node, call) or _refusal(call.other, shortcut)
            if reason is None and (len(call.other.users) > 1 or shortcut.post_op != post_ops.NONE):
                reason = f"{call.other.name} is used elsewhere, or has a post-op"
            if reason is not None:
                skipped.append(Skip(node.name, reason))
                continue
            rewritten.append(node.name)
            _merge(graph_module, node, call, shortcut)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _refusal(node: fx.Node, call: ConvCall[fx.Node]) -> str | None:
    if tuple(g.fake_value(call.weight).shape[2:]) != (1, 1):
        return f"{node.name} is not 1x1"
    if call.groups != 1 or call.transposed:
        return f"{node.name} has groups or is transposed"
    if any(call.padding):
        return f"{node.name} is padded"
    if len(call.weight.users) > 1:
        return f"{node.name} shares its weight"
    return None


def _merge(graph_module: fx.GraphModule, node: fx.Node, call: ConvCall[fx.Node], shortcut: ConvCall[fx.Node]) -> None:
    graph, both = graph_module.graph, (call, shortcut)
    inputs = [_strided(graph, node, each) for each in both]
    weight = torch.cat([g.constant(graph_module, each.weight) for each in both], 1)
    name = call.weight_name
    biases = [g.constant(graph_module, each.bias) for each in both if each.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    merged = call.replace(
        x=g.insert_call(graph, node, _aten.cat.default, (inputs, 1)),
        weight=g.add_constant(graph_module, f"{name}_shortcut", weight, node, [each.weight for each in both]),
        bias=None if bias is None else g.add_constant(graph_module, f"{name}_shortcut_bias", bias, node),
        other=None,
        stride=[1, 1],
        post_op="relu" if call.post_op == post_ops.ADD_RELU else post_ops.NONE,
    )
    g.replace_and_erase(node, merged.insert(node, f"{node.name}_shortcut"))


def _strided(graph: fx.Graph, before: fx.Node, call: ConvCall[fx.Node]) -> fx.Node:
    """The pixels of a layer's input that it reads."""
    x = call.x
    for i, step in enumerate(call.stride):
        if step > 1:
            x = g.insert_call(graph, before, _aten.slice.Tensor, (x, i + 2, 0, 2**63 - 1, step))
    return x
