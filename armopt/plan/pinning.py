"""Layers that users keep in FP32, by patterns on their names. Pure."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import fx

from armopt.errors import InputError, close_names
from armopt.ir import graph as g
from armopt.ir.calls import call_of, layers

#: How errors call it, on the command line and in Python.
OPTION = "keep_fp32 (--keep-fp32)"


def find(graph: fx.Graph, patterns: Sequence[str], path: str = "") -> dict[str, str]:
    """The layers and tables of embeddings of a graph that patterns name, each with its pattern.

    Args:
        graph: A prepared graph.
        patterns: With ``*``, ``?`` and ``[…]``, on a layer's name in the plan or its path in the model.
        path: Of the part of the model that the graph is.
    """
    found = {}
    for node, names in _named(graph, path):
        pattern = next((each for each in patterns if any(matches(each, name) for name in names)), None)
        if pattern is not None:
            found[node.name] = pattern
    return found


def names(graph: fx.Graph, path: str = "") -> set[str]:
    """The names of all layers of a graph."""
    return {name for _, each in _named(graph, path) for name in each}


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a layer; where a model's path has dots, its graph has underscores."""
    return fnmatch.fnmatchcase(_plain(name), _plain(pattern))


def check(patterns: Iterable[str], known: Collection[str]) -> None:
    """Refuses a pattern that names no layer.

    Raises:
        InputError: Naming what comes close.
    """
    for pattern in patterns:
        if any(matches(pattern, name) for name in known):
            continue
        near = close_names(_plain(pattern).strip("*?_"), sorted({_plain(name) for name in known}))
        meant = f"Did you mean {' or '.join(near)}? " if near else ""
        hint = f"{meant}A pattern has * for any letters (*fc*); armopt plan shows all names"
        raise InputError(f"no layer is called {pattern!r}", where=OPTION, hint=hint)


def _named(graph: fx.Graph, path: str) -> Iterator[tuple[fx.Node, set[str]]]:
    """Every layer and table with its names: in the graph, and of the parameters that its weight is made of."""
    prefix = f"{path}." if path else ""
    weights = [(node, call_of(node).weight) for node in layers(graph)]
    tables = [(node, node.args[0]) for node in g.calls_to(graph, torch.ops.aten.embedding.default)]
    for node, weight in [*weights, *tables]:
        constants = g.source_constants(weight) if isinstance(weight, fx.Node) else frozenset()
        yield node, {prefix + node.name, *(prefix + re.sub(r"[._]weight$", "", name) for name in constants)}


def _plain(name: str) -> str:
    return re.sub(r"[._]weight$", "", name).replace(".", "_")
