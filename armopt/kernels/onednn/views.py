"""Views of results that have a place in the arena: they are made once for each workspace, not in each call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.kernels.onednn.arguments import keep


@dataclass(frozen=True, slots=True)
class View:
    """One view, or the tuple of them that an operation gives.

    Attributes:
        of_layer: Whether it shows the result of a layer, else it shows an earlier view.
        index: Of that layer or view.
        make: The operation as a function of what it shows.
    """

    of_layer: bool
    index: int
    make: Callable[[Any], Any]

    def of(self, results: Mapping[int, torch.Tensor], earlier: Sequence[Any]) -> Any:
        """What the operation gives for the results of layers in one workspace, and the views of them so far."""
        source = results[self.index] if self.of_layer else earlier[self.index]
        made = self.make(source)
        for each in made if isinstance(made, (tuple, list)) else (made,):
            keep(each)
        return made


def find(graph: fx.Graph, layers: Mapping[fx.Node, int], results: Mapping[int, torch.Tensor]) -> dict[fx.Node, View]:
    """The nodes of a graph that only show results of layers.

    Args:
        graph: Calls of layers and of PyTorch's operations.
        layers: The index of each layer whose result lies at the same place in every call.
        results: Those results, by index.
    """
    found: dict[fx.Node, View] = {}
    made: list[Any] = []
    places = {node: (True, index) for node, index in layers.items()}
    for node in graph.nodes:
        if node in layers or not node.args or not isinstance(node.args[0], fx.Node) or node.args[0] not in places:
            continue
        of_layer, index = places[node.args[0]]
        if _gives_its_input(node.target):
            places[node] = of_layer, index
        elif node.all_input_nodes == [node.args[0]] and _may_show(node.target):
            view = View(of_layer, index, _function(node))
            source = results[index] if of_layer else made[index]
            result = view.of(results, made)
            if _shows(source, result):
                places[node] = False, len(made)
                found[node] = view
                made.append(result)
    return found


def replace(graph: fx.Graph, found: dict[fx.Node, View], workspace: fx.Node) -> None:
    """Takes views from the workspace of a call instead of making them."""
    if not found:
        return
    with graph.inserting_after(workspace):
        held = graph.call_function(getattr, (workspace, "views"))
    for index, node in enumerate(found):
        node.target, node.args, node.kwargs = operator.getitem, (held, index), {}
    for node in reversed(found):
        if not node.users:
            graph.erase_node(node)


def make(views: Sequence[View], results: Mapping[int, torch.Tensor]) -> list[Any]:
    """The views in a workspace with these results of layers."""
    made: list[Any] = []
    for view in views:
        made.append(view.of(results, made))
    return made


def _function(node: fx.Node) -> Callable[[Any], Any]:
    target: Any = node.target
    rest, named = node.args[1:], dict(node.kwargs)
    return lambda source: target(source, *rest, **named)


def _gives_its_input(target: Any) -> bool:
    """Whether an operation changes its first argument in place and gives it back, as the same tensor."""
    if not isinstance(target, torch._ops.OpOverload) or len(target._schema.returns) != 1:
        return False
    alias = target._schema.returns[0].alias_info
    return alias is not None and alias.is_write


def _may_show(target: Any) -> bool:
    """Whether an operation says that it gives memory of its inputs, unchanged."""
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    aliases = [each.alias_info for each in target._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _shows(source: Any, result: Any) -> bool:
    """Whether it did: some operations copy where they must."""
    memory = {_memory(each) for each in (source if isinstance(source, (tuple, list)) else (source,))}
    return {_memory(each) for each in (result if isinstance(result, (tuple, list)) else (result,))} <= memory


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
