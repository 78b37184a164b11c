"""Merges Linear layers that read the same input: query, key and value become one product."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import LinearCall
from armopt.ir.operations import LINEAR
from armopt.ir.records import PassResult, Skip
from armopt.kernels import post_ops

_aten = torch.ops.aten


@dataclass(frozen=True)
class MergeProjections:
    """linear(x, A, a), linear(x, B, b) -> parts of linear(x, cat(A, B), cat(a, b)).

    One call costs its fixed part once, and packs x once. Refuses a layer with a fused post-op, and one whose weight
    another layer shares: merging would store it twice.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten: list[str] = []
        skipped: list[Skip] = []
        layers = {layer: LinearCall.of(layer) for layer in g.calls_to(graph_module.graph, LINEAR)}
        uses = Counter(call.weight_name for call in layers.values())
        by_input: dict[fx.Node, dict[fx.Node, LinearCall[fx.Node]]] = defaultdict(dict)
        for layer, call in layers.items():
            by_input[call.x][layer] = call
        for group in by_input.values():
            if len(group) < 2:
                continue
            reasons = {layer: _refusal(call, uses) for layer, call in group.items()}
            skipped += [Skip(layer.name, reason) for layer, reason in reasons.items() if reason]
            members = {layer: group[layer] for layer, reason in reasons.items() if reason is None}
            if len(members) > 1:
                rewritten += [member.name for member in members]
                _merge(graph_module, members)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _refusal(call: LinearCall[fx.Node], uses: Counter[str]) -> str | None:
    if call.post_op != post_ops.NONE:
        return f"its {call.post_op} is fused"
    if uses[call.weight_name] > 1:
        return f"its weight {call.weight_name} is shared"
    return None


def _merge(graph_module: fx.GraphModule, members: dict[fx.Node, LinearCall[fx.Node]]) -> None:
    node, call = next(iter(members.items()))
    weights = [g.constant(graph_module, member.weight) for member in members.values()]
    name = f"{call.weight_name}_merged"
    made_of = [member.weight for member in members.values()]
    weight = g.add_constant(graph_module, name, torch.cat(weights), node, made_of)
    bias = None
    if any(member.bias is not None for member in members.values()):
        biases = [
            w.new_zeros(w.shape[0]) if member.bias is None else g.constant(graph_module, member.bias)
            for member, w in zip(members.values(), weights, strict=True)
        ]
        bias = g.add_constant(graph_module, f"{name}_bias", torch.cat(biases), node)
    merged = call.replace(weight=weight, bias=bias).insert(node, f"{node.name}_merged")
    start = 0
    for member, w in zip(members, weights, strict=True):
        part = g.insert_call(graph_module.graph, member, _aten.narrow.default, (merged, -1, start, w.shape[0]))
        g.replace_and_erase(member, part)
        start += w.shape[0]
