"""Prepare, plan, lower: the stages between a captured graph and programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from armopt import passes, targets
from armopt.bundle.program import Program, describe_program
from armopt.ir import graph as g
from armopt.ir.records import Bucket, Captured, Plan, Skip, Target
from armopt.kernels import sites
from armopt.passes import _pipeline as pipeline
from armopt.plan import planner

if TYPE_CHECKING:
    pass


#: Told the name of each step and how many there are.
Progress = Callable[[str, int, int], None]


def silent(step: str, done: int, total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A captured model, prepared, with one plan for each bucket."""

    captured: Captured
    prepared: fx.GraphModule
    target: Target
    plans: tuple[Plan, ...]
    records: tuple[pipeline.Record, ...]

    @property
    def refused(self) -> tuple[Skip, ...]:
        """What runs as plain ATen: products that are no Linear, and what the plans refuse."""
        return tuple(dict.fromkeys([*passed_over(self.records), *(s for each in self.plans for s in each.refused)]))


def make_plan(
    captured: Captured,
    target: Target,
    policy: planner.Policy,
    buckets: Sequence[Bucket],
) -> Planned:
    """Prepares a captured model and plans each bucket."""
    prepared, records = prepare(captured.graph_module)
    plans = tuple(plan_at(prepared, target, policy, bucket, captured.values(bucket)) for bucket in buckets)
    return Planned(captured, prepared, target, plans, records)


def lower(planned: Planned, rounded: dict[str, torch.Tensor] | None = None) -> tuple[Program, ...]:
    """Carries out each plan on a copy of the graph; the programs share their weights.

    Args:
        planned: What to carry out.
        rounded: Weights in BF16 by name, to share with other plans of the model.
    """
    rounded = {} if rounded is None else rounded
    return tuple(
        lower_at(planned.prepared, each, planned.captured.values(each.bucket), rounded) for each in planned.plans
    )


def prepare(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, tuple[pipeline.Record, ...]]:
    """What is true of a graph whatever the shapes; the graph itself stays as it was."""
    return pipeline.run(g.copy(graph_module), passes.PREPARE)


def passed_over(records: Sequence[pipeline.Record]) -> tuple[Skip, ...]:
    """The products and convolutions that are no Linear or convolution with constant weights."""
    names = ("CanonicaliseLinear", "CanonicaliseConv")
    return tuple(skip for record in records if record.name in names for skip in record.skipped)


def plan_at(prepared: fx.GraphModule, target: Target, policy: planner.Policy, bucket: Bucket, values: Bucket) -> Plan:
    """The plan of a prepared graph at a bucket (`values`: the same by the graph's own symbols)."""
    return planner.make(sites.find(prepared, values), target, policy, bucket)


def lower_at(prepared: fx.GraphModule, chosen: Plan, values: Bucket, rounded: dict[str, torch.Tensor]) -> Program:
    """Carries out one plan on a copy of the graph; plans of one graph share `rounded`."""
    module, _ = pipeline.run(g.copy(prepared), passes.lower(chosen, rounded))
    return describe_program(module, chosen.bucket, values)


def find_target(target: str | Target) -> Target:
    """A target by name; ``host`` is this machine."""
    if isinstance(target, Target):
        return target
    return targets.this_host() if target == "host" else targets.load(target)


def find_buckets(captured: Captured, batch: Sequence[int]) -> tuple[Bucket, ...]:
    """The points to plan for: `batch` along the first dimension, the example's sizes along all others."""
    if not captured.symbols:
        return ({},)
    sizes: dict[str, int] = {}
    for spec, tensor in zip(captured.input_specs, captured.example, strict=True):
        sizes |= {size: tensor.shape[d] for d, size in enumerate(spec.shape) if isinstance(size, str)}
    example = {symbol.name: sizes[symbol.name] for symbol in captured.symbols}
    if not batch or "batch" not in example:
        return (example,)
    return tuple(example | {"batch": size} for size in sorted(set(batch)))
