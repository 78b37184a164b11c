"""Gives each part of a divided tensor an operation of its own."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.records import PassResult, Skip

_aten = torch.ops.aten
_SPLITS = (
    *(_aten.split.Tensor, _aten.split.sizes, _aten.split_with_sizes.default, _aten.chunk.default),
    _aten.unbind.int,
)


@dataclass(frozen=True)
class CanonicaliseSplit:
    """split(x, …)[i] -> narrow(x, dim, start, length); unbind(x, dim)[i] -> select(x, dim, i).

    A part may then stay in BF16 by itself. Refuses parts whose sizes are not known.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        graph = graph_module.graph
        rewritten: list[str] = []
        skipped: list[Skip] = []
        for node in g.calls_to(graph, *_SPLITS):
            parts = [user for user in node.users if user.target is operator.getitem]
            if len(parts) != len(node.users):
                continue
            unbind = node.target is _aten.unbind.int
            at = 1 if unbind else 2
            dim: Any = node.args[at] if len(node.args) > at else node.kwargs.get("dim", 0)
            sizes = [part.shape[dim] for part in node.meta["val"]] if not unbind else []
            if not all(isinstance(size, int) for size in sizes):
                skipped.append(Skip(node.name, "the sizes of its parts are not known"))
                continue
            for part in parts:
                index: Any = part.args[1]
                index %= len(node.meta["val"])
                arguments = (dim, index) if unbind else (dim, sum(sizes[:index]), sizes[index])
                target = _aten.select.int if unbind else _aten.narrow.default
                g.replace_and_erase(part, g.insert_call(graph, part, target, (node.args[0], *arguments)))
            rewritten.append(node.name)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))
