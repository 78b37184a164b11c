"""A module or an exported program -> Captured, by torch.export; which dtypes it may have; its digest."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from armopt.capture import decompositions, dimensions, layouts, refusals, widening
from armopt.capture.calls import (
    Args,
    Kwargs,
    check_device,
    check_signature,
    describe_inputs,
    eval_mode,
    is_tensor,
    placeholders,
    register_dataclasses,
    try_once,
)
from armopt.capture.constants import unlift
from armopt.capture.dimensions import NO_AXES, Axes, Dimension
from armopt.capture.eager import Eager
from armopt.capture.widening import is_half, widened
from armopt.errors import CaptureError, InputError
from armopt.ir import graph as g
from armopt.ir import nesting
from armopt.ir.pieces import BATCH
from armopt.ir.records import Captured, Dim, InputSpec, Symbol
from armopt.models.huggingface import without_cache
from armopt.models.padded_encoder import matching_eager


def module(
    model: torch.nn.Module,
    args: Args,
    kwargs: Kwargs | None = None,
    *,
    batch: Sequence[int] = (),
    axes: Axes = NO_AXES,
    varying: Sequence[Collection[int]] = (),
    source: str = "model",
) -> Captured:
    """Captures a module with torch.export.

    Args:
        model: Any module with parameters in FP32, or in BF16 and FP16, which are widened in a copy; captured as in eval
            mode, left as it was.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        batch: Sizes of the first dimension to plan for; more than one makes that dimension dynamic.
        axes: Which other dimensions of the inputs vary.
        varying: For each tensor among the inputs, in their order, the dimensions that are to be dynamic.
        source: What to call the model in messages.

    Returns:
        The model as a flat graph.

    Raises:
        InputError: The model's dtype is not FP32, or the inputs don't fit its signature.
        CaptureError: torch.export can't take it whole.
    """
    kwargs = dict(kwargs or {})
    names, defaults = _parameters(model)
    narrow = model if is_half(model) else None
    if narrow is not None:
        args, kwargs = check_signature(model, args, kwargs, source)
        model = widened(model, args, kwargs, source)
    check_dtypes(model, source)
    args, kwargs = check_signature(model, args, kwargs, source)
    if len(batch) > 1:
        axes = dimensions.with_batch(args, kwargs, axes, batch)
    args, kwargs, axes = dimensions.resized(args, kwargs, axes, batch[0] if len(batch) == 1 else None)
    dynamic = dimensions.dynamic_shapes(model, args, kwargs, axes)
    if any(varying):
        dynamic = _varying_shapes(model, args, kwargs, varying)
    if narrow is not None and not _runs(model, args, kwargs):
        model = narrow  # its forward names half precision, so its graph is widened instead
    with eval_mode(model), without_cache(model), matching_eager(model), torch.no_grad():
        result = try_once(model, args, kwargs, source)
        register_dataclasses((args, kwargs, result))
        _check_kinds(args, kwargs, result, source)
        try:
            with quiet():
                program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            raise dimensions.fixed(error, axes, source) or refusals.explain(error, source) from error
    with warnings.catch_warnings():
        if narrow is not None:
            warnings.filterwarnings("ignore", message=widening.SAID)  # as it was said of the module
        found = exported(
            program, args, kwargs, source=source, signature=names, defaults=defaults, original=model, axes=axes
        )
    layouts.lay_out(found.graph_module, found.outputs, result)
    return found


def exported(
    program: ExportedProgram,
    args: Args | None = None,
    kwargs: Kwargs | None = None,
    *,
    source: str,
    signature: Sequence[str] = (),
    original: torch.nn.Module | None = None,
    defaults: Kwargs = MappingProxyType({}),
    axes: Axes = NO_AXES,
) -> Captured:
    """Captures an exported program, with its own example inputs unless others are given.

    Args:
        program: What torch.export made.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        source: What to call the model in messages.
        signature: Names of the positional inputs.
        original: The module that it was made from; without one the program is the original.
        defaults: What parameters have that are not given.
        axes: Dimensions of the inputs that have a name.

    Raises:
        InputError: It has no example inputs and none are given.
        CaptureError: It holds what a bundle can't (control flow, tokens, custom objects).
    """
    if args is None:
        if program.example_inputs is None:
            raise InputError(
                "the exported program has no example inputs",
                where=source,
                hint="Give example_inputs (--input or --inputs)",
            )
        args, kwargs = program.example_inputs
    kwargs = dict(kwargs or {})
    _check_dense(program, source)
    _check_free(program, source)
    given = program
    try:
        with quiet():
            program = decompositions.without_writes(program)
    except Exception as error:
        raise refusals.explain(error, source) from error
    graph_module = unlift(program, source)
    layouts.correct_states(graph_module.graph)
    _check_parameters(program, source)
    half = widening.widened_program(graph_module, program, source)
    inputs, tensors = describe_inputs(args, kwargs, signature or _signature_names(program, args), defaults)
    own = [*signature[: len(args)], *kwargs]
    if isinstance(original, torch.jit.ScriptModule) and len(own) == len(tensors):
        _rename(graph_module, own)  # what was converted has names of the converter's
    names = _input_names(graph_module, tensors)
    _check_tensors(graph_module, tensors, source)
    outputs = _outputs(program, source)
    symbols = _symbols(program, graph_module, [axes.get(id(tensor), {}) for tensor in tensors], source)
    called = {symbol.expression: symbol.name for symbol in symbols}
    specs = []
    for node in placeholders(graph_module):
        val = node.meta["val"]
        shape = tuple(_renamed(size, called) for size in g.symbolic_shape(val.shape))
        specs.append(InputSpec(names[node.name], shape, str(val.dtype).removeprefix("torch.")))
    return Captured(
        graph_module=graph_module,
        input_specs=tuple(specs),
        symbols=symbols,
        inputs=inputs,
        outputs=outputs,
        example=tuple(tensors),
        digest=digest(graph_module),
        source=source,
        eager=(
            Eager.of_program(given, outputs, source)
            if original is None or half  # TorchScript stays in its dtype, so what was made of it serves
            else Eager.of_module(original, inputs, outputs, source)
        ),
    )


def _runs(model: torch.nn.Module, args: Args, kwargs: Kwargs) -> bool:
    try:
        with eval_mode(model), without_cache(model), torch.no_grad():
            try_once(model, args, kwargs, "")
    except InputError:
        return False
    return True


def _check_kinds(args: Args, kwargs: Kwargs, result: Any, source: str) -> None:
    """Refuses objects that a bundle can't describe, of which torch.export says little.

    Raises:
        CaptureError: Naming the place and the class.
    """
    try:
        describe_inputs(args, kwargs)
        nesting.describe(result, is_tensor, "output")
    except InputError as error:
        raise CaptureError(error.what, where=f"{source}: {error.where}", hint=error.hint) from None


def _renamed(size: Dim, called: Mapping[str, str]) -> Dim:
    """A size by our names of symbols, also where it follows from one: ``2*batch``."""
    if isinstance(size, int) or size in called:
        return size if isinstance(size, int) else called[size]
    return re.sub(r"\w+", lambda found: called.get(found[0], found[0]), size)


def _check_parameters(program: ExportedProgram, source: str) -> None:
    """Refuses parameters that are neither in FP32 nor in what that holds exactly.

    Raises:
        InputError: Naming the first such parameter.
    """
    for name, tensor in program.state_dict.items():
        known = (torch.float32, torch.complex64, *widening.HALF)
        if isinstance(tensor, torch.nn.Parameter) and tensor.dtype not in known:
            raise wrong_dtype(name, tensor.dtype, source)


#: Stand in a model that is to be quantized, and work in FP32 until it is.
_FLOAT = (torch.ao.nn.quantized.FloatFunctional, torch.ao.nn.quantized.FXFloatFunctional)


def check_dtypes(model: torch.nn.Module, source: str) -> None:
    """Refuses parameters that are not in FP32, or complex numbers of it, and those that are not on the CPU.

    Raises:
        InputError: Naming the first such parameter.
    """
    for name, parameter in model.named_parameters():
        check_device(parameter, f"parameter {name}", source)
        if parameter.dtype not in (torch.float32, torch.complex64):
            raise wrong_dtype(name, parameter.dtype, source)
    if any(
        type(part).__module__.startswith("torch.ao.nn.quantized") and not isinstance(part, _FLOAT)
        for part in model.modules()
    ):
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
        state.update(g.tensor_bytes(tensor))
    return state.hexdigest()


def _parameters(model: torch.nn.Module) -> tuple[list[str], dict[str, Any]]:
    """The parameters that can be given by position, and the defaults of all that have one."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names, {p.name: p.default for p in parameters if p.default is not p.empty}


def _signature_names(program: ExportedProgram, args: Args) -> list[str]:
    """Names of the positional inputs, as the exported program has them."""
    names = list(program.graph_signature.user_inputs)
    return [str(name) for name in names[: len(args)]] if len(names) >= len(args) else []


def _varying_shapes(
    model: torch.nn.Module, args: Args, kwargs: dict[str, Any], varying: Sequence[Collection[int]]
) -> Any:
    _, tensors = describe_inputs(args, kwargs)
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, dims in zip(tensors, varying, strict=True):
        if dims:
            shapes[tensor] = dict.fromkeys(dims, torch.export.Dim.AUTO)
    return shapes.dynamic_shapes(model, args, kwargs)


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
        expected = g.fake_value(node)
        check_device(expected, f"input {node.target} of the exported program", source)
        check_device(tensor, f"input {node.target}", source)
        fits = tensor.dim() == expected.dim() and all(
            not isinstance(size, int) or size == found for size, found in zip(expected.shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != expected.dtype:
            sizes = ", ".join(str(size) if g.is_fixed(size) else "any" for size in expected.shape)
            wanted = f"[{sizes}] {expected.dtype}".replace("torch.", "")
            found = f"{list(tensor.shape)} {tensor.dtype}".replace("torch.", "")
            raise InputError(
                f"input {node.target} is {found}, the model takes {wanted}",
                where=source,
                hint="Give it in example_inputs (--input or --inputs) as the model takes it",
            )


def _check_dense(program: ExportedProgram, source: str) -> None:
    """Refuses sparse tensors among what goes in and out: a bundle's values lie in memory one by one."""
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        seen = node.name in inputs or any(user.op == "output" for user in node.users)
        if seen and isinstance(value, torch.Tensor) and value.layout is not torch.strided:
            raise CaptureError(
                f"{node.name} is a sparse tensor ({value.layout})".replace("torch.", ""),
                where=source,
                hint="Let the model take and give dense ones, with .to_dense()",
            )


def _check_free(program: ExportedProgram, source: str) -> None:
    """Refuses sizes of inputs that only some numbers fit, such as ``2*Dim("half")``: a bundle's vary freely.

    Raises:
        CaptureError: Naming the first.
    """
    found = _following(program.graph_module)
    for node in placeholders(program.graph_module):
        value = node.meta.get("val")
        for dimension, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and not size.node.expr.is_Symbol and str(size.node.expr) not in found:
                what = f"dimension {dimension} of input {node.target} varies as {size}, which not all sizes fit"
                raise CaptureError(what, where=source, hint=dimensions.ONE_EACH)


def _rename(graph_module: fx.GraphModule, names: Sequence[str]) -> None:
    """Gives the inputs other names, but for those that something else in the graph has."""
    taken = {node.name for node in graph_module.graph.nodes}
    for node, name in zip(placeholders(graph_module), names, strict=True):
        if name.isidentifier() and name not in taken:
            node.name = node.target = name
            taken.add(name)
    graph_module.recompile()


def _input_names(graph_module: fx.GraphModule, tensors: Sequence[torch.Tensor]) -> dict[str, str]:
    nodes = list(placeholders(graph_module))
    if len(nodes) != len(tensors):
        raise InputError(
            f"the model takes {len(nodes)} tensors, {len(tensors)} are given", hint="Check the example inputs"
        )
    return {node.name: str(node.target) for node in nodes}


def _outputs(program: ExportedProgram, source: str) -> nesting.Outputs:
    """The structure of what the model returns; leaves that are no tensors become constants."""
    specs = [s for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    leaves: list[Any] = []
    for spec in specs:
        value = getattr(spec.arg, "value", None)
        leaves.append(torch.empty(0) if hasattr(spec.arg, "name") and value is None and not _is_none(spec) else value)
    assert program.call_spec.out_spec is not None
    tree = torch.utils._pytree.tree_unflatten(leaves, program.call_spec.out_spec)
    described, tensors = nesting.describe(tree, is_tensor, f"{source}: output")
    kept = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    assert len(kept) == len(tensors)
    return nesting.Outputs(described, tuple(kept))


def _is_none(spec: Any) -> bool:
    return type(spec.arg).__name__ == "ConstantArgument"


def _symbols(
    program: ExportedProgram, graph_module: fx.GraphModule, named: Sequence[Mapping[int, Dimension]], source: str
) -> tuple[Symbol, ...]:
    """The dynamic dimensions of the inputs, but for those that follow from others.

    Each has the name that was given it; else one of first dimensions is the batch, and others go by their number.

    Raises:
        InputError: A dimension that has a name is fixed.
    """
    found: dict[str, Symbol] = {}
    called = _called(graph_module, named, source)
    following = _following(graph_module)
    ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    for node in placeholders(graph_module):
        for dimension, size in enumerate(node.meta["val"].shape):
            expression = "" if isinstance(size, int) else str(size.node.expr)
            if expression not in ranges or expression in found or expression in following:
                continue
            taken = {*called.values(), *(symbol.name for symbol in found.values())}
            name = called.get(expression) or _free_name(dimension, taken)
            found[expression] = Symbol(name, expression, *_bounds(ranges[expression]))
    return tuple(found.values())


def _free_name(dimension: int, taken: Collection[str]) -> str:
    """A name for a dimension that nobody named: torch's own (s27) says nothing, and is another each time."""
    if dimension == 0 and BATCH not in taken:
        return BATCH
    name, count = f"dim{dimension}", 1
    while name in taken:
        count += 1
        name = f"dim{dimension}_{count}"
    return name


def _called(graph_module: fx.GraphModule, named: Sequence[Mapping[int, Dimension]], source: str) -> dict[str, str]:
    """Symbols of torch.export's by the names that users gave them."""
    called: dict[str, str] = {}
    for node, dims in zip(placeholders(graph_module), named, strict=True):
        for axis, each in dims.items():
            size = node.meta["val"].shape[axis]
            if isinstance(size, int):
                what = f"dimension {axis} of input {node.target} is {size} in the model, so {each.name!r} can't vary"
                raise InputError(what, where=source, hint="Write the number there, or export it with that dynamic")
            expression = str(size.node.expr)
            if called.setdefault(expression, each.name) != each.name:
                what = f"{each.name!r} and {called[expression]!r} are one dimension in the model"
                raise InputError(what, where=source, hint="Give both the same name")
    return called


def _following(graph_module: fx.GraphModule) -> set[str]:
    """The sizes of inputs that follow from the symbols of others: 2*s0, where s0 is a size."""
    values = [node.meta.get("val") for node in placeholders(graph_module)]
    shapes: list[Any] = [value.shape for value in values if isinstance(value, torch.Tensor)]
    found = {size.node.expr for shape in shapes for size in shape if isinstance(size, torch.SymInt)}
    named = {expression for expression in found if expression.is_Symbol}
    return {str(expression) for expression in found - named if expression.free_symbols <= named}


def _bounds(bounds: Any) -> tuple[int, int | None]:
    """The least and the most of a size; no most where it is unbounded."""
    least = int(bounds.lower) if getattr(bounds.lower, "is_Integer", False) else 0
    return least, int(bounds.upper) if getattr(bounds.upper, "is_Integer", False) else None
