"""How nested arguments and results map to a flat list of tensors, as plain records that a bundle can hold.

Classes are kept by name only: nothing is imported to rebuild them.
"""

from __future__ import annotations

import collections
import dataclasses
import keyword
import math
import numbers
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

from msgspec import Meta, Struct, field

from armopt.errors import InputError


class _Node(Struct, frozen=True, tag_field="kind", forbid_unknown_fields=True):
    """A part of a nested value; ``kind`` says in JSON which."""


class Tensor(_Node, frozen=True, tag="tensor"):
    """The tensor at that place of the flat list."""

    index: Annotated[int, Meta(ge=0)]


class Constant(_Node, frozen=True, tag="constant"):
    """A value that the model was captured with."""

    value: bool | int | float | str | None


class _Items(_Node, frozen=True):
    items: tuple[Structure, ...]


class List(_Items, frozen=True, tag="list"):
    """A list."""


class Tuple(_Items, frozen=True, tag="tuple"):
    """A tuple."""


class _Named(_Node, frozen=True):
    items: dict[str, Structure]


class Dict(_Named, frozen=True, tag="dict"):
    """A dictionary with names for keys."""


class OrderedDict(_Named, frozen=True, tag="ordered_dict"):
    """An ordered one."""


class _Fields(_Named, frozen=True):
    class_: Annotated[str, Meta(pattern=r"\A[\w.<>]+\Z")] = field(name="class")


class NamedTuple(_Fields, frozen=True, tag="namedtuple"):
    """A named tuple."""


class Fields(_Fields, frozen=True, tag="record"):
    """A dataclass or a model output."""


Structure = Tensor | Constant | List | Tuple | Dict | OrderedDict | NamedTuple | Fields


class Inputs(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the arguments of a call nest its tensors.

    Attributes:
        args: The positional ones.
        kwargs: Those by name.
        names: Of all parameters that can be given by position, in order.
        defaults: Of parameters that the model was captured without, where they hold no tensor.
    """

    args: tuple[Structure, ...]
    kwargs: dict[str, Structure]
    names: tuple[str, ...]
    defaults: dict[str, Structure] = {}

    @property
    def tree(self) -> Dict:
        """Both as one nested value, in whose order the tensors are numbered."""
        return Dict({"args": List(self.args), "kwargs": Dict(self.kwargs)})

    def check_numbers(self, count: int) -> None:
        """Refuses numbers other than those of `count` tensors.

        Raises:
            ValueError: One is missing, surplus or there twice.
        """
        if [tensor.index for tensor in tensors(self.tree)] != list(range(count)):
            raise ValueError(f"inputs do not number {count} tensors in order")
        if any(True for _ in tensors(Dict(self.defaults))):
            raise ValueError("a default holds a tensor")


class Outputs(Struct, frozen=True, forbid_unknown_fields=True):
    """How a model's result nests its tensors, and where each stands among what the graph returns."""

    tree: Structure
    positions: tuple[Annotated[int, Meta(ge=0)], ...]

    def __post_init__(self) -> None:
        if [tensor.index for tensor in tensors(self.tree)] != list(range(len(self.positions))):
            raise ValueError(f"outputs do not number {len(self.positions)} tensors in order")


class Record(dict[str, Any]):
    """A result with named fields, where its own class is not at hand.

    Reads like a Hugging Face model output: by attribute, by key and by position.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return self.to_tuple()[key]
        return super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(item for item in self.values() if item is not None)


def describe(tree: Any, is_tensor: Callable[[Any], bool], where: str) -> tuple[Structure, list[Any]]:
    """Splits a nested value into its structure and the flat list of its tensors.

    Args:
        tree: The nested value.
        is_tensor: Tells the leaves that count as tensors.
        where: What the value is, for the error message.

    Returns:
        The structure and the tensors, in order.

    Raises:
        InputError: The value holds something that a bundle can't describe.
    """
    found: list[Any] = []
    return _describe(tree, is_tensor, where, found), found


def describe_inputs(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: tuple[str, ...],
    is_tensor: Callable[[Any], bool],
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Inputs, list[Any]]:
    """Describes the arguments of a call. `names` are the parameters' names, `defaults` the values that some have.

    Raises:
        InputError: They hold something that a bundle can't describe.
    """
    found: list[Any] = []
    described = [_describe(item, is_tensor, f"inputs['args'][{i}]", found) for i, item in enumerate(args)]
    named = {key: _describe(item, is_tensor, f"inputs['kwargs'][{key!r}]", found) for key, item in kwargs.items()}
    left_out = {name: value for name, value in defaults.items() if name not in (*names[: len(args)], *kwargs)}
    return Inputs(tuple(described), named, names, _without_tensors(left_out, is_tensor)), found


def _without_tensors(defaults: Mapping[str, Any], is_tensor: Callable[[Any], bool]) -> dict[str, Structure]:
    """The defaults that can be described and hold no tensor."""
    found: dict[str, Structure] = {}
    for name, value in defaults.items():
        try:
            described, held = describe(value, is_tensor, name)
        except InputError:
            continue
        if not held:
            found[name] = described
    return found


def _describe(node: Any, is_tensor: Callable[[Any], bool], path: str, found: list[Any]) -> Structure:
    if is_tensor(node):
        found.append(node)
        return Tensor(len(found) - 1)
    if isinstance(node, float) and not math.isfinite(node):
        raise InputError(f"holds {node}, which a bundle can't describe", where=path, hint="Pass it as a tensor")
    if node is None or isinstance(node, (bool, int, float, str)):
        return Constant(node)
    if (fields := _fields(node)) is not None:
        kind = NamedTuple if isinstance(node, tuple) else Fields
        named = {name: _describe(item, is_tensor, f"{path}.{name}", found) for name, item in fields.items()}
        return kind(named, f"{type(node).__module__}.{type(node).__qualname__}")
    if isinstance(node, Mapping):
        _check_keys(node, path)
        named = {key: _describe(item, is_tensor, f"{path}[{key!r}]", found) for key, item in node.items()}
        return OrderedDict(named) if isinstance(node, collections.OrderedDict) else Dict(named)
    if isinstance(node, (list, tuple)):
        items = tuple(_describe(item, is_tensor, f"{path}[{i}]", found) for i, item in enumerate(node))
        return List(items) if isinstance(node, list) else Tuple(items)
    raise InputError(
        f"holds a {type(node).__name__}, which a bundle can't describe",
        where=path,
        hint="Use tensors, numbers, strings, lists, tuples, dictionaries, named tuples or dataclasses: see "
        "docs/capture.md#caches-and-other-objects",
    )


def _check_keys(node: Mapping[Any, Any], path: str) -> None:
    if bad := [key for key in node if not isinstance(key, str)]:
        raise InputError(f"a dictionary key is {bad[0]!r}, not a string", where=path)


def tensors(structure: Structure) -> Iterator[Tensor]:
    """Its tensors, in order."""
    if isinstance(structure, Tensor):
        yield structure
    elif not isinstance(structure, Constant):
        items = structure.items
        for item in items if isinstance(items, tuple) else items.values():
            yield from tensors(item)


def _fields(node: Any) -> dict[str, Any] | None:
    """Named fields of a named tuple, a dataclass or a model output."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return dict(zip(node._fields, node, strict=True))
    if isinstance(node, collections.OrderedDict) and type(node) is not collections.OrderedDict:
        return dict(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {each.name: getattr(node, each.name) for each in dataclasses.fields(node)}
    return None


def builder(structure: Structure) -> Callable[[Sequence[Any]], Any]:
    """A function from flat tensors to the nested value. What can be decided once is decided here."""
    if isinstance(structure, Tensor):
        return operator.itemgetter(structure.index)
    if isinstance(structure, Constant):
        value = structure.value
        return lambda tensors: value
    if isinstance(structure, _Items):
        parts = [builder(item) for item in structure.items]
        if isinstance(structure, List):
            return lambda tensors: [part(tensors) for part in parts]
        return lambda tensors: tuple([part(tensors) for part in parts])
    named = {key: builder(item) for key, item in structure.items.items()}
    if isinstance(structure, _Fields):
        make = _constructor(structure)
        return lambda tensors: make(**{key: part(tensors) for key, part in named.items()})
    collect = dict if isinstance(structure, Dict) else collections.OrderedDict
    return lambda tensors: collect([(key, part(tensors)) for key, part in named.items()])


def _constructor(structure: NamedTuple | Fields) -> Callable[..., Any]:
    """The original class if this process has it already, else a stand-in. A bundle never causes an import."""
    module_name, _, qualname = structure.class_.rpartition(".")
    found: Any = sys.modules.get(module_name)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and structure.items.keys() <= _names_of(found):
        return found
    if isinstance(structure, NamedTuple):
        # of names Python makes source text here: what it can't take as one becomes a number
        make: Any = collections.namedtuple
        fits = qualname.isidentifier() and not keyword.iskeyword(qualname)
        made = make(qualname if fits else "Result", structure.items, rename=True)
        return lambda **values: made(*values.values())
    return type(qualname, (Record,), {"__module__": module_name})


def _names_of(cls: type) -> set[str]:
    """The fields that a class is made of; none for any other class."""
    if dataclasses.is_dataclass(cls):
        return {each.name for each in dataclasses.fields(cls) if each.init}
    return set(getattr(cls, "_fields", ()))


def flatten(structure: Structure, tree: Any, where: str) -> list[Any]:
    """The tensors of `tree` in the order of `structure`.

    Raises:
        InputError: `tree` nests otherwise, or a constant differs from the one captured.
    """
    flat: dict[int, Any] = {}
    for expected, found, path in _pairs(structure, tree, where):
        if isinstance(expected, Tensor):
            flat[expected.index] = found
        elif not _is_same(expected.value, found):
            raise InputError(
                f"the model was captured with {expected.value!r}, not {found!r}",
                where=path,
                hint="Optimize it again with this value",
            )
    return [flat[index] for index in sorted(flat)]


def _is_same(expected: bool | int | float | str | None, found: Any) -> bool:
    """Whether a value is the one captured; a tensor never is."""
    if expected is None or not isinstance(found, (numbers.Number, str)):
        return expected is found
    return bool(expected == found)


def holds(structure: Structure, tree: Any) -> bool:
    """Whether a value without tensors is the one that `structure` describes."""
    try:
        return not flatten(structure, tree, "")
    except InputError:
        return False


def _pairs(structure: Structure, tree: Any, path: str) -> Iterator[tuple[Tensor | Constant, Any, str]]:
    if isinstance(structure, (Tensor, Constant)):
        yield structure, tree, path
    elif isinstance(structure, _Items):
        items = structure.items
        if not isinstance(tree, (list, tuple)) or len(tree) != len(items):
            kind = "list" if isinstance(structure, List) else "tuple"
            raise InputError(f"expected a {kind} of {len(items)}, found {_shown(tree)}", where=path)
        for i, (item, found) in enumerate(zip(items, tree, strict=True)):
            yield from _pairs(item, found, f"{path}[{i}]")
    else:
        fields = _fields(tree)
        named = tree if fields is None else fields
        if not isinstance(named, Mapping) or set(named) != set(structure.items):
            raise InputError(f"expected fields {sorted(structure.items)}, found {_shown(tree)}", where=path)
        for key, item in structure.items.items():
            yield from _pairs(item, named[key], f"{path}.{key}")


def output_names(outputs: Outputs, count: int) -> list[str]:
    """A name for each of `count` flat outputs: its path in what the model returns."""
    names = [f"output{i}" for i in range(count)]

    def walk(node: Structure, path: str) -> None:
        if isinstance(node, Tensor):
            names[outputs.positions[node.index]] = path or "output"
        elif not isinstance(node, Constant):
            items = node.items
            for key, item in items.items() if isinstance(items, dict) else enumerate(items):
                walk(item, f"{path}.{key}" if path else str(key))

    walk(outputs.tree, "")
    return names


def _shown(tree: Any) -> str:
    if isinstance(tree, Mapping):
        return f"fields {sorted(map(str, tree))}"
    if isinstance(tree, (list, tuple)):
        return f"a {type(tree).__name__} of {len(tree)}"
    return f"a {type(tree).__name__}"
