"""Merges the pointwise convolution of a residual block's shortcut into the one that it is added to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.records import PassResult, Skip
from armopt.kernels import post_ops
from armopt.kernels.ops import CONV, OTHER, POST_OP

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
        for node in g.calls(graph_module.graph, CONV):
            shortcut: Any = node.args[OTHER]
            if not isinstance(shortcut, fx.Node) or shortcut.target is not CONV:
                continue
            reason = _refusal(node) or _refusal(shortcut)
            if reason is None and (len(shortcut.users) > 1 or shortcut.args[POST_OP[CONV]] != post_ops.NONE):
                reason = f"{shortcut.name} is used elsewhere, or has a post-op"
            if reason is not None:
                skipped.append(Skip(node.name, reason))
                continue
            rewritten.append(node.name)
            _merge(graph_module, node, shortcut)
        g.sweep(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _refusal(node: fx.Node) -> str | None:
    weight: Any = node.args[1]
    padding: Any = node.args[5]
    if tuple(g.value(weight).shape[2:]) != (1, 1):
        return f"{node.name} is not 1x1"
    if node.args[9] != 1 or node.args[7]:
        return f"{node.name} has groups or is transposed"
    if any(not g.is_constant(size) or int(size) for size in padding):
        return f"{node.name} is padded"
    if len(weight.users) > 1:
        return f"{node.name} shares its weight"
    return None


def _merge(graph_module: fx.GraphModule, node: fx.Node, shortcut: fx.Node) -> None:
    graph = graph_module.graph
    inputs = [_strided(graph, node, layer) for layer in (node, shortcut)]
    sources: list[Any] = [layer.args[1] for layer in (node, shortcut)]
    weights = [g.constant(graph_module, source) for source in sources]
    biases = [g.constant(graph_module, layer.args[2]) for layer in (node, shortcut)]
    weight = torch.cat([w.detach() for w in weights if w is not None], 1)
    name = str(sources[0].target)
    added = [bias.detach() for bias in biases if bias is not None]
    bias = torch.stack(added).sum(0) if added else None
    args = (
        g.insert_call(graph, node, _aten.cat.default, (inputs, 1)),
        g.add_constant(graph_module, f"{name}_shortcut", weight, node, sources),
        None if bias is None else g.add_constant(graph_module, f"{name}_shortcut_bias", bias, node),
        None,
        [1, 1],
        *node.args[5:10],
        "relu" if node.args[POST_OP[CONV]] == post_ops.ADD_RELU else post_ops.NONE,
        *node.args[11:],
    )
    replacement = g.insert_call(graph, node, CONV, args, name=f"{node.name}_shortcut")
    g.replace_and_erase(node, replacement)


def _strided(graph: fx.Graph, before: fx.Node, layer: fx.Node) -> fx.Node:
    """The pixels of a layer's input that it reads."""
    x: Any = layer.args[0]
    stride: Any = layer.args[4]
    for i, step in enumerate(stride):
        if step > 1:
            x = g.insert_call(graph, before, _aten.slice.Tensor, (x, i + 2, 0, 2**63 - 1, int(step)))
    return x  # type: ignore[no-any-return]
