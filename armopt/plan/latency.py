"""What a planned graph takes as a whole: its layers by their kernels, all else by its elements. An estimate. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import is_layer
from armopt.ir.operations import RECURRENCE
from armopt.ir.records import Bucket, Op, Plan, Site
from armopt.ir.strides import is_view
from armopt.kernels import sites, table
from armopt.plan.clocked_costs import ClockedCosts


def microseconds(graph_module: fx.GraphModule, values: Bucket, plan: Plan, costs: ClockedCosts) -> float:
    """The time of one call.

    Args:
        graph_module: Prepared.
        values: The plan's bucket, by the graph's own symbols.
        plan: Which kernel each layer gets.
        costs: Of the product, at a number of threads.
    """
    found = sites.find(graph_module, values)
    costs = costs.of(found)
    chosen = {decision.node: decision for decision in plan.decisions}
    half = {name for name, decision in chosen.items() if table.get(decision.kernel).activations == torch.bfloat16}
    layers = sum(_layer(site, chosen[site.node].kernel, site.node in half, costs) for site in found)
    attended = sum(site.attended[2] for site in found)
    recurrent = {node.name: _steps(node, values, costs) for node in g.calls_to(graph_module.graph, RECURRENCE)}
    apart = {*chosen, *recurrent}
    others = sum(each.multiplications for each in plan.products if each.node not in apart)
    products = costs.attention("fp32", 0, 0, max(0, others - attended)) + sum(recurrent.values())
    return layers + _casts(found, half, costs) + products + _others(graph_module.graph, values, costs)


def weight_bytes(graph_module: fx.GraphModule, values: Bucket, plan: Plan) -> int:
    """Bytes of all constants, with those of layers as their kernels store them."""
    stored = {decision.node: table.get(decision.kernel).rounding.weights for decision in plan.decisions}
    constants = [*graph_module.parameters(), *graph_module.buffers()]
    total = sum(each.numel() * each.element_size() for each in constants)
    for key, site in {site.weight_key or site.node: site for site in sites.find(graph_module, values)}.items():
        weight = getattr(graph_module, key, None)
        if weight is not None:
            total += weight.numel() * (stored[site.node].itemsize - weight.element_size())
    return total


def _layer(site: Site, kernel: str, in_half: bool, costs: ClockedCosts) -> float:
    time = costs.estimate(table.get(kernel), site)
    if time is None:  # a kernel that nobody measured: as many multiply-adds as attention has in FP32
        time = costs.attention("fp32", 0, 0, site.m * site.k * site.n)
    return time + costs.attention("bf16" if in_half else "fp32", *site.attended)


def _steps(node: fx.Node, values: Bucket, costs: ClockedCosts) -> float:
    """The steps of a recurrent layer, one after another: a product by BLAS and the functions of its gates in each."""
    steps, rows, width = g.shape_at(node.args[0].meta["val"].shape, values)  # type: ignore[union-attr]
    size = node.meta["val"][0].shape[-1]
    product = Site(node.name, Op.LINEAR, rows, size, width, (rows, size), (width, size))
    count = rows * size
    # the same call of BLAS; a table has it with the weights that its core stores
    by_blas = (costs.estimate(table.get(name), product) for name in ("blas_fp32", "blas_fp32_w16"))
    step = (
        next(time for time in by_blas if time is not None),
        costs.pointwise("fp32:tanh", count),
        *([costs.pointwise("fp32:sigmoid", rows * (width - size))] if width > size else []),
        *([costs.pointwise("fp32:other", count)] * 4 if width > size else []),
    )
    return steps * sum(step)


def _casts(found: Sequence[Site], half: set[str], costs: ClockedCosts) -> float:
    """Values that are made in one dtype and read in the other: each is cast once."""
    made = {site.node: site.m * site.n for site in found}
    narrow = {site.source: math.prod(site.shape) for site in found if site.node in half and site.source not in half}
    wide = {s.source for s in found if s.source in half and s.node not in half}
    wide |= {s.node for s in found if s.escapes and s.node in half}
    return sum(costs.pointwise("fp32:cast", count) for count in narrow.values()) + sum(
        costs.pointwise("bf16:cast", made[name]) for name in wide
    )


def _others(graph: fx.Graph, values: Bucket, costs: ClockedCosts) -> float:
    """Whatever else computes: as one pass over its elements."""
    values = g.with_rows_of_parts(graph, values)
    apart = {*g.calls_to(graph, RECURRENCE)}
    working = [
        n for n in graph.nodes if n.op == "call_function" and not is_layer(n) and not is_view(n) and n not in apart
    ]
    shapes = [n.meta["val"].shape for n in working if hasattr(n.meta.get("val"), "shape")]
    return sum(costs.pointwise("fp32:other", math.prod(g.shape_at(shape, values))) for shape in shapes)
