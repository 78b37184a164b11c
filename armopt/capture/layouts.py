"""How a model's results lie in memory where its user calls it, which an export may see otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from armopt.errors import InputError
from armopt.ir import graph as g
from armopt.ir import nesting, strides


def correct_states(graph: fx.Graph) -> None:
    """Gives the states of LSTMs the shapes of those that they start from: PyTorch 2.10 records a dimension more."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.lstm.input):
        y, *recorded = node.meta["val"]
        states = [state.meta["val"] for state in node.args[1]]
        if [len(each.shape) for each in recorded] == [len(each.shape) for each in states]:
            continue
        node.meta["val"] = (y, *states)
        for user in node.users:
            user.meta["val"] = node.meta["val"][user.args[1]]


def lay_out(graph_module: fx.GraphModule, outputs: nesting.Outputs, result: Any) -> None:
    """Gives outputs the order in memory that they have in what the model itself gave for the same inputs.

    An export goes around PyTorch's fast path of attention, and its rules for some layouts (channels_last_3d) are not
    those of the kernels. Results that lie alike, or with gaps, stay as they are.
    """
    try:
        found = nesting.flatten(outputs.tree, result, "outputs")
    except InputError:  # it gives something else each time, which the comparison with the capture says
        return
    output = next(node for node in reversed(graph_module.graph.nodes) if node.op == "output")
    results: list[Any] = list(output.args[0])
    for position, tensor in zip(outputs.positions, found, strict=True):
        node = results[position]
        expected = node.meta.get("val")
        if not isinstance(tensor, torch.Tensor) or not isinstance(expected, torch.Tensor):
            continue
        captured, dims = strides.order(expected), strides.order(tensor)
        if dims is None or captured is None or strides.is_dense(tensor, captured):
            continue
        for target, more, kwargs in strides.calls(dims):
            node = g.insert_call(graph_module.graph, output, target, (node, *more), kwargs)
        results[position] = node
    if results != list(output.args[0]):
        output.args = (tuple(results),)
        graph_module.recompile()
