"""How a model's results lie in memory where its user calls it, which an export may see otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from armopt.errors import InputError
from armopt.ir import graph as g
from armopt.ir import nesting, strides


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
