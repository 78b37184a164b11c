"""Gives Linear the dimensions that its rows had before they were flattened for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import LinearCall, call_of, is_layer
from armopt.ir.records import Dim, PassResult

_aten = torch.ops.aten
_RESHAPES = (_aten.reshape.default, _aten.view.default, _aten._unsafe_view.default)


@dataclass(frozen=True)
class RestoreRows:
    """reshape(armopt.linear(reshape(x, [M, K])), [*, N]) -> armopt.linear(x), where x is [*, K].

    A Linear takes any number of dimensions. What follows it, as an addition, then follows it at once and can be fused.
    Leaves a product whose result is used elsewhere, and one that gets other dimensions than x had.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten = []
        for end in g.calls_to(graph_module.graph, *_RESHAPES):
            layer = end.args[0]
            if not isinstance(layer, fx.Node) or not is_layer(layer) or len(layer.users) > 1:
                continue
            call = call_of(layer)
            x = _before(call.x)
            if isinstance(call, LinearCall) and x is not None and _sizes(x)[:-1] == _sizes(end)[:-1]:
                if _sizes(x)[-1] != _sizes(call.x)[-1] or _sizes(end)[-1] != _sizes(layer)[-1]:
                    continue
                rewritten.append(layer.name)
                layer.args = call.replace(x=x).args
                layer.meta["val"] = end.meta["val"]
                g.replace_and_erase(end, layer)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten))


def _before(node: fx.Node) -> fx.Node | None:
    """What was reshaped to a node."""
    if node.target not in _RESHAPES or not isinstance(node.args[0], fx.Node):
        return None
    return node.args[0]


def _sizes(node: fx.Node) -> tuple[Dim, ...]:
    return g.symbolic_shape(g.fake_value(node).shape)
