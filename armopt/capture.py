"""A module or an exported program -> Captured: one flat functional graph of ATen operations."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from armopt import graph as g
from armopt import structure
from armopt.errors import ArmoptError, CaptureError, InputError
from armopt.ir import Captured, Dim, InputSpec, Symbol

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


def module(
    model: torch.nn.Module,
    args: Args,
    kwargs: Kwargs | None = None,
    *,
    batch: Sequence[int] = (),
    varying: Sequence[Collection[int]] = (),
    source: str = "model",
) -> Captured:
    """Captures a module with torch.export.

    Args:
        model: Any module with FP32 parameters; captured as in eval mode, left as it was.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        batch: Sizes of the first dimension to plan for; more than one makes that dimension dynamic.
        varying: For each tensor among the inputs, in their order, the dimensions that are to be dynamic.
        source: What to call the model in messages.

    Returns:
        The model as a flat graph.

    Raises:
        InputError: The model's dtype is not FP32, or the inputs don't fit its signature.
        CaptureError: torch.export can't take it whole.
    """
    kwargs = dict(kwargs or {})
    check_dtypes(model, source)
    args, kwargs = check_signature(model, args, kwargs, source)
    if batch:
        size = batch[0] if len(batch) == 1 else max(2, *batch)  # export takes a dimension of 1 as a constant
        args, kwargs = resize_batch_of(args, kwargs, size)
    dynamic = _dynamic_shapes(model, args, kwargs) if len(batch) > 1 else None
    if any(varying):
        dynamic = _varying_shapes(model, args, kwargs, varying)
    with eval_mode(model), torch.no_grad():
        try_once(model, args, kwargs, source)
        try:
            with quiet():
                program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            raise _explain(error, source, dynamic is not None) from error
    return exported(program, args, kwargs, source=source, signature=_parameter_names(model))


def exported(
    program: ExportedProgram,
    args: Args | None = None,
    kwargs: Kwargs | None = None,
    *,
    source: str,
    signature: Sequence[str] = (),
) -> Captured:
    """Captures an exported program, with its own example inputs unless others are given.

    Raises:
        InputError: It has no example inputs and none are given.
        CaptureError: It holds what a bundle can't (control flow, tokens, custom objects).
    """
    if args is None:
        if program.example_inputs is None:
            raise InputError(
                "the exported program has no example inputs", where=source, hint="Give them with --input or --inputs"
            )
        args, kwargs = program.example_inputs
    kwargs = dict(kwargs or {})
    with torch.no_grad(), quiet():
        program = program.run_decompositions({})
    graph_module = _unlift(program, source)
    inputs, tensors = describe_inputs(args, kwargs)
    names = _input_names(graph_module, tensors)
    _check_tensors(graph_module, tensors, source)
    outputs = _outputs(program, source)
    symbols = _symbols(program, graph_module)
    called: dict[Dim, Dim] = {symbol.expression: symbol.name for symbol in symbols}
    specs = []
    for node in placeholders(graph_module):
        val = node.meta["val"]
        shape = tuple(called.get(size, size) for size in g.symbolic_shape(val.shape))
        specs.append(InputSpec(names[node.name], shape, str(val.dtype).removeprefix("torch.")))
    return Captured(
        graph_module=graph_module,
        input_specs=tuple(specs),
        symbols=symbols,
        inputs=inputs | {"names": list(signature) or _signature_names(program, args)},
        outputs=outputs,
        example=tuple(tensors),
        digest=digest(graph_module),
        source=source,
    )


def placeholders(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The placeholders, in order."""
    return (node for node in graph_module.graph.nodes if node.op == "placeholder")


def check_dtypes(model: torch.nn.Module, source: str) -> None:
    """Refuses parameters of another dtype than FP32.

    Raises:
        InputError: Naming the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise wrong_dtype(name, parameter.dtype, source)
    if any(type(part).__module__.startswith("torch.ao.nn.quantized") for part in model.modules()):
        raise InputError("the model is quantized (int8)", where=source, hint="Give the FP32 model")


def wrong_dtype(name: str, dtype: torch.dtype, source: str) -> InputError:
    """The error for a parameter of another dtype than FP32."""
    fix = (
        "armopt rounds FP32 models itself: convert it with model.float()"
        if dtype.is_floating_point
        else "armopt takes FP32 models: give it the model before quantization or conversion"
    )
    return InputError(f"parameter {name} is {str(dtype).removeprefix('torch.')}, not float32", where=source, hint=fix)


def digest(graph_module: fx.GraphModule) -> str:
    """sha256 over the graph's text and all constants."""
    state = hashlib.sha256(str(graph_module.graph).encode())
    for name, tensor in sorted([*graph_module.named_parameters(), *graph_module.named_buffers()]):
        state.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        state.update(g.raw(tensor))
    return state.hexdigest()


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """A model in eval mode, every part of it; afterwards as it was."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _parameter_names(model: torch.nn.Module) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _signature_names(program: ExportedProgram, args: Args) -> list[str]:
    """Names of the positional inputs, as the exported program has them."""
    names = list(program.graph_signature.user_inputs)
    return [str(name) for name in names[: len(args)]] if len(names) >= len(args) else []


def check_signature(model: torch.nn.Module, args: Args, kwargs: Kwargs, source: str) -> tuple[Args, dict[str, Any]]:
    """The inputs, if forward takes them.

    Raises:
        InputError: It does not.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = [name for name in signature.parameters if name not in ("args", "kwargs")]
        raise InputError(
            f"the inputs don't fit forward({', '.join(names)}): {error}",
            where=source,
            hint=f"Name them as forward does: {', '.join(names)}",
        ) from None
    return tuple(args), dict(kwargs)


def _resize_batch(tree: Any, size: int) -> Any:
    """Repeats or cuts the first dimension of every tensor that has the batch there."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if _is_tensor(leaf) and leaf.dim() > 0]
    if not tensors:
        return tree
    current = tensors[0].shape[0]

    def resize(leaf: Any) -> Any:
        if not _is_tensor(leaf) or leaf.dim() == 0 or leaf.shape[0] != current:
            return leaf
        return leaf.repeat(-(-size // current), *[1] * (leaf.dim() - 1))[:size].clone()

    return torch.utils._pytree.tree_map(resize, tree)


def resize_batch_of(args: Args, kwargs: Kwargs, size: int) -> tuple[Args, dict[str, Any]]:
    """Inputs with a first dimension of `size` where they share the first tensor's."""
    resized: tuple[Args, dict[str, Any]] = _resize_batch((args, dict(kwargs)), size)
    return resized


def _dynamic_shapes(model: torch.nn.Module, args: Args, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_tensor(leaf) and leaf.dim() > 0]
    dimension = torch.export.Dim("batch", min=1)
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    size = tensors[0].shape[0]
    for tensor in {id(t): t for t in tensors}.values():
        if tensor.shape[0] == size:
            shapes[tensor] = {0: dimension}
    return shapes.dynamic_shapes(model, args, kwargs)


def _varying_shapes(
    model: torch.nn.Module, args: Args, kwargs: dict[str, Any], varying: Sequence[Collection[int]]
) -> Any:
    _, tensors = describe_inputs(args, kwargs)
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, dimensions in zip(tensors, varying, strict=True):
        if dimensions:
            shapes[tensor] = dict.fromkeys(dimensions, torch.export.Dim.AUTO)
    return shapes.dynamic_shapes(model, args, kwargs)


def describe_inputs(args: Args, kwargs: Kwargs, where: str = "inputs") -> tuple[dict[str, Any], list[torch.Tensor]]:
    """How the inputs of a call nest, and their tensors in order.

    Raises:
        InputError: They hold something that a bundle can't describe.
    """
    return structure.describe({"args": list(args), "kwargs": dict(kwargs)}, _is_tensor, where)


def try_once(model: torch.nn.Module, args: Args, kwargs: Kwargs, source: str) -> None:
    """Runs the model, whose own error on unfit inputs says more than an export's; buffers stay as they were.

    Raises:
        InputError: The model fails.
    """
    before = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    try:
        model(*args, **kwargs)
    except ArmoptError:
        raise
    except Exception as error:
        raise InputError(
            f"the model fails on the example inputs: {type(error).__name__}: {_first_line(error)}",
            where=source,
            hint="Check the names, shapes and dtypes given with --input",
        ) from error
    finally:
        for buffer, version, value in before:
            if buffer._version != version:
                buffer.copy_(value)


def _explain(error: Exception, source: str, dynamic: bool) -> CaptureError:
    """torch.export's error in one sentence, with the next step."""
    if dynamic and ("Constraints violated" in str(error) or "specialized" in str(error)):
        return CaptureError(
            "the model fixes its batch size, so it can't serve several",
            where=source,
            hint="Give one size with --batch, and make one bundle for each",
        )
    return CaptureError(
        f"torch.export can't take the model whole: {_first_line(error)}",
        where=source,
        hint="See docs/capture.md for what keeps a model from being exported",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch's own warnings, logs and prints of an export to itself: what matters comes as one error."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_tensors(graph_module: fx.GraphModule, tensors: Sequence[torch.Tensor], source: str) -> None:
    """Compares inputs with what the program was exported for."""
    for node, tensor in zip(placeholders(graph_module), tensors, strict=True):
        expected = g.value(node)
        fits = tensor.dim() == expected.dim() and all(
            not isinstance(size, int) or size == found for size, found in zip(expected.shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != expected.dtype:
            wanted = f"{list(g.symbolic_shape(expected.shape))} {expected.dtype}".replace("torch.", "")
            found = f"{list(tensor.shape)} {tensor.dtype}".replace("torch.", "")
            raise InputError(
                f"input {node.target} is {found}, the model takes {wanted}",
                where=source,
                hint="Give it with --input or --inputs as the model takes it",
            )


class _Constants:
    """Tensors that become attributes of a module; what is the same memory becomes one."""

    def __init__(self) -> None:
        self.root = torch.nn.Module()
        self._named: dict[tuple[Any, ...], str] = {}

    def add(self, graph: fx.Graph, wanted: str, tensor: torch.Tensor, val: Any) -> fx.Node:
        """A get_attr node for a tensor, by a name made from `wanted`; `val` is its fake tensor."""
        tensor = tensor.detach()
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
    g.sweep(result)
    return result


def _unlift(program: ExportedProgram, source: str) -> fx.GraphModule:
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
            attribute = held.add(graph, spec.target, tensors[spec.target], node.meta["val"])
            mapping[node] = attributes[spec.target] = attribute
        elif node.op == "get_attr":
            raise CaptureError(
                "the model has control flow on data (torch.cond, map or scan)",
                where=source,
                hint="A bundle holds one straight graph",
            )
        elif node.op == "output":
            results = _apply_mutations(program, graph, node, mapping, attributes, source)
            graph.output(tuple(results))
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    result = fx.GraphModule(held.root, graph)
    g.sweep(result)
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


def _input_names(graph_module: fx.GraphModule, tensors: Sequence[torch.Tensor]) -> dict[str, str]:
    nodes = list(placeholders(graph_module))
    if len(nodes) != len(tensors):
        raise InputError(
            f"the model takes {len(nodes)} tensors, {len(tensors)} are given", hint="Check the example inputs"
        )
    return {node.name: str(node.target) for node in nodes}


def _outputs(program: ExportedProgram, source: str) -> dict[str, Any]:
    """The structure of what the model returns; leaves that are no tensors become constants."""
    specs = [s for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    leaves: list[Any] = []
    for spec in specs:
        value = getattr(spec.arg, "value", None)
        leaves.append(torch.empty(0) if hasattr(spec.arg, "name") and value is None and not _is_none(spec) else value)
    assert program.call_spec.out_spec is not None
    tree = torch.utils._pytree.tree_unflatten(leaves, program.call_spec.out_spec)
    described, tensors = structure.describe(tree, _is_tensor, f"{source}: output")
    kept = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    assert len(kept) == len(tensors)
    return described | {"positions": kept}


def _is_none(spec: Any) -> bool:
    return type(spec.arg).__name__ == "ConstantArgument"


def _symbols(program: ExportedProgram, graph_module: fx.GraphModule) -> tuple[Symbol, ...]:
    """The dynamic dimensions of the inputs; a symbol of first dimensions is called batch."""
    found: dict[str, Symbol] = {}
    ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    for node in placeholders(graph_module):
        for dimension, size in enumerate(node.meta["val"].shape):
            expression = "" if isinstance(size, int) else str(size.node.expr)
            if expression not in ranges or expression in found:
                continue
            first = dimension == 0 and all(symbol.name != "batch" for symbol in found.values())
            bounds = ranges[expression]
            most = int(bounds.upper) if getattr(bounds.upper, "is_Integer", False) else None
            least = int(bounds.lower) if getattr(bounds.lower, "is_Integer", False) else 0
            found[expression] = Symbol("batch" if first else expression, expression, least, most)
    return tuple(found.values())
