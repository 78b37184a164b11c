"""The passes as a value: which run, in which order, with the graph checked between them and a record of each."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from armopt import passes
from armopt.errors import ArmoptError, InputError, PassError
from armopt.ir.records import PassResult, Plan, Skip
from armopt.passes import Pass

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """What one pass did."""

    name: str
    rewritten: tuple[str, ...]
    skipped: tuple[Skip, ...]


Ran = tuple[fx.GraphModule, tuple[Record, ...]]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Which passes run: all of :mod:`armopt.passes` in their order, unless some are left out.

    Attributes:
        left_out: Names of passes that do not run.
        last: The pass after which none runs; empty for all.
    """

    left_out: frozenset[str] = frozenset()
    last: str = ""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All passes, in order."""
        return (*(type(step).__name__ for step in passes.PREPARE), *(step.__name__ for step in passes.LOWER))

    def without(self, *names: str) -> Pipeline:
        """This pipeline without some of its passes.

        Raises:
            InputError: There is no such pass.
        """
        return replace(self, left_out=self.left_out | {self._known(name) for name in names})

    def until(self, name: str) -> Pipeline:
        """This pipeline up to a pass, which still runs.

        Raises:
            InputError: There is no such pass.
        """
        return replace(self, last=self._known(name))

    @property
    def lowers(self) -> bool:
        """Whether it goes on to lower plans."""
        return self.last not in {type(step).__name__ for step in passes.PREPARE}

    def prepare(self, graph_module: fx.GraphModule) -> Ran:
        """Runs what holds whatever the shapes.

        Raises:
            PassError: See :func:`run`.
        """
        return run(graph_module, self._kept(passes.PREPARE))

    def lower(self, graph_module: fx.GraphModule, plan: Plan, rounded: dict[str, torch.Tensor]) -> Ran:
        """Carries out a plan; plans of one model share `rounded`, its weights in BF16 by name.

        Raises:
            PassError: See :func:`run`.
        """
        return run(graph_module, self._kept(passes.lower(plan, rounded)) if self.lowers else ())

    def _kept(self, steps: Iterable[Pass]) -> Iterable[Pass]:
        for step in steps:
            name = type(step).__name__
            if name not in self.left_out:
                yield step
            if name == self.last:
                return

    def _known(self, name: str) -> str:
        if name not in self.names():
            raise InputError(f"there is no pass {name!r}", where="passes", hint=f"They are {', '.join(self.names())}")
        return name


def run(graph_module: fx.GraphModule, steps: Iterable[Pass]) -> Ran:
    """Runs passes in order.

    Raises:
        PassError: A pass failed or broke an invariant; the message names it and the passes before it.
    """
    records: list[Record] = []
    valueless = {node.name for node in graph_module.graph.nodes if "val" not in node.meta}
    for step in steps:
        name = type(step).__name__
        try:
            result: PassResult = step(graph_module)
            graph_module = result.graph_module
            check_invariants(graph_module, valueless)
        except ArmoptError as error:
            if isinstance(error, PassError):
                raise PassError(error.what, where=_place(name, records), hint=error.hint) from error
            raise
        except Exception as error:
            raise PassError(
                f"{type(error).__name__}: {error}",
                where=_place(name, records),
                hint="This is a bug in armopt: please report it with the model",
            ) from error
        records.append(Record(name, result.rewritten, result.skipped))
        _log.debug("%s: %d rewritten, %d skipped", name, len(result.rewritten), len(result.skipped))
    return graph_module, tuple(records)


def _place(name: str, records: list[Record]) -> str:
    before = ", ".join(record.name for record in records) or "nothing"
    return f"pass {name} (after {before})"


def check_invariants(graph_module: fx.GraphModule, valueless: Collection[str] = ()) -> None:
    """The invariants: a well-formed graph, constants that exist, a fake value on every node that a pass made.

    Nodes by these names had none to begin with: torch gives none to checks, which return nothing.
    """
    graph_module.graph.lint()
    for node in graph_module.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise ValueError(f"{node.name} is a {node.op}")
        if node.op == "output":
            continue
        if "val" not in node.meta and node.name not in valueless:
            raise ValueError(f"{node.name} has no meta['val']")
        if node.op == "get_attr":
            held, said = getattr(graph_module, str(node.target)), node.meta["val"]
            if isinstance(held, torch.Tensor) and (held.shape, held.dtype) != (said.shape, said.dtype):
                raise ValueError(f"{node.name} is {held.dtype} {tuple(held.shape)}, its meta['val'] says otherwise")
