"""How much memory lies between the layers of a program, on a host that makes all their primitives."""

from __future__ import annotations

import math

from armopt.bundle.program import Program
from armopt.ir import arena
from armopt.ir.bf16_flow import ATTENTION
from armopt.ir.calls import call_of, layers
from armopt.kernels import sites, table
from armopt.runtime import operations


def between_layers(program: Program) -> tuple[int, int]:
    """Bytes of the arena, and of all that may lie there each by itself; at the planned sizes.

    The first is what each call at a time holds, besides what it returns and what those of PyTorch's operations give
    that can't write to a place, as layer norms.
    """
    graph = program.graph_module.graph
    sizes = {
        node: result.size
        for node in graph.nodes
        if program.is_fixed
        and (result := program.results.get(node.name)) is not None
        and (operations.of(node, result.size) is not None or node.target is ATTENTION)
    } | {
        node: math.prod(sites.result_shape(program.sites[node.name]))
        * table.get(call_of(node).kernel).activations.itemsize
        for node in layers(graph)
    }
    return arena.plan(graph, sizes).size, sum(sizes.values())
