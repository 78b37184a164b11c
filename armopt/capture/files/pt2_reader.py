"""Reads a .pt2 as data: torch gets tensors and a program that was looked at, never the file.

torch.export.load unpickles what it meets, runs expressions and guards as Python, and opens compiled libraries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from armopt.capture.files import pickles, pt2_schema
from armopt.capture.files.archive import Archive, view
from armopt.capture.files.expressions import UnreadableError
from armopt.capture.files.pickles import CodeError
from armopt.ir import aten

_MODEL = "model"
_LEGACY = "serialized_exported_program.json"
_OTHERS = frozenset(
    f"torch.ops.torchvision.{name}.default"
    for name in ("nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
)
#: What has graphs of its own; capture goes through them or refuses them by name.
_WITH_GRAPHS = frozenset(
    f"torch.ops.higher_order.{name}"
    for name in ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "map_impl", "scan", "while_loop")
)
_ARITHMETIC = frozenset(
    {f"torch.sym_{name}" for name in ("float", "int", "not", "max", "min", "ite", "sum", "sqrt")}
    | {"torch._sym_sqrt", "math.ceil", "math.floor", "math.trunc", "math.sqrt"}
    | {f"_operator.{name}" for name in ("getitem", "neg", "pos", "abs", "not_", "add", "sub", "mul", "floordiv")}
    | {f"_operator.{name}" for name in ("truediv", "mod", "pow", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")}
)
#: Bits that a number may take: those of a size fit into 64, and no model multiplies many.
_MOST_BITS = 768
#: Calls whose text is a message: it quotes names.
_CHECKS = ("torch.ops.aten._assert_scalar.", "torch.ops.aten._assert_async.")
#: Names of ATen that take no tensor: checks of numbers.
_ON_NUMBERS = ("_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")


class UnshownError(Exception):
    """What a file holds that can't be shown to be harmless."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A program, and the inputs that it was exported with, if the file has them."""

    program: torch.export.ExportedProgram
    args: tuple[Any, ...] | None
    kwargs: Mapping[str, Any] | None


def read(archive: Archive) -> Exported:
    """The exported program in an archive, of torch 2.8 and later or of the form before.

    Raises:
        UnshownError: It holds what may run code.
        Exception: It is damaged.
    """
    from torch._export.serde import schema, serialize

    legacy = _LEGACY in archive
    name = _LEGACY if legacy else f"models/{_MODEL}.json"
    if name not in archive:
        raise ValueError(f"there is no model of the name {_MODEL!r} in it")
    described = _program(_decoded(archive.read(name), pt2_schema.Program, name))
    read_parts = _legacy_parts if legacy else _parts
    state, constants, inputs = read_parts(archive)
    args, kwargs = (None, None) if inputs is None else _call(inputs)
    program = serialize.ExportedProgramDeserializer().deserialize(
        serialize._bytes_to_dataclass(schema.ExportedProgram, described), state, constants
    )
    return Exported(program, args, kwargs)


def _decoded(data: bytes, kind: type[Any], name: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise UnshownError(f"{name}: {error}") from None
    except UnreadableError as error:
        raise UnshownError(str(error)) from None


def _parts(archive: Archive) -> tuple[dict[str, Any], dict[str, Any], Any]:
    return (
        _tensors(archive, "weights", ("weight_",)),
        _tensors(archive, "constants", ("tensor_",)),
        _unpickled(archive, f"data/sample_inputs/{_MODEL}.pt", "its example inputs"),
    )


def _legacy_parts(archive: Archive) -> tuple[dict[str, Any], dict[str, Any], Any]:
    state, constants, inputs = (
        _unpickled(archive, f"serialized_{part}.pt", f"its {part.replace('_', ' ')}")
        for part in ("state_dict", "constants", "example_inputs")
    )
    return _named(state), _named(constants), inputs


def _named(content: Any) -> dict[str, Any]:
    content = content or {}
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError("its weights are no tensors by name")
    return content


def _unpickled(archive: Archive, name: str, what: str) -> Any:
    if name not in archive or archive.size(name) == 0:
        return None
    try:
        return pickles.load_bytes(archive.read(name))
    except CodeError as error:
        raise UnshownError(f"a pickle of {error} in {what}") from None


def _tensors(archive: Archive, folder: str, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """The tensors of a folder by name; those in one member share its memory."""
    whole = f"data/{folder}/{_MODEL}.pt"
    if whole in archive:
        return _named(_unpickled(archive, whole, f"its {folder}"))
    name = f"data/{folder}/{_MODEL}_{folder}_config.json"
    config: pt2_schema.PayloadConfig = _decoded(archive.read(name), pt2_schema.PayloadConfig, name)
    held: dict[str, torch.UntypedStorage] = {}
    found: dict[str, Any] = {}
    for key, payload in config.config.items():
        if not payload.path_name.startswith(prefixes):
            raise UnshownError(f"the object {payload.path_name} among its {folder}")
        path = f"data/{folder}/{payload.path_name}"
        if payload.use_pickle:
            tensor = _named({key: _unpickled(archive, path, f"{folder}: {key}")})[key]
        else:
            if path not in held:
                held[path] = archive.storage(path)
            tensor = _view(held[path], payload.tensor_meta)
        found[key] = (
            torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) if payload.is_param else tensor
        )
    return found


def _view(storage: torch.UntypedStorage, meta: pt2_schema.TensorMeta | None) -> torch.Tensor:
    from torch._export.serde.serialize import deserialize_scalar_type

    if meta is None:
        raise ValueError("a tensor has neither size nor dtype")
    numbers = [n.as_int for n in (meta.storage_offset, *meta.sizes, *meta.strides)]
    rank = len(meta.sizes)
    dtype = deserialize_scalar_type(meta.dtype)  # type: ignore[arg-type]
    return view(storage, dtype, numbers[0], tuple(numbers[1 : rank + 1]), tuple(numbers[rank + 1 :]))  # type: ignore[arg-type]


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    match inputs:
        case (tuple(args), dict(kwargs)) if all(isinstance(key, str) and key.isidentifier() for key in kwargs):
            return args, kwargs
    raise ValueError("its example inputs are no call")


def _program(program: pt2_schema.Program) -> bytes:
    """The program for torch, as JSON, once its calls were looked at; what is in it for other uses is left out."""
    _check_graph(program.graph_module.graph)
    entry = program.graph_module.module_call_graph[0]
    if entry.signature is None:
        raise ValueError("the program has no signature")
    _check_tree(entry.signature.in_spec, by_name=True)
    _check_tree(entry.signature.out_spec)
    signature = msgspec.structs.replace(entry.signature, inputs=[], outputs=[])
    entry = msgspec.structs.replace(entry, signature=signature, fqn="")
    module = msgspec.structs.replace(program.graph_module, module_call_graph=[entry])
    return msgspec.json.encode(msgspec.structs.replace(program, graph_module=module))


def _check_graph(graph: pt2_schema.Graph) -> None:
    bits: dict[str, int] = {}
    _check_texts(graph.inputs, "input")
    for node in graph.nodes:
        _check_target(node.target)
        if not node.target.startswith(_CHECKS):
            _check_texts([each.arg for each in node.inputs], node.target)
        if node.target.startswith("_operator.") and node.target != "_operator.getitem":
            _grow(bits, node)
        for inner in _graphs(node):
            _check_graph(inner)


def _check_texts(arguments: Iterable[pt2_schema.Argument], of: str) -> None:
    """Refuses text that could end a text in Python's source."""
    for each in arguments:
        if isinstance(each.as_string, str) and ("'" in each.as_string or '"' in each.as_string):
            raise UnshownError(f"text with quotes in models/{_MODEL}.json: {of}")


def _graphs(node: pt2_schema.Node) -> Iterator[pt2_schema.Graph]:
    for each in node.inputs:
        if isinstance(each.arg.as_graph, pt2_schema.GraphArgument):
            if node.target not in _WITH_GRAPHS:
                raise UnshownError(f"a call of {node.target} with a graph")
            yield each.arg.as_graph.graph


def _check_target(target: str) -> None:
    """Refuses a call of anything but operations on tensors and arithmetic on their sizes."""
    if target in _ARITHMETIC or target in _OTHERS or target in _WITH_GRAPHS:
        return
    match target.split("."):
        case ["torch", "ops", "aten", name, overload] if aten.in_file(name):
            found = getattr(getattr(torch.ops.aten, name, None), overload, None)
            if found is None:
                raise ValueError(f"torch {torch.__version__} has no {target}")
            types = [str(each.type) for each in (*found._schema.arguments, *found._schema.returns)]
            if name in _ON_NUMBERS or any("Tensor" in each for each in types):
                return
    raise UnshownError(f"a call of {target}")


def _grow(bits: dict[str, int], node: pt2_schema.Node) -> None:
    """Takes in arithmetic on sizes, and refuses what may not come to an end."""
    sizes = [_bits(each.arg, bits) for each in node.inputs]
    if node.target == "_operator.mul":
        most = sum(sizes)
    elif node.target == "_operator.pow":
        power = node.inputs[-1].arg.as_int if node.inputs else 0
        if not isinstance(power, int) or not 0 <= power <= 64:
            raise UnshownError("a power of a size by something other than a small number")
        most = sizes[0] * max(1, power)
    else:
        most = max(sizes, default=0) + 1
    if most > _MOST_BITS:
        raise UnshownError(f"arithmetic on numbers that may take {most} bits")
    for output in node.outputs:
        for value in (output.as_sym_int, output.as_sym_float):
            if isinstance(value, (pt2_schema.SymIntArgument, pt2_schema.SymFloatArgument)):
                bits[str(value.as_name)] = most


def _bits(argument: pt2_schema.Argument, known: Mapping[str, int]) -> int:
    if isinstance(argument.as_int, int):
        return argument.as_int.bit_length()
    named = argument.as_sym_int
    if isinstance(named, pt2_schema.SymIntArgument):
        return named.as_int.bit_length() if isinstance(named.as_int, int) else known.get(str(named.as_name), 64)
    return 64


def _check_tree(text: str, *, by_name: bool = False) -> None:
    """Refuses a description of nested values that imports something; `by_name` where its second part are keywords."""
    try:
        _, tree = pt2_schema.TREE.decode(text)
    except msgspec.ValidationError as error:
        raise UnshownError(f"inputs or outputs nest as nothing known: {error}") from None
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children_spec)
        if node.type is not None:
            _check_context(node)
    if by_name:
        keywords = json.loads(tree.children_spec[1].context) if len(tree.children_spec) == 2 else []
        if not isinstance(keywords, list) or not all(isinstance(key, str) and key.isidentifier() for key in keywords):
            raise UnshownError("an input by what is no name")


def _check_context(node: pt2_schema.TreeNode) -> None:
    from torch.utils import _pytree as pytree

    kind: Any = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(str(node.type))
    if kind is None:
        raise ValueError(f"inputs or outputs nest in a {node.type}, which this process has not imported")
    if node.type == "collections.namedtuple":
        if node.context not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            raise ValueError(f"inputs or outputs nest in a {node.context}, which this process has not imported")
        return
    if pytree.SUPPORTED_SERIALIZED_TYPES[kind].from_dumpable_context is not None:
        raise UnshownError(f"inputs or outputs in a {node.type}")
    try:
        pt2_schema.CONTEXT.decode(node.context)
    except (TypeError, msgspec.DecodeError) as error:
        raise UnshownError(f"the form of a {node.type}: {error}") from None
