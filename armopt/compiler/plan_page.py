"""Draws a plan: one HTML page that needs nothing from elsewhere, with a line for each node, coloured by kernel."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch

from armopt.compiler import rails
from armopt.errors import for_page
from armopt.ir import graph as g
from armopt.ir import strides
from armopt.ir.records import Bucket, Decision, Plan
from armopt.kernels import table
from armopt.plan import remainder

if TYPE_CHECKING:
    from torch import fx

    from armopt.compiler.recipe import Planned

#: Filters the lines and marks what a line reads. The page's policy lets this script run and no other.
_SCRIPT = Path(__file__).with_name("plan_page.js")


@dataclass(frozen=True, slots=True)
class _Line:
    """One node as drawn; `decision` and `colour` of layers alone."""

    name: str
    does: str
    shape: str
    reads: tuple[str, ...]
    rails: rails.Crossing
    decision: Decision | None
    colour: str


def render(planned: Planned) -> str:
    """The page: for each bucket every node in the order of the graph, with its shape, its kernel and the reason."""
    graph = planned.prepared.graph_module.graph
    reads, glue = _drawn(graph)
    drawing = rails.lay({node.name: [source.name for source in sources] for node, sources in reads.items()})
    script = _SCRIPT.read_text()
    return (
        _environment()
        .get_template("plan_page.html.jinja")
        .render(
            target=planned.target,
            source=planned.captured.source,
            buckets=[_bucket(plan, planned, reads, drawing) for plan in planned.plans],
            glue=glue.most_common(),
            width=drawing.width,
            middle=rails.MIDDLE,
            script=script,
            digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def _drawn(graph: fx.Graph) -> tuple[dict[fx.Node, list[fx.Node]], Counter[str]]:
    """What computes, each with what it reads; and how many nodes are left out, by operation.

    Constants are left out, sizes, and what only moves values: there the line is drawn to what made them.
    """
    reads: dict[fx.Node, list[fx.Node]] = {}
    behind: dict[fx.Node, list[fx.Node]] = {}
    left_out: Counter[str] = Counter()
    for node in graph.nodes:
        sources = list(dict.fromkeys(each for source in node.all_input_nodes for each in behind[source]))
        if node.op == "get_attr" or (node.op != "output" and not _tensors(node)):
            behind[node] = []
        elif _is_glue(node):
            behind[node] = sources
        else:
            reads[node], behind[node] = sources, [node]
            continue
        if node.op != "get_attr":
            left_out[_operation(node)] += 1
    return reads, left_out


def _is_glue(node: fx.Node) -> bool:
    """Whether a node only moves or picks values that another has made."""
    if node.op != "call_function":
        return False
    return strides.is_view(node) or _operation(node) in ("getitem", "clone", "contiguous")


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    """What a node gives, but for sizes."""
    value = node.meta.get("val")
    return [each for each in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(each, torch.Tensor)]


def _operation(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def _bucket(
    plan: Plan, planned: Planned, reads: Mapping[fx.Node, Iterable[fx.Node]], drawing: rails.Rails
) -> dict[str, object]:
    decisions = {decision.node: decision for decision in plan.decisions}
    sizes = g.with_rows_of_parts(planned.prepared.graph_module.graph, planned.captured.values(plan.bucket))
    lines = [
        _line(node, sources, drawing.lines[node.name], decisions.get(node.name), sizes)
        for node, sources in reads.items()
    ]
    counts = Counter(decision.kernel for decision in plan.decisions)
    return {
        "name": ", ".join(f"{name}={value}" for name, value in plan.bucket.items()),
        "policy": plan.policy,
        "lines": lines,
        "legend": [(kernel, number, table.get(kernel).colour) for kernel, number in counts.most_common()],
        "others": len(lines) - len(decisions),
        "remainder": remainder.find(plan),
    }


def _line(
    node: fx.Node, sources: Iterable[fx.Node], crossing: rails.Crossing, decision: Decision | None, sizes: Bucket
) -> _Line:
    shape = ", ".join(_text(g.shape_at(tensor.shape, sizes)) for tensor in _tensors(node)[:3])
    does = {"placeholder": "input", "output": "output"}.get(node.op, _operation(node))
    colour = ""
    if decision is not None:
        does, shape = decision.op, f"{_text(decision.shape)} → {shape}"
        colour = table.get(decision.kernel).colour
    return _Line(node.name, does, shape, tuple(source.name for source in sources), crossing, decision, colour)


def _text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


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
