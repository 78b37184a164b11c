"""Prepare, plan, lower: how a captured graph becomes programs, whoever asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from armopt import targets
from armopt.bundle.program import Program, describe_program
from armopt.capture.submodules import CapturedPart
from armopt.ir import graph as g
from armopt.ir.records import Bucket, Captured, Plan, Skip, Target
from armopt.kernels import sites
from armopt.passes.pipeline import Pipeline, Record
from armopt.plan import pinning, planner, policies, products


@dataclass(frozen=True, slots=True)
class Prepared:
    """A graph after the passes that hold whatever the shapes, and what each of them did."""

    graph_module: fx.GraphModule
    records: tuple[Record, ...]

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """What passes left alone, and why."""
        return tuple(skip for record in self.records for skip in record.skipped)


@dataclass(frozen=True, slots=True)
class Planned:
    """A part of a model, prepared, with one plan for each of its buckets.

    Attributes:
        part: What was captured.
        prepared: Its graph, prepared.
        target: What it is planned for.
        plans: One for each bucket.
        rounded: Weights in BF16 by name, each rounded once, whichever plan is carried out.
    """

    part: CapturedPart
    prepared: Prepared
    target: Target
    plans: tuple[Plan, ...]
    rounded: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def captured(self) -> Captured:
        """The graph as it was captured."""
        return self.part.captured

    @property
    def records(self) -> tuple[Record, ...]:
        """What each pass did that prepared the graph."""
        return self.prepared.records

    @property
    def refused(self) -> tuple[Skip, ...]:
        """What runs as plain ATen in any of the plans."""
        return tuple(dict.fromkeys(skip for each in self.plans for skip in each.refused))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How graphs become programs: `optimize`, bundles of parts and torch.compile all follow one.

    Attributes:
        target: What they are for.
        policy: How kernels are chosen.
        pipeline: Which passes run.
        keep_fp32: Patterns of layers that stay in FP32: see :mod:`armopt.plan.pinning`.
    """

    target: Target
    policy: planner.Policy
    pipeline: Pipeline = field(default_factory=Pipeline)
    keep_fp32: tuple[str, ...] = ()

    @classmethod
    def of(cls, target: str | Target, policy: planner.Policy | str | None = None) -> Recipe:
        """A recipe from names, as the command line has them.

        Args:
            target: A product, ``host`` for this machine, or a target.
            policy: As ``--policy`` has it, or a policy; None is the default for the target.

        Raises:
            InputError: There is no such target or policy.
        """
        found = target if isinstance(target, Target) else targets.load(target)
        return cls(found, policies.find_policy(policy, found))

    def prepare(self, graph_module: fx.GraphModule) -> Prepared:
        """What holds of a graph whatever the shapes; the graph itself stays as it was."""
        return Prepared(*self.pipeline.prepare(g.copy(graph_module)))

    def plan(self, prepared: Prepared, bucket: Bucket, values: Bucket, path: str = "") -> Plan:
        """The plan of a prepared graph, the part of the model at `path`, at a bucket.

        `values` are the bucket by the graph's own symbols.
        """
        found = products.find(prepared.graph_module, values, prepared.skipped)
        pinned = pinning.find(prepared.graph_module.graph, self.keep_fp32, path)
        return planner.make(sites.find(prepared.graph_module, values), self.target, self.policy, bucket, found, pinned)

    def lower(self, prepared: Prepared, plan: Plan, values: Bucket, rounded: dict[str, torch.Tensor]) -> Program:
        """Carries out one plan on a copy of the graph; plans of one graph share `rounded`."""
        module, _ = self.pipeline.lower(g.copy(prepared.graph_module), plan, rounded)
        return describe_program(module, plan.bucket, values)

    def plan_part(self, part: CapturedPart, prepared: Prepared | None = None) -> Planned:
        """Plans each bucket of a part, whose graph is prepared once."""
        prepared = self.prepare(part.captured.graph_module) if prepared is None else prepared
        plans = tuple(self.plan(prepared, bucket, part.captured.values(bucket), part.path) for bucket in part.buckets)
        return Planned(part, prepared, self.target, plans)

    def lower_part(self, planned: Planned, plans: Sequence[Plan] | None = None) -> tuple[Program, ...]:
        """Carries out the plans of a part, or other ones; the programs share their weights."""
        return tuple(
            self.lower(planned.prepared, plan, planned.captured.values(plan.bucket), planned.rounded)
            for plan in (planned.plans if plans is None else plans)
        )

    def check_names(self, parts: Mapping[str, Prepared]) -> None:
        """Refuses a pattern that names no layer of a model, whose parts are given by path.

        Raises:
            InputError: Naming what comes close.
        """
        if self.keep_fp32:
            names = [pinning.names(each.graph_module.graph, path) for path, each in parts.items()]
            pinning.check(self.keep_fp32, frozenset[str]().union(*names))

    def without(self, *names: str) -> Recipe:
        """This recipe without some of its passes.

        Raises:
            InputError: There is no such pass.
        """
        return replace(self, pipeline=self.pipeline.without(*names))
