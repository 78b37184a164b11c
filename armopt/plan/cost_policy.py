"""Chooses kernels by cost over the whole graph: neighbours in BF16 share their casts. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import networkx as nx
import torch

from armopt import targets
from armopt.errors import InputError
from armopt.ir.records import Precision, Site, Target
from armopt.kernels import table
from armopt.kernels.base import Kernel, Use
from armopt.kernels.timings import Timings
from armopt.plan import costs, planner, threshold_policy
from armopt.plan.clocked_costs import ClockedCosts
from armopt.plan.costs import CostTable
from armopt.plan.planner import Choice, Policy
from armopt.plan.tuned_costs import TunedCosts

_BF16, _FP32 = "bf16", "fp32"


class Costs(Protocol):
    """Where costs come from: a table, or a host's own times."""

    @property
    def name(self) -> str:
        """As reports have it."""

    def describe(self, cost: float) -> str:
        """A cost with its unit."""

    def of(self, sites: Sequence[Site]) -> Costs:
        """The costs in a graph with these layers."""

    def estimate(self, kernel: Kernel, site: Site) -> float | None:
        """The cost of one call with its post-op; None where it is not known."""

    def pointwise(self, name: str, elements: int) -> float:
        """The cost of one pointwise operation, e.g. ``fp32:cast``: from that dtype to the other."""

    def attention(self, dtype: str, heads: int, scores: int, products: int) -> float:
        """The cost of attention of so many heads, scores and multiply-adds in ``bf16`` or ``fp32``."""


@dataclass(frozen=True, slots=True)
class _Option:
    """The cheapest kernel on one dtype of activations, and its rival."""

    kernel: Kernel
    cost: float
    rival: str = ""
    ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class CostPolicy:
    """The least time over the graph as the product's clock has it, or the fewest instructions where there is no clock.

    Each site works on activations in BF16 or in FP32; a value that is made in one and read in the other is cast once.
    The cheapest labelling is a minimum cut, found exactly.

    Attributes:
        costs: Of the clock, of a table, or a host's own times.
        near: Kernels whose cost is within this factor of the best count as equal; the one that reads fewer bytes of
            weights is then taken, because one row is bound by them.
    """

    costs: Costs
    near: float = 1.03

    @property
    def name(self) -> str:
        """`cost` and where the costs come from."""
        return f"cost ({self.costs.name})"

    def choose(self, sites: Sequence[Site], target: Target) -> Sequence[Choice]:
        """The labelling of least cost; a site that no kernel takes stays plain ATen."""
        known = replace(self, costs=self.costs.of(sites))
        options = [known._options(site, target) for site in sites]
        in_bf16 = _cut(sites, options, known.costs)
        return [self._choice(site, options[i], site.node in in_bf16, target) for i, site in enumerate(sites)]

    def _options(self, site: Site, target: Target) -> dict[str, _Option]:
        """The best kernel on BF16 and on FP32 activations."""
        found: dict[str, list[tuple[float, Kernel]]] = {_BF16: [], _FP32: []}
        taking = candidates(site, target)
        for kernel in taking:
            cost = self.costs.estimate(kernel, site)
            if cost is not None:
                label = _BF16 if kernel.activations == torch.bfloat16 else _FP32
                found[label].append((cost, kernel))
        options = {label: self._best(entries) for label, entries in found.items() if entries}
        if taking and not options:  # none was measured: the order of the kernels is the order of preference
            first = taking[0]
            options[_BF16 if first.activations == torch.bfloat16 else _FP32] = _Option(first, 0.0)
        return options

    def _best(self, entries: list[tuple[float, Kernel]]) -> _Option:
        entries.sort(key=lambda entry: entry[0])
        close = [entry for entry in entries if entry[0] <= entries[0][0] * self.near]
        cost, kernel = min(close, key=lambda entry: (_weight_bytes(entry[1]), entry[0]))
        rivals = [entry for entry in entries if entry[1] is not kernel]
        if not rivals:
            return _Option(kernel, cost)
        return _Option(kernel, cost, rivals[0][1].name, rivals[0][0] / cost)

    def _choice(self, site: Site, options: Mapping[str, _Option], in_bf16: bool, target: Target) -> Choice:
        refusals = planner.refusals(site, target)
        if not options:
            return Choice(None, "; ".join(refusals))
        label = _BF16 if in_bf16 else _FP32
        chosen = options[label]
        other = options.get(_FP32 if in_bf16 else _BF16)
        rival, ratio = chosen.rival, chosen.ratio
        if other is not None and (not rival or other.cost / chosen.cost < ratio):
            rival, ratio = other.kernel.name, other.cost / chosen.cost
        parts = [self.costs.describe(chosen.cost) if chosen.cost else "the first kernel that takes it"]
        if rival:
            parts.append(f"{rival} {ratio:.2f}x" + (", but it would need casts" if ratio < 1 else ""))
        if chosen.kernel.precision == Precision.FP32:
            parts += refusals
        return Choice(chosen.kernel, "; ".join(parts))


def read(value: str, target: Target) -> Policy:
    """``cost``, ``cost=TORCH`` with the release that the server has, ``cost@THREADS``, or both.

    Raises:
        ValueError: It is none of these.
        InputError: Threads make no difference: nothing is known of time on the target.
    """
    found = re.fullmatch(r"(\d+\.\d+(?:\.\d+)?)?(?:@([1-9]\d{0,2}))?", value)
    if not found:
        raise ValueError(value)
    release, threads = found[1] or "", int(found[2] or 0)
    policy = default(target, release, threads)
    if threads and clocked(policy) is None:
        raise InputError(
            f"plans for {target.name} don't depend on threads: nothing is known of time there",
            where="--threads",
            hint="Leave the threads out; docs/clock.md names the targets that have a clock",
        )
    return policy


def clocked(policy: Policy) -> ClockedCosts | None:
    """The times that a policy goes by; None where it goes by something else."""
    found = policy.costs if isinstance(policy, CostPolicy) else None
    return found if isinstance(found, ClockedCosts) else None


def tuned(policy: Policy, target: Target, times: Timings) -> CostPolicy:
    """The policy by a host's own times; where there are none, by what `policy` knows, if it does.

    Args:
        policy: What would be without them.
        target: What it is for.
        times: What ``armopt tune`` measured.
    """
    of_policy = policy if isinstance(policy, CostPolicy) else default(target)
    known = of_policy.costs if isinstance(of_policy, CostPolicy) else None
    return CostPolicy(TunedCosts(times, known if isinstance(known, (ClockedCosts, CostTable)) else None))


def default(target: Target, release: str = "", threads: int = 0) -> Policy:
    """The policy for a target where nobody names one.

    By time where the product has a clock and its kernels' cycles are known; else by instructions. Without a cost table
    every layer is packed: the tutorial's 64 rows are for weights that are packed on each call.

    Args:
        target: A product.
        release: Of torch, on the server.
        threads: Of a call; 0 for as many as the product's usual instance has cores.
    """
    found = costs.find(target, release)
    if found is None:
        return threshold_policy.ThresholdPolicy(rows=1)
    clock = targets.clock_of(target)
    if clock is None or not found.has_cycles or found.core != target.core:  # another core needs other cycles
        return CostPolicy(found)
    return CostPolicy(ClockedCosts(found, clock, threads or clock.usual_threads))


def candidates(site: Site, target: Target) -> list[Kernel]:
    """Kernels that take a site: with BF16 weights where the core has BF16 and any such kernel does.

    In a process with fast math a kernel called FP32 would multiply in BF16 as well, without a primitive of its own.
    """
    taking = [kernel for kernel in table.kernels(site.op, Use.PLAN) if kernel.refuses(site) is None]
    half = [kernel for kernel in taking if kernel.rounding.weights == torch.bfloat16]
    full = [kernel for kernel in taking if kernel.rounding.weights == torch.float32]
    return [*half, *(kernel for kernel in full if kernel.beats_bf16)] if target.bf16 and half else full


def _weight_bytes(kernel: Kernel) -> int:
    """Bytes read for each weight: BLAS in FP32 widens them at load."""
    return 2 if kernel.precision == Precision.BF16 else 4


def _cut(sites: Sequence[Site], options: Sequence[Mapping[str, _Option]], costs: Costs) -> set[str]:
    """The sites that work in BF16, in the labelling of least cost: those on the side of BF16, the source."""
    graph = nx.DiGraph()
    graph.add_edge(_BF16, _FP32, capacity=0.0)
    for site, choices in zip(sites, options, strict=True):
        _add_site(graph, site, choices, costs)
    by_name = {site.node: site for site in sites}
    readers: dict[str, list[Site]] = {}
    for site in sites:
        for source in {site.source, site.residual} - {""}:
            readers.setdefault(source, []).append(site)
    for source in {*readers, *by_name}:
        _add_value(graph, source, by_name.get(source), readers.get(source, []), costs)
    _, (side, _) = nx.minimum_cut(graph, _BF16, _FP32)
    return {node[1] for node in side if isinstance(node, tuple) and node[0] == "site"}


def _add_site(graph: nx.DiGraph, site: Site, choices: Mapping[str, _Option], costs: Costs) -> None:
    """What a site costs on either side."""
    half, full = (
        choices[label].cost + costs.attention(label, *site.attended) if label in choices else math.inf
        for label in (_BF16, _FP32)
    )
    graph.add_edge(("site", site.node), _FP32, capacity=half)
    # without a choice plain ATen works in FP32
    graph.add_edge(_BF16, ("site", site.node), capacity=full if choices else 0.0)


def _add_value(graph: nx.DiGraph, source: str, made: Site | None, readers: Sequence[Site], costs: Costs) -> None:
    """What the casts of a value cost, which a site makes or something else in FP32."""
    maker = ("site", source) if made is not None else _FP32
    elements = made.m * made.n if made is not None else max(math.prod(r.shape) for r in readers)
    for reader in readers:
        graph.add_edge(("site", reader.node), ("narrow", source), capacity=math.inf)
        if made is not None:
            graph.add_edge(("wide", source), ("site", reader.node), capacity=math.inf)
    if readers:
        graph.add_edge(("narrow", source), maker, capacity=costs.pointwise("fp32:cast", elements))
    if made is not None:
        graph.add_edge(maker, ("wide", source), capacity=costs.pointwise("bf16:cast", elements))
        if made.escapes:
            graph.add_edge(("wide", source), _FP32, capacity=math.inf)
