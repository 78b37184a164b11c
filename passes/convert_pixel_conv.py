"""Takes a convolution on images of one pixel for the Linear that it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.records import PassResult, Skip
from armopt.kernels import aten
from armopt.kernels.ops import CONV, LINEAR, OTHER, POST_OP

_aten = torch.ops.aten


@dataclass(frozen=True)
class ConvertPixelConv:
    """conv(x [N, C, 1, 1], W [O, C, 1, 1]) -> linear(x [N, C], W [O, C]), as squeeze and excitation has them.

    One row of a product belongs to BLAS, whose call costs a tenth of a packed convolution's. Refuses groups, larger
    filters, and a fused addition.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten: list[str] = []
        skipped: list[Skip] = []
        for node in g.calls(graph_module.graph, CONV):
            if tuple(g.value(node.args[0]).shape[2:]) != (1, 1):  # type: ignore[arg-type]
                continue
            if reason := _refusal(node):
                skipped.append(Skip(node.name, reason))
                continue
            rewritten.append(node.name)
            _convert(graph_module, node)
        g.sweep(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _refusal(node: fx.Node) -> str | None:
    weight: Any = node.args[1]
    padding, transposed, groups = node.args[5], node.args[7], node.args[9]
    if transposed or groups != 1 or tuple(g.value(weight).shape[2:]) != (1, 1) or any(padding):  # type: ignore[arg-type]
        return "transposed, grouped, padded, or of a larger filter"
    return "an addition is fused" if node.args[OTHER] is not None else None


def _convert(graph_module: fx.GraphModule, node: fx.Node) -> None:
    graph = graph_module.graph
    source, weight, bias = node.args[:3]
    assert isinstance(weight, fx.Node)
    held = g.constant(graph_module, weight)
    assert held is not None
    flat = g.add_constant(graph_module, f"{weight.target}_flat", held.detach().flatten(1), node, [weight])
    x = _linear_behind(source) or g.insert_call(graph, node, _aten.flatten.using_ints, (source, 1))
    args = (x, flat, bias, None, node.args[POST_OP[CONV]], aten.LINEAR.name, 0)
    linear = g.insert_call(graph, node, LINEAR, args)
    name = node.name
    pixels = g.insert_call(graph, node, _aten.unsqueeze.default, (linear, -1))
    g.replace_and_erase(node, g.insert_call(graph, node, _aten.unsqueeze.default, (pixels, -1)))
    linear.name = name


def _linear_behind(node: Any) -> fx.Node | None:
    """The Linear that this pass has put in front of two dimensions of one."""
    for _ in range(2):
        if node.target is not _aten.unsqueeze.default or node.args[1] != -1:
            return None
        node = node.args[0]
    return node if node.target is LINEAR else None
