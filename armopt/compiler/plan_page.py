"""Draws a plan: one HTML page without outside resources, the graph coloured by kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
import networkx as nx

from armopt.ir.records import Decision, Plan

if TYPE_CHECKING:
    from torch import fx

    from armopt.compiler.recipe import Planned

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 190, 40, 24, 30, 60
#: Blue: BF16 in the Compute Library; orange: FP32 activations, BF16 products; green: BLAS; purple: FP32; grey: ATen.
_COLOURS = {
    "conv1x1_bf16": "#2563eb",
    "conv_bf16": "#1d4ed8",
    "conv1x1_fastmath": "#d97706",
    "linear_fastmath": "#b45309",
    "conv_fastmath": "#c2410c",
    "blas_fp32": "#15803d",
    "blas_fp32_w16": "#059669",
}
_OTHER_KERNEL, _PLAIN = "#7c3aed", "#6b7280"


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
    refused = [(skip.node, skip.reason) for skip in planned.refused]
    return _TEMPLATE.render(
        target=planned.target,
        source=planned.captured.source,
        buckets=buckets,
        edges=_edges(graph, places),
        size=size,
        box=(_WIDTH, _HEIGHT),
        refused=refused,
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
    return _PLAIN if kernel.startswith("aten") else _COLOURS.get(kernel, _OTHER_KERNEL)


_TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>armopt plan for {{ target.name }}</title>
<style>
body { font: 14px/1.45 system-ui, sans-serif; color: #111827; background: #fff; margin: 24px; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 28px 0 8px; }
p { margin: 4px 0 12px; color: #4b5563; }
.legend span { display: inline-block; margin: 0 16px 6px 0; white-space: nowrap; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; }
.graph { overflow: auto; max-height: 85vh; border: 1px solid #e5e7eb; border-radius: 6px; }
svg text { font: 12px system-ui, sans-serif; }
table { border-collapse: collapse; margin-top: 12px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #e5e7eb; vertical-align: top; }
td:nth-child(4) { white-space: nowrap; }
</style>
</head>
<body>
<h1>Plan for {{ target.name }} ({{ target.core }})</h1>
<p>{{ source }}</p>
{% for bucket in buckets %}
<h2>{{ bucket.name or "All layers" }}</h2>
<p>{{ bucket.policy }}. Point at a box for its shape and reason.</p>
<div class="legend">
{% for kernel, number, colour in bucket.legend %}
<span><i style="background: {{ colour }}"></i>{{ kernel }}: {{ number }}</span>
{% endfor %}
<span><i style="background: #f3f4f6; border: 1px solid #d1d5db"></i>other operations</span>
</div>
<div class="graph">
<svg xmlns="http://www.w3.org/2000/svg" width="{{ size[0] }}" height="{{ size[1] }}">
{% for path in edges %}
<path d="{{ path }}" fill="none" stroke="#9ca3af"/>
{% endfor %}
{% for box_ in bucket.boxes %}
<g><title>{{ box_.title }}</title>
<rect x="{{ box_.x }}" y="{{ box_.y }}" width="{{ box[0] }}" height="{{ box[1] }}" rx="5"
 fill="{{ box_.colour or '#f3f4f6' }}" stroke="{{ box_.colour or '#d1d5db' }}"/>
{% if box_.colour %}
<text x="{{ box_.x + box[0] / 2 }}" y="{{ box_.y + 17 }}" text-anchor="middle" fill="#fff">{{ box_.name[:28] }}</text>
<text x="{{ box_.x + box[0] / 2 }}" y="{{ box_.y + 32 }}" text-anchor="middle" fill="#fff">{{ box_.label }}</text>
{% else %}
<text x="{{ box_.x + box[0] / 2 }}" y="{{ box_.y + 25 }}" text-anchor="middle" fill="#374151">{{
 box_.label[:28] }}</text>
{% endif %}
</g>
{% endfor %}
</svg>
</div>
<table>
<tr><th>node</th><th>op</th><th>input</th><th>kernel</th><th>precision</th><th>reason</th></tr>
{% for node, op, shape, kernel, precision, reason, colour in bucket.rows %}
<tr><td>{{ node }}</td><td>{{ op }}</td><td>{{ shape }}</td>
<td style="color: {{ colour }}">{{ kernel }}</td><td>{{ precision }}</td><td>{{ reason }}</td></tr>
{% endfor %}
</table>
{% endfor %}
{% if refused %}
<h2>Plain ATen</h2>
<table><tr><th>node</th><th>reason</th></tr>
{% for node, reason in refused %}
<tr><td>{{ node }}</td><td>{{ reason }}</td></tr>
{% endfor %}
</table>
{% endif %}
</body>
</html>
""")
