"""A program made while a model runs: one plan of one graph, lowered and bound to this process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from armopt import environment, targets
from armopt.compiler.recipe import Prepared, Recipe
from armopt.dynamo.process import PROCESS
from armopt.errors import ArmoptWarning
from armopt.ir import graph as g
from armopt.ir.calls import call_of
from armopt.ir.records import Bucket, Decision, Plan, Site
from armopt.kernels import table
from armopt.runtime import host_check, own
from armopt.runtime.bind import Binder, Bound

Forward = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Settings:
    """How graphs are planned.

    Attributes:
        recipe: How they become programs.
        plans: The most plans for one graph and set of weights; beyond them the nearest serves other shapes too.
        tuning: A file from ``armopt tune``, or empty.
        repaired: Weight -> how far the layers that multiply with it are taken out of BF16: what a check found out.
    """

    recipe: Recipe
    plans: int = 8
    tuning: str = ""
    repaired: Any = field(default_factory=WeakTensorKeyDictionary, compare=False, repr=False)

    @property
    def portable(self) -> bool:
        """Whether portable twins run: this machine is not the target's."""
        return host_check.is_portable(targets.machine(self.recipe.target))


@dataclass(frozen=True)
class Programmed:
    """One program: what it was planned for, and what its nodes run.

    Attributes:
        plan: Decisions and refusals.
        kernels: What every node got on this host; empty where portable twins run.
        sites: Every node as the planner sees it.
        values: The sizes that it was lowered at, by the graph's own symbols.
        dtypes: Position of a weight among the graph's inputs -> the dtypes in which its values are used.
        forward: Takes the graph's inputs without its weights.
        constants: All that it holds, packed or not.
    """

    plan: Plan
    kernels: tuple[Bound, ...]
    sites: Mapping[str, Site]
    values: Bucket
    dtypes: Mapping[int, frozenset[torch.dtype]]
    forward: Forward
    constants: tuple[torch.Tensor, ...] = field(repr=False)


def make_program(
    prepared: Prepared,
    chosen: Plan,
    values: Bucket,
    settings: Settings,
    name: str,
    own: Set[int],
    positions: Mapping[str, int],
) -> Programmed:
    """Lowers and binds one plan; what is stored or packed already is shared, except the model's `own` by address.

    `positions` tells by name which inputs of the graph its constants were.
    """
    program = settings.recipe.lower(prepared, chosen, values, {})
    module = program.graph_module
    dtypes = _dtypes(module.graph, chosen, positions)
    for constant, tensor in list(module.named_buffers()):
        if tensor.data_ptr() not in own:
            module._buffers[constant] = PROCESS.pool.share(tensor)
    if settings.portable:
        return Programmed(chosen, (), program.sites, values, dtypes, module.forward, tuple(module.buffers()))
    _check_host(settings, chosen.decisions)
    fast_math, times, bf16_attention = (
        environment.fast_math(os.environ),
        host_check.timings_for(settings.tuning),
        host_check.multiplies_bf16(),
    )
    binder = Binder(
        fast_math, times, identify=PROCESS.pool.identify, packed=PROCESS.pool, bf16_attention=bf16_attention
    )
    with host_check.remembering(binder.verdicts) as binder.remembered:
        bound, entries = binder.bind(program)
    if changed := host_check.changes([entries]):
        warnings.warn(f"{name}: {changed}", ArmoptWarning, stacklevel=2)
    constants = tuple(_constants(bound))
    return Programmed(chosen, tuple(entries), program.sites, values, dtypes, bound.forward, constants)


def _dtypes(graph: fx.Graph, chosen: Plan, positions: Mapping[str, int]) -> Mapping[int, frozenset[torch.dtype]]:
    """In which dtypes the values of each weight are used: a kernel may round what the graph holds in FP32."""
    kernels = {entry.node: table.get(entry.kernel) for entry in chosen.decisions}
    found: dict[int, frozenset[torch.dtype]] = {}
    for node in graph.find_nodes(op="get_attr"):
        used = set()
        for user in node.users:
            rounds = user.name in kernels and call_of(user).weight is node and user.args.count(node) == 1
            used.add(kernels[user.name].rounding.weights if rounds else g.fake_value(node).dtype)
        for name in g.source_constants(node) & positions.keys():
            found[positions[name]] = found.get(positions[name], frozenset()) | used
    return found


def _check_host(settings: Settings, decisions: Sequence[Decision]) -> None:
    """Says once for each target what this process lacks."""
    half = any(decision.precision.startswith("bf16") for decision in decisions)
    required = ("bf16",) if half and settings.recipe.target.bf16 else ()
    if (settings.recipe.target.name, required) in PROCESS.checked:
        return
    PROCESS.checked.add((settings.recipe.target.name, required))
    wanted = environment.wanted(settings.recipe.target)
    host_check.check_host(settings.recipe.target.name, wanted, required, {}, what="the plan", stacklevel=2)


def _constants(bound: fx.GraphModule) -> Iterator[torch.Tensor]:
    yield from (getattr(bound, str(node.target)) for node in bound.graph.nodes if node.op == "get_attr")
    yield from own.packed_weights(bound.graph)
