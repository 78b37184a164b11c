"""Takes a convolution on images of one pixel for the Linear that it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import ConvCall, LinearCall
from armopt.ir.operations import CONV, LINEAR
from armopt.ir.records import PassResult, Skip
from armopt.kernels import aten

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
        for node in g.calls_to(graph_module.graph, CONV):
            call = ConvCall.of(node)
            if g.symbolic_shape(g.fake_value(call.x).shape[2:]) != (1, 1):
                continue
            if reason := _refusal(call):
                skipped.append(Skip(node.name, reason))
                continue
            rewritten.append(node.name)
            _convert(graph_module, node, call)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _refusal(call: ConvCall[fx.Node]) -> str | None:
    if call.transposed or call.groups != 1 or tuple(g.fake_value(call.weight).shape[2:]) != (1, 1) or any(call.padding):
        return "transposed, grouped, padded, or of a larger filter"
    return "an addition is fused" if call.other is not None else None


def _convert(graph_module: fx.GraphModule, node: fx.Node, call: ConvCall[fx.Node]) -> None:
    graph = graph_module.graph
    held = g.constant(graph_module, call.weight).flatten(1)
    weight = g.add_constant(graph_module, f"{call.weight_name}_flat", held, node, [call.weight])
    x = _linear_behind(call.x) or g.insert_call(graph, node, _aten.flatten.using_ints, (call.x, 1))
    flat = LinearCall(x=x, weight=weight, bias=call.bias, post_op=call.post_op, kernel=aten.LINEAR.name)
    linear = flat.insert(node)
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
