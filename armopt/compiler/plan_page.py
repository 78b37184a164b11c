"""Draws a plan: one HTML page without outside resources, the graph coloured by kernel."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
import networkx as nx

from armopt.errors import for_page
from armopt.ir.records import Decision, Plan
from armopt.kernels import table
from armopt.plan import remainder

if TYPE_CHECKING:
    from torch import fx

    from armopt.compiler.recipe import Planned

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 190, 40, 24, 30, 60


@dataclass(frozen=True, slots=True)
class _Box:
    """One node as drawn."""

    name: str
    label: str
    x: float
    y: float
    colour: str
    title: str


def render(planned: Planned) -> str:
    """The page: for each bucket a legend, the graph, and every decision with its reason."""
    graph = _graph(planned.prepared.graph_module.graph)
    places, size = _layout(graph)
    buckets = [_bucket(plan, graph, places) for plan in planned.plans]
    return (
        _environment()
        .get_template("plan_page.html.jinja")
        .render(
            target=planned.target,
            source=planned.captured.source,
            buckets=buckets,
            edges=_edges(graph, places),
            size=size,
            box=(_WIDTH, _HEIGHT),
        )
    )


def _graph(graph: fx.Graph) -> nx.DiGraph:
    """What computes: weights and other constants are left out."""
    found = nx.DiGraph()
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        target = str(node.target).removeprefix("aten.").removesuffix(".default")
        found.add_node(node.name, label=node.name if node.op in ("placeholder", "output") else target)
        found.add_edges_from((source.name, node.name) for source in node.all_input_nodes if source.op != "get_attr")
    return found


def _layout(graph: nx.DiGraph) -> tuple[dict[str, tuple[float, float]], tuple[float, float]]:
    """A place for each node, layer by layer; within a layer in the order of what they read."""
    layers = [list(layer) for layer in nx.topological_generations(graph)]
    widest = max(len(layer) for layer in layers) * (_WIDTH + _GAP_X)
    places: dict[str, tuple[float, float]] = {}

    def centre(name: str) -> float:
        sources = [places[source][0] for source in graph.predecessors(name) if source in places]
        return sum(sources) / len(sources) if sources else 0.0

    for depth, layer in enumerate(layers):
        layer.sort(key=centre)
        left = (widest - len(layer) * (_WIDTH + _GAP_X)) / 2 + _MARGIN
        for i, name in enumerate(layer):
            places[name] = (left + i * (_WIDTH + _GAP_X), depth * (_HEIGHT + _GAP_Y) + 10)
    return places, (widest + 2 * _MARGIN, len(layers) * (_HEIGHT + _GAP_Y))


def _edges(graph: nx.DiGraph, places: Mapping[str, tuple[float, float]]) -> list[str]:
    """Curves from the foot of one box to the head of another; one that passes layers swings out to the side."""
    paths = []
    for source, sink in graph.edges:
        (x0, y0), (x1, y1) = places[source], places[sink]
        x0, x1, y0 = x0 + _WIDTH / 2, x1 + _WIDTH / 2, y0 + _HEIGHT
        if y1 - y0 > _GAP_Y + 1:
            side = max(x0, x1) + _WIDTH / 2 + 20
            paths.append(f"M{x0},{y0} C{side},{y0 + 20} {side},{y1 - 20} {x1},{y1}")
        else:
            paths.append(f"M{x0},{y0} C{x0},{y0 + 12} {x1},{y1 - 12} {x1},{y1}")
    return paths


def _bucket(plan: Plan, graph: nx.DiGraph, places: Mapping[str, tuple[float, float]]) -> dict[str, object]:
    decisions = {decision.node: decision for decision in plan.decisions}
    boxes = [_box(name, graph.nodes[name]["label"], *places[name], decisions.get(name)) for name in graph.nodes]
    counts = Counter(decision.kernel for decision in plan.decisions)
    return {
        "name": ", ".join(f"{name}={value}" for name, value in plan.bucket.items()),
        "policy": plan.policy,
        "boxes": boxes,
        "legend": [(kernel, number, _colour(kernel)) for kernel, number in counts.most_common()],
        "rows": _rows(plan.decisions),
        "remainder": remainder.find(plan),
    }


def _box(name: str, label: str, x: float, y: float, decision: Decision | None) -> _Box:
    if decision is None:
        return _Box(name, label, x, y, "", name)
    shape = "x".join(map(str, decision.shape))
    title = f"{name}: {decision.op} of {shape}\n{decision.kernel} ({decision.precision})\n{decision.reason}"
    return _Box(name, decision.kernel, x, y, _colour(decision.kernel), title)


def _rows(decisions: Sequence[Decision]) -> list[tuple[str, ...]]:
    return [
        (d.node, d.op, "x".join(map(str, d.shape)), d.kernel, d.precision, d.reason, _colour(d.kernel))
        for d in decisions
    ]


def _colour(kernel: str) -> str:
    return table.get(kernel).colour


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("armopt.compiler", ""),
        autoescape=True,
        finalize=for_page,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
