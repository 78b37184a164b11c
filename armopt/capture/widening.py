"""Models and graphs in BF16 or FP16 as the same in FP32: each of their values is one of FP32 too."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from armopt.capture.calls import Args, Kwargs, eval_mode, held_tensors, is_tensor, unchanged
from armopt.errors import ArmoptWarning, CaptureError, InputError, first_line
from armopt.ir import graph as g
from armopt.models.huggingface import without_cache

_aten = torch.ops.aten
_CAST = _aten._to_copy.default
#: Dtypes that FP32 holds exactly.
HALF = (torch.bfloat16, torch.float16)


#: A pattern for what is said of a model that is widened.
SAID = ".*: widened to float32"
#: What bits mean depends on the dtype there, and what lies between elements on the memory of a tensor.
_BITWISE = (_aten.view.dtype, _aten.as_strided.default)
#: Whose operations work in FP32 as they do in half precision.
_NAMESPACES = ("aten", "torchvision")


def is_half(model: torch.nn.Module) -> bool:
    """Whether some parameter is in BF16 or FP16, and none is in what FP32 does not hold."""
    return are_half(model.parameters())


def are_half(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether one of some parameters is in BF16 or FP16, and none is in what FP32 does not hold."""
    dtypes = {parameter.dtype for parameter in parameters}
    return not dtypes.isdisjoint(HALF) and dtypes <= {torch.float32, torch.complex64, *HALF}


def weights_of(program: ExportedProgram) -> list[torch.Tensor]:
    """The parameters of a program; of one that keeps none, as from TorchScript, its matrices."""
    held: list[torch.Tensor] = list(filter(is_tensor, (*program.state_dict.values(), *program.constants.values())))
    parameters: list[torch.Tensor] = [each for each in held if isinstance(each, torch.nn.Parameter)]
    return parameters or [each for each in held if each.is_floating_point() and each.dim() > 1]


def names_of(parameters: Iterable[torch.Tensor]) -> str:
    """The half precisions among some parameters, for messages."""
    return " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters if p.dtype in HALF}))


def say(source: str, names: str) -> None:
    """Warns that a model is widened."""
    warnings.warn(
        f"{source} is in {names}: widened to float32, which changes no value. Results are compared with "
        "the model in float32, and have the model's own dtypes",
        ArmoptWarning,
        stacklevel=3,
    )


def say_if_half(model: torch.nn.Module, source: str) -> None:
    """Warns that a model is widened, if it is."""
    if is_half(model):
        say(source, names_of(model.parameters()))


def widened(model: torch.nn.Module, args: Args, kwargs: Kwargs, source: str) -> torch.nn.Module:
    """A copy that works in FP32, takes what the model takes, and gives its dtypes.

    Args:
        model: With parameters in BF16 or FP16.
        args: Example positional inputs, as the model takes them.
        kwargs: Example keyword inputs.
        source: What to call the model in messages.

    Raises:
        InputError: The model fails on the inputs, or can't be copied.
    """
    dtypes = _dtypes(model, args, kwargs, source)
    wide = in_fp32(model, source)

    def give(_: torch.nn.Module, given: Any, named: Any, result: Any) -> Any:
        leaves, tree = torch.utils._pytree.tree_flatten(result)
        return tree_unflatten([_narrow(leaf, dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)], tree)

    wide.register_forward_hook(give, with_kwargs=True)
    say(source, names_of(model.parameters()))
    return wide


def in_fp32(model: torch.nn.Module, source: str) -> torch.nn.Module:
    """A copy in FP32 that takes what the model takes; its results are in FP32 too.

    Raises:
        InputError: It can't be copied.
    """
    try:
        wide: torch.nn.Module = copy.deepcopy(model, _computed(model)).float()
    except Exception as error:
        what = f"is in half precision and can't be copied to widen it: {first_line(error)}"
        raise InputError(what, where=source, hint="Convert it with model.float()") from error

    def take(_: torch.nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return widen_values(given), widen_values(named)

    wide.register_forward_pre_hook(take, with_kwargs=True)
    return wide


def widened_program(graph_module: fx.GraphModule, program: ExportedProgram, source: str) -> bool:
    """Makes the graph of an exported program one in FP32 where its weights are in half precision, and says so.

    Returns:
        Whether they are.

    Raises:
        CaptureError: An operation may mean something else in FP32.
    """
    weights = weights_of(program)
    if not are_half(weights):
        return False
    narrow = narrow_operation(graph_module.graph)
    if narrow is not None:
        line = g.source_line(narrow)
        raise CaptureError(
            f"{narrow.target} is called in half precision, and may mean something else in float32",
            where=f"{source}: {line}" if line else source,
            hint="Convert the model with model.float() and export it again",
        )
    widen_graph(graph_module)
    say(source, names_of(weights))
    return True


def narrow_operation(graph: fx.Graph) -> fx.Node | None:
    """The first operation of a graph in half precision that may mean something else in FP32."""
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        values = tree_leaves([node.meta.get("val"), *(each.meta.get("val") for each in node.all_input_nodes)])
        half = any(isinstance(value, torch.Tensor) and value.dtype in HALF for value in values)
        if half and (node.target in _BITWISE or node.target.namespace not in _NAMESPACES):
            return node  # type: ignore[no-any-return]
    return None


def widen_graph(graph_module: fx.GraphModule) -> None:
    """Makes a graph in half precision one in FP32, which takes and gives the dtypes that it did.

    Args:
        graph_module: With parameters and buffers as get_attr nodes; changed in place, its tensors stay as they were.
            None of its operations is a :func:`narrow_operation`.
    """
    graph = graph_module.graph
    _widen_tensors(graph_module)
    output = graph.output_node()
    given = {node: g.fake_value(node).dtype for node in output.all_input_nodes if _is_half(node)}
    computing = [node for node in graph.nodes if node.op in ("call_function", "get_attr")]
    first = next(node for node in graph.nodes if node.op in ("call_function", "output"))
    taken = [node for node in graph.find_nodes(op="placeholder") if _is_half(node)]
    casts = {node: g.insert_call(graph, first, _CAST, (node,), {"dtype": torch.float32}) for node in taken}
    for node in computing:
        _widen_call(node, casts)
    for node, dtype in given.items():
        if not _is_half(node):
            output.replace_input_with(node, g.insert_call(graph, output, _CAST, (node,), {"dtype": dtype}))
    graph_module.recompile()


def _widen_call(node: fx.Node, casts: Mapping[fx.Node, fx.Node]) -> None:
    """Gives a call the inputs in FP32; what it gives is in FP32 then."""

    def fit(leaf: Any) -> Any:
        return casts.get(leaf, leaf) if isinstance(leaf, fx.Node) else torch.float32 if _is_half_dtype(leaf) else leaf

    written = node.args[0] if node.target is _aten.copy_.default else None
    args, kwargs = fx.node.map_aggregate(node.args, fit), fx.node.map_aggregate(node.kwargs, fit)
    node.args, node.kwargs = args, kwargs
    if written in casts:  # an input itself, which stays what it is
        node.update_arg(0, written)
    else:
        node.meta["val"] = tree_map(_wide_value, node.meta.get("val"))


def _widen_tensors(module: torch.nn.Module) -> None:
    wide: dict[int, torch.Tensor] = {}
    tables: list[dict[str, Any]] = [
        t for each in module.modules() for t in (each._parameters, each._buffers, vars(each))
    ]
    for table in tables:
        for name, tensor in table.items():
            if isinstance(tensor, torch.Tensor) and tensor.dtype in HALF:
                table[name] = wide.setdefault(id(tensor), tensor.detach().float())


def _is_half(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in HALF


def _is_half_dtype(leaf: Any) -> bool:
    return isinstance(leaf, torch.dtype) and leaf in HALF


def _wide_value(value: Any) -> Any:
    """A fake tensor as it is in FP32, which changes neither shape nor strides."""
    if not isinstance(value, FakeTensor) or value.dtype not in HALF:
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=torch.float32)


def _computed(model: torch.nn.Module) -> dict[int, Any]:
    """Copies of tensors that a module keeps beside its parameters and computed from them, which refuse to be copied."""
    return {id(each): each.detach().clone() for each in held_tensors(model) if not each.is_leaf}


def _dtypes(model: torch.nn.Module, args: Args, kwargs: Kwargs, source: str) -> Sequence[torch.dtype | None]:
    """Those of the model's own results; None where one is no tensor. Inputs in FP32 may be meant for half precision."""
    narrow = next(parameter.dtype for parameter in model.parameters() if parameter.dtype in HALF)
    results: list[Any] = []
    for attempt in ((args, kwargs), tree_map(lambda leaf: _to_half(leaf, narrow), (args, dict(kwargs)))):
        try:
            with (
                torch.no_grad(),
                eval_mode(model),
                without_cache(model),
                unchanged(model),
                torch.random.fork_rng(devices=[]),
            ):
                results = tree_leaves(model(*attempt[0], **attempt[1]))
            break
        except Exception as error:
            failed = error
    else:
        raise InputError(
            f"the model fails on the example inputs: {type(failed).__name__}: {first_line(failed)}",
            where=source,
            hint="Give inputs of the dtypes that the model takes, or convert it with model.float()",
        ) from failed
    return [leaf.dtype if isinstance(leaf, torch.Tensor) else None for leaf in results]


def _to_half(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32 else leaf


def widen_values(nested: Any) -> Any:
    """Inputs with those in half precision in FP32."""
    return tree_map(_wide, nested)


def _wide(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.dtype in HALF else leaf


def _narrow(leaf: Any, dtype: torch.dtype | None) -> Any:
    return leaf.to(dtype) if dtype in HALF and isinstance(leaf, torch.Tensor) else leaf
