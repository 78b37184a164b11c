"""Small tools over torch.fx graphs that every pass needs: constants, insertion with true metadata, shapes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule

from armopt.errors import CaptureError, PassError
from armopt.ir.operations import SPLIT_ROWS
from armopt.ir.records import Bucket, Dim


def find_constant(graph_module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """The tensor behind a get_attr node; None for anything else."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value = getattr(graph_module, str(node.target))
        return value if isinstance(value, torch.Tensor) else None
    return None


def constant(graph_module: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    """The tensor behind a node that is known to be a constant, detached."""
    tensor = find_constant(graph_module, node)
    assert tensor is not None, f"{node} is no constant"
    return tensor.detach()


def attribute_name(graph_module: torch.nn.Module, wanted: str) -> str:
    """A free attribute name made from `wanted`."""
    base = re.sub(r"\W", "_", wanted)
    if not base or base[0].isdigit():
        base = f"_{base}"
    name, count = base, 0
    while hasattr(graph_module, name):
        count += 1
        name = f"{base}_{count}"
    return name


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode that the graph's metadata was made in."""
    for node in graph.nodes:  # the first tells it: passes ask again for each node that they insert
        mode = detect_fake_mode([node.meta.get("val")])
        if mode is not None:
            return mode
    raise PassError("the graph has no fake tensors", hint="capture it with armopt.capture")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, in the order of its elements."""
    data = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return data.view(torch.uint8).numpy().data if data.numel() else memoryview(b"")


def check_dense(tensor: torch.Tensor, name: str) -> None:
    """Refuses a constant whose values do not lie in memory one by one.

    Raises:
        CaptureError: It is sparse, quantized, or not on the CPU.
    """
    if tensor.layout is not torch.strided:
        what, hint = f"is sparse ({tensor.layout})", "Give the model .to_dense() of it"
    elif tensor.is_quantized:
        what, hint = f"is quantized ({tensor.dtype})", "Give the model .dequantize() of it"
    elif tensor.device.type != "cpu":
        what, hint = f"is on the device {tensor.device}", "Move the model to the CPU, with its values"
    else:
        return
    raise CaptureError(f"the constant {name} {what}, which a bundle can't hold".replace("torch.", ""), hint=hint)


def add_constant(
    graph_module: fx.GraphModule, wanted: str, value: torch.Tensor, before: fx.Node, made_of: Iterable[fx.Node] = ()
) -> fx.Node:
    """Registers `value` and returns a new get_attr node for it in front of `before`.

    `made_of` are the constants whose values it holds, arranged anew or scaled: rounding those rounds it as much.
    """
    name = _same_tensor(graph_module, value)
    if name is None:
        name = attribute_name(graph_module, wanted)
        graph_module.register_buffer(name, value)
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.get_attr(name)
    node.meta["val"] = fake_mode(graph_module.graph).from_tensor(value, static_shapes=True)
    node.meta["origins"] = frozenset().union(*map(source_constants, made_of))
    return node


def source_constants(constant: fx.Node) -> frozenset[str]:
    """The names of the constants whose values the one behind a get_attr node holds: its own, if no pass made it."""
    found: frozenset[str] = constant.meta.get("origins", frozenset((str(constant.target),)))
    return found


def _same_tensor(graph_module: torch.nn.Module, value: torch.Tensor) -> str | None:
    """The attribute that already holds the very same memory: shared weights stay shared."""
    for name, held in [*graph_module.named_parameters(), *graph_module.named_buffers()]:
        if held is value or (
            held.data_ptr() == value.data_ptr() != 0
            and (held.shape, held.stride(), held.dtype) == (value.shape, value.stride(), value.dtype)
        ):
            return name
    return None


def insert_call(
    graph: fx.Graph,
    before: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    name: str | None = None,
) -> fx.Node:
    """Inserts a call in front of `before` and on its behalf; ``meta["val"]`` comes from running it on fake tensors."""
    kwargs = kwargs or {}
    with graph.inserting_before(before):
        node = graph.create_node("call_function", target, args, kwargs, name=name)
    if "stack_trace" in before.meta:
        node.meta["stack_trace"] = before.meta["stack_trace"]
    # without Python's dispatcher some operations make numbers of symbolic sizes
    with torch.no_grad(), fake_mode(graph), enable_python_dispatcher():
        node.meta["val"] = target(*fx.map_arg(args, _fake), **fx.map_arg(kwargs, _fake))
    return node


def _fake(node: fx.Node) -> Any:
    return node.meta["val"]


def calls_to(graph: fx.Graph, *targets: Any) -> Iterator[fx.Node]:
    """The nodes that call one of `targets`, in order; safe against erasing while iterating."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in targets:
            yield node


def fake_value(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node."""
    result = node.meta["val"]
    assert isinstance(result, torch.Tensor), f"{node} has no tensor value"
    return result


def is_float32(node: Any) -> bool:
    """Whether a node's value is one FP32 tensor."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(val, torch.Tensor) and val.dtype == torch.float32


def size_at(size: Any, bucket: Bucket) -> int:
    """A dimension as a number at `bucket`."""
    if isinstance(size, int):
        return size
    known = {symbol: bucket[str(symbol)] for symbol in size.node.expr.free_symbols if str(symbol) in bucket}
    expression = size.node.expr.subs(known)
    if not expression.free_symbols:
        return int(expression)
    # a symbol that no input names depends on data: plan for one
    estimate = expression.subs(dict.fromkeys(expression.free_symbols, 1))
    return max(1, int(estimate)) if estimate.is_number and estimate.is_finite else 1


def shape_at(shape: Sequence[Any], bucket: Bucket) -> tuple[int, ...]:
    """A shape as numbers at `bucket`."""
    return tuple(size_at(size, bucket) for size in shape)


def with_rows_of_parts(graph: fx.Graph, bucket: Bucket) -> Bucket:
    """A bucket with the rows of each part that data makes, as if all parts were alike: what to plan experts for."""
    rows = dict(bucket)
    for node in calls_to(graph, SPLIT_ROWS):
        parts = node.meta["val"]
        each = -(-size_at(fake_value(node.all_input_nodes[0]).shape[0], bucket) // len(parts))
        rows |= {str(part.shape[0].node.expr): max(1, each) for part in parts}
    return rows


def symbolic_shape(shape: Sequence[Any]) -> tuple[Dim, ...]:
    """A shape as numbers and names of symbols.

    In this form shapes are compared: comparing torch's symbolic sizes would decide for the sizes of an example, or
    fail where a size depends on data.
    """
    return tuple(int(size) if is_fixed(size) else str(size.node.expr) for size in shape)


def is_fixed(size: Any) -> bool:
    """Whether a size is a number, also where torch keeps it as a symbolic integer."""
    return isinstance(size, int) or bool(size.node.expr.is_number)


def shown_name(node: fx.Node) -> str:
    """What people know a node by: its name in the bundle that it was read from, else its own."""
    return str(node.meta.get("name", node.name))


def source_line(node: fx.Node) -> str:
    """The line of the model that a node comes from, as ``torchvision/models/resnet.py:92``; empty where unknown.

    It is the innermost one outside of torch.
    """
    if "source" in node.meta:
        return str(node.meta["source"])
    return line_in(node.meta.get("stack_trace") or "")


def line_in(trace: str) -> str:
    """The innermost line outside of torch in a stack trace or in a message that holds one; empty where none is."""
    frames = re.findall(r'File "(.+?)", line (\d+)', trace)
    torchs_own = (str(Path(torch.__file__).parent), "torch/", "<eval_with_key>")  # in traces that torch makes up
    own = [frame for frame in frames if not frame[0].startswith(torchs_own)]
    if not own:
        return ""
    file, line = own[-1]
    return f"{_importable(file)}:{line}"


def _importable(file: str) -> str:
    """A file's path below the folder that it is imported from: nothing of this machine's folders."""
    parents = [folder for folder in map(os.path.abspath, sys.path) if file.startswith(folder + os.sep)]
    return os.path.relpath(file, max(parents, key=len)) if parents else os.path.basename(file)


def replace_and_erase(node: fx.Node, replacement: fx.Node) -> None:
    """Sends every user of `node` to `replacement` and removes `node`."""
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)


def is_pure(node: fx.Node) -> bool:
    """Whether a node may be dropped when nobody uses it."""
    if node.op in ("placeholder", "output"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        return not schema.is_mutable and "assert" not in schema.name and bool(schema.returns)
    return True


def written_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The constants and inputs that an operation writes to."""
    nodes: set[fx.Node] = set()
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            nodes |= {n for n in node.all_input_nodes if n.op in ("get_attr", "placeholder")}
    return nodes


def written_constants(graph: fx.Graph) -> set[str]:
    """Names of the constants that an operation writes to."""
    return {str(node.target) for node in written_nodes(graph) if node.op == "get_attr"}


def remove_unused(graph_module: fx.GraphModule) -> None:
    """Drops unused pure nodes and the constants that nobody reads; the module runs what is left."""
    graph = graph_module.graph
    for node in reversed(list(graph.nodes)):
        if not node.users and is_pure(node):
            graph.erase_node(node)
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for store in (graph_module._parameters, graph_module._buffers):
        for name in [name for name in store if name not in used]:
            del store[name]
    graph_module.recompile()


def copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own graph and the same tensors. Its code is made when it runs: passes change the graph often."""
    tensors: dict[str, torch.Tensor] = dict(graph_module.named_buffers(remove_duplicate=False))
    tensors |= graph_module.named_parameters(remove_duplicate=False)
    graph = fx.Graph()
    output = graph.graph_copy(graph_module.graph, {})
    graph.output(output)
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        root.register_buffer(name, tensor.detach())
    result = _LazyGraphModule(root, graph)
    source = next(iter(reversed(graph_module.graph.nodes)))
    next(iter(reversed(result.graph.nodes))).meta.update(source.meta)
    return result
