"""Removes operations that change nothing at inference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from armopt import graph as g
from armopt.ir import PassResult

_aten = torch.ops.aten
_COPIES = (
    _aten.clone.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.detach_.default,
    _aten.lift_fresh_copy.default,
    _aten.contiguous.default,
    _aten.dropout.default,
    _aten.feature_dropout.default,
)
_CASTS = (_aten._to_copy.default, _aten.to.dtype, _aten.to.dtype_layout)


@dataclass(frozen=True)
class RemoveIdentities:
    """clone, alias, detach, contiguous, dropout in eval mode, casts to the same dtype, metadata checks: x -> x.

    Leaves a copy that the model returns of its own input, and every cast that changes the dtype.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten = []
        for node in g.calls(graph_module.graph, *_COPIES, *_CASTS):
            source = node.args[0]
            if isinstance(source, fx.Node) and _is_identity(node, source):
                rewritten.append(node.name)
                g.replace_and_erase(node, source)
        for node in list(graph_module.graph.nodes):
            if _is_metadata_check(node):
                rewritten.append(node.name)
                graph_module.graph.erase_node(node)
        g.sweep(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten))


def _is_metadata_check(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name
    return name in ("aten::_assert_tensor_metadata", "aten::sym_constrain_range_for_size") and not node.users


def _is_identity(node: fx.Node, source: fx.Node) -> bool:
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if before.dtype != after.dtype or before.device != after.device:
        return False
    if source.op in ("placeholder", "get_attr") and any(user.op == "output" for user in node.users):
        return False  # the caller may write into what it gets back
    return not (node.target in (_aten.dropout.default, _aten.feature_dropout.default) and node.args[2] is not False)
