"""What the passes share that pack weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.records import Decision, PassResult, Skip
from armopt.kernels import table
from armopt.kernels.ops import BLOCK, KERNEL

_aten = torch.ops.aten


def pack(
    graph_module: fx.GraphModule,
    target: Any,
    decisions: Mapping[str, Decision],
    blocks: Mapping[str, int],
    rounded: dict[str, torch.Tensor],
) -> PassResult:
    """Gives every node of `target` its planned kernel, weights in the kernel's dtype, and casts at its borders."""
    rewritten, skipped = [], []
    for node in g.calls(graph_module.graph, target):
        decision = decisions.get(node.name)
        if decision is None:
            continue
        kernel = table.get(decision.kernel)
        if kernel.backend == "aten":
            skipped.append(Skip(node.name, decision.reason))
            continue
        if kernel.name == node.args[KERNEL[target]]:
            continue
        args = list(node.args)
        args[KERNEL[target]], args[BLOCK[target]] = kernel.name, blocks.get(node.name, 0)
        weight = args[1]
        assert isinstance(weight, fx.Node)
        if kernel.rounding.weights == torch.bfloat16:
            args[1] = rounded_constant(graph_module, weight, rounded, node)
        if kernel.activations == torch.bfloat16:
            for index in (0, 3):  # the input and the second tensor of a residual add
                if isinstance(args[index], fx.Node):
                    args[index] = cast(graph_module.graph, node, args[index], torch.bfloat16)
        packed = g.insert_call(graph_module.graph, node, target, tuple(args))
        result = packed
        if kernel.activations == torch.bfloat16:
            result = cast(graph_module.graph, node, packed, torch.float32)
        name = node.name
        node.replace_all_uses_with(result)
        graph_module.graph.erase_node(node)
        packed.name = name
        rewritten.append(name)
    g.sweep(graph_module)
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
