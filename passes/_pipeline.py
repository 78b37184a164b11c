"""Runs passes in order, checks the graph between them, and keeps a record of what each did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from armopt.errors import ArmoptError, PassError
from armopt.ir.records import PassResult, Skip
from armopt.passes import Pass


@dataclass(frozen=True, slots=True)
class Record:
    """What one pass did."""

    name: str
    rewritten: tuple[str, ...]
    skipped: tuple[Skip, ...]


def run(graph_module: fx.GraphModule, passes: Iterable[Pass]) -> tuple[fx.GraphModule, tuple[Record, ...]]:
    """Runs `passes` in order.

    Raises:
        PassError: A pass failed or broke an invariant; the message names it and the passes before it.
    """
    records: list[Record] = []
    for step in passes:
        name = type(step).__name__
        try:
            result: PassResult = step(graph_module)
            graph_module = result.graph_module
            check_invariants(graph_module)
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
    return graph_module, tuple(records)


def _place(name: str, records: list[Record]) -> str:
    before = ", ".join(record.name for record in records) or "nothing"
    return f"pass {name} (after {before})"


def check_invariants(graph_module: fx.GraphModule) -> None:
    """The invariants: a well-formed graph, constants that exist, a fake tensor on every node."""
    graph_module.graph.lint()
    for node in graph_module.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise ValueError(f"{node.name} is a {node.op}")
        if node.op == "output":
            continue
        if "val" not in node.meta:
            raise ValueError(f"{node.name} has no meta['val']")
        if node.op == "get_attr":
            held, said = getattr(graph_module, str(node.target)), node.meta["val"]
            if isinstance(held, torch.Tensor) and (held.shape, held.dtype) != (said.shape, said.dtype):
                raise ValueError(f"{node.name} is {held.dtype} {tuple(held.shape)}, its meta['val'] says otherwise")
