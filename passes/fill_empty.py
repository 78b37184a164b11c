"""Gives memory that is written over a value to begin with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.records import PassResult, Skip

_aten = torch.ops.aten
_FILLED: Mapping[Any, Any] = {
    _aten.empty_like.default: _aten.zeros_like.default,
    _aten.new_empty.default: _aten.new_zeros.default,
    _aten.empty.memory_format: _aten.zeros.default,
}
#: Write into what they get first.
_WRITERS = (
    *(_aten.index_put.default, _aten.index_copy.default, _aten.scatter.src, _aten.scatter.value),
    *(_aten.slice_scatter.default, _aten.select_scatter.default),
    *(_aten.fill.Scalar, _aten.fill.Tensor, _aten.zero.default),
)
#: Show a part of what they get, which is then written to.
_VIEWS = (_aten.slice.Tensor, _aten.select.int, _aten.narrow.default, _aten.view.default, _aten.permute.default)


@dataclass(frozen=True)
class FillEmpty:
    """index_put(empty_like(x), …) -> index_put(zeros_like(x), …), likewise empty, new_empty, index_copy, scatter, fill,
    and copies to parts of it.

    A bundle calls nothing that gives whatever memory holds: where all of it is written over, zeros serve as well.
    Refuses memory that something else reads.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten: list[str] = []
        skipped: list[Skip] = []
        for node in g.calls_to(graph_module.graph, *_FILLED):
            if not all(_writes_over(user, node) for user in node.users):
                skipped.append(Skip(node.name, "what its memory holds is read, not only written over"))
                continue
            if node.target is _aten.empty.memory_format and node.kwargs.get("memory_format") is not None:
                skipped.append(Skip(node.name, "it has a layout of its own"))
                continue
            layout = {"memory_format"} if node.target is _aten.empty.memory_format else set()
            node.kwargs = {name: value for name, value in node.kwargs.items() if name not in layout}
            node.target = _FILLED[node.target]
            rewritten.append(node.name)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _writes_over(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user only writes over memory, perhaps through a view of it."""
    if not user.args or user.args[0] is not node or user.all_input_nodes.count(node) != 1:
        return False
    if user.target in _VIEWS:
        return all(_writes_over(each, user) for each in user.users)
    return user.target in _WRITERS or user.target is _aten.copy.default
