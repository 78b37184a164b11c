"""What the passes share that pack weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import call_of
from armopt.ir.records import Backend, Decision, PassResult, Skip
from armopt.kernels import table

_aten = torch.ops.aten


def pack(
    graph_module: fx.GraphModule,
    target: Any,
    decisions: Mapping[str, Decision],
    rounded: dict[str, torch.Tensor],
) -> PassResult:
    """Gives every node of `target` its planned kernel, weights in the kernel's dtype, and casts at its borders."""
    rewritten, skipped = [], []
    for node in g.calls_to(graph_module.graph, target):
        decision = decisions.get(node.name)
        if decision is None:
            continue
        kernel = table.get(decision.kernel)
        if kernel.backend == Backend.ATEN:
            skipped.append(Skip(node.name, decision.reason))
            continue
        call = call_of(node)
        if kernel.name == call.kernel:
            continue
        call = call.replace(kernel=kernel.name, block=decision.block)
        if kernel.rounding.weights == torch.bfloat16:
            call = call.replace(weight=rounded_constant(graph_module, call.weight, rounded, node))
        if kernel.activations == torch.bfloat16:
            call = call.replace(x=cast(graph_module.graph, node, call.x, torch.bfloat16))
            if call.other is not None:
                call = call.replace(other=cast(graph_module.graph, node, call.other, torch.bfloat16))
        packed = call.insert(node)
        result = packed
        if kernel.activations == torch.bfloat16:
            result = cast(graph_module.graph, node, packed, torch.float32)
        name = node.name
        node.replace_all_uses_with(result)
        graph_module.graph.erase_node(node)
        packed.name = name
        rewritten.append(name)
    g.remove_unused(graph_module)
    return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def rounded_constant(
    graph_module: fx.GraphModule, weight: fx.Node, rounded: dict[str, torch.Tensor], before: fx.Node
) -> fx.Node:
    """A constant in BF16 in front of `before`, each rounded once."""
    name = str(weight.target)
    if name not in rounded:
        rounded[name] = getattr(graph_module, name).detach().to(torch.bfloat16)
    return g.add_constant(graph_module, f"{name}_bf16", rounded[name], before, [weight])


def cast(graph: fx.Graph, before: fx.Node, source: Any, dtype: torch.dtype) -> fx.Node:
    """A cast of `source` in front of `before`."""
    return g.insert_call(graph, before, _aten._to_copy.default, (source,), {"dtype": dtype})
