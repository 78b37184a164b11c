"""Parameters and buffers as constants of a graph: of an exported program, and of inputs that are to be constant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from armopt.errors import CaptureError
from armopt.ir import graph as g


class _Constants:
    """Tensors that become attributes of a module; what is the same memory becomes one."""

    def __init__(self) -> None:
        self.root = torch.nn.Module()
        self._named: dict[tuple[Any, ...], str] = {}

    def add(self, graph: fx.Graph, wanted: str, tensor: torch.Tensor, val: Any) -> fx.Node:
        """A get_attr node for a tensor, by a name made from `wanted`; `val` is its fake tensor."""
        tensor = tensor.detach().resolve_conj().resolve_neg()
        memory = (tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride())
        name = self._named.get(memory)
        if name is None:
            name = self._named[memory] = g.attribute_name(self.root, wanted)
            self.root.register_buffer(name, tensor)
        node = graph.get_attr(name)
        node.meta["val"] = val
        return node


def freeze(graph_module: fx.GraphModule, constants: Mapping[str, tuple[str, torch.Tensor]]) -> fx.GraphModule:
    """A copy of a flat graph in which some inputs are constants.

    Args:
        graph_module: ATen operations; every node carries its fake value.
        constants: Placeholder's name -> wanted name and tensor.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    held = _Constants()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and node.name in constants:
            mapping[node] = held.add(graph, *constants[node.name], node.meta["val"])
        elif node.op == "get_attr":
            mapping[node] = held.add(graph, str(node.target), getattr(graph_module, str(node.target)), node.meta["val"])
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    result = fx.GraphModule(held.root, graph)
    g.remove_unused(result)
    return result


def unlift(program: ExportedProgram, source: str) -> fx.GraphModule:
    """Parameters, buffers and constants from placeholders to get_attr nodes; mutations to copy_ at the end."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    held = _Constants()
    tensors: dict[str, torch.Tensor] = {**program.state_dict, **program.constants}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    attributes: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                if isinstance(node.meta.get("val"), torch.Tensor):
                    mapping[node] = graph.node_copy(node, lambda n: mapping[n])
                elif node.users:
                    raise CaptureError(
                        f"input {node.name} is a number that the graph reads", where=source, hint="Pass it as a tensor"
                    )
                continue
            if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                raise CaptureError(f"input {node.name} is a {spec.kind.name}, which a bundle can't hold", where=source)
            assert spec.target is not None
            g.check_dense(tensors[spec.target], spec.target)
            attribute = held.add(graph, spec.target, tensors[spec.target], node.meta["val"])
            mapping[node] = attributes[spec.target] = attribute
        elif node.op == "get_attr":
            line = next((found for user in node.users if (found := g.source_line(user))), "")
            raise CaptureError(
                "the model has control flow on data (torch.cond, while_loop, map or scan)",
                where=f"{source}: {line}" if line else source,
                hint="A bundle holds one straight graph. armopt.compile runs such a model",
            )
        elif node.op == "output":
            results = _apply_mutations(program, graph, node, mapping, attributes, source)
            graph.output(tuple(results))
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    result = fx.GraphModule(held.root, graph)
    g.remove_unused(result)
    return result


def _apply_mutations(
    program: ExportedProgram,
    graph: fx.Graph,
    output: fx.Node,
    mapping: Mapping[fx.Node, fx.Node],
    attributes: Mapping[str, fx.Node],
    source: str,
) -> list[Any]:
    results = []
    for spec, value in zip(program.graph_signature.output_specs, output.args[0], strict=True):  # type: ignore[arg-type]
        mapped = mapping[value] if isinstance(value, fx.Node) else value
        if spec.kind == OutputKind.USER_OUTPUT:
            results.append(mapped)
        elif spec.kind == OutputKind.BUFFER_MUTATION:
            assert isinstance(mapped, fx.Node)
            copied = graph.call_function(torch.ops.aten.copy_.default, (attributes[str(spec.target)], mapped))
            copied.meta["val"] = mapped.meta["val"]
        else:
            raise CaptureError(
                f"the model writes into its input ({spec.kind.name.lower()})",
                where=source,
                hint="Clone it in forward first",
            )
    return results
