"""Lets views copy where the layout demands it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.records import PassResult

_aten = torch.ops.aten


@dataclass(frozen=True)
class RelaxViews:
    """view(x, shape) -> reshape(x, shape).

    A packed convolution gives channels_last, on which a view that was legal in the model may not be.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten = []
        for node in g.calls_to(graph_module.graph, _aten.view.default, _aten._unsafe_view.default):
            node.target = _aten.reshape.default
            rewritten.append(node.name)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten))
