"""How nested arguments and results map to a flat list of tensors, as plain data that a bundle can hold.

A structure is a dictionary with a ``kind``: ``tensor`` (with its index), ``constant`` (None, bool, int, float, str),
``list``, ``tuple``, ``dict``, ``ordered_dict``, ``namedtuple`` and ``record`` (a dataclass or a model output, by
field). Classes are kept by name only: nothing is imported to rebuild them.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from armopt.errors import InputError

Structure = Mapping[str, Any]


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


def describe(tree: Any, is_tensor: Callable[[Any], bool], where: str) -> tuple[dict[str, Any], list[Any]]:
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
    tensors: list[Any] = []

    def walk(node: Any, path: str) -> dict[str, Any]:
        if is_tensor(node):
            tensors.append(node)
            return {"kind": "tensor", "index": len(tensors) - 1}
        if node is None or isinstance(node, (bool, int, float, str)):
            return {"kind": "constant", "value": node}
        fields = _fields(node)
        if fields is not None:
            kind, named = fields
            cls = type(node)
            return {
                "kind": kind,
                "class": f"{cls.__module__}.{cls.__qualname__}",
                "items": {key: walk(item, f"{path}.{key}") for key, item in named.items()},
            }
        if isinstance(node, Mapping):
            bad = [key for key in node if not isinstance(key, str)]
            if bad:
                raise InputError(f"a dictionary key is {bad[0]!r}, not a string", where=path)
            kind = "ordered_dict" if isinstance(node, collections.OrderedDict) else "dict"
            return {"kind": kind, "items": {key: walk(item, f"{path}[{key!r}]") for key, item in node.items()}}
        if isinstance(node, (list, tuple)):
            kind = "list" if isinstance(node, list) else "tuple"
            return {"kind": kind, "items": [walk(item, f"{path}[{i}]") for i, item in enumerate(node)]}
        raise InputError(
            f"holds a {type(node).__name__}, which a bundle can't describe",
            where=path,
            hint="Use tensors, numbers, strings, lists, tuples, dictionaries, named tuples or dataclasses",
        )

    return walk(tree, where), tensors


def _fields(node: Any) -> tuple[str, dict[str, Any]] | None:
    """Named fields of a named tuple, a dataclass or a model output."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return "namedtuple", dict(zip(node._fields, node, strict=True))
    if isinstance(node, collections.OrderedDict) and type(node) is not collections.OrderedDict:
        return "record", dict(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return "record", {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    return None


def builder(structure: Structure) -> Callable[[list[Any]], Any]:
    """A function from flat tensors to the nested value. What can be decided once is decided here."""
    kind = structure["kind"]
    if kind == "tensor":
        index: int = structure["index"]
        return lambda tensors: tensors[index]
    if kind == "constant":
        value = structure["value"]
        return lambda tensors: value
    items = structure["items"]
    if kind in ("list", "tuple"):
        parts = [builder(item) for item in items]
        if kind == "list":
            return lambda tensors: [part(tensors) for part in parts]
        return lambda tensors: tuple([part(tensors) for part in parts])
    named = {key: builder(item) for key, item in items.items()}
    if kind in ("dict", "ordered_dict"):
        collect = dict if kind == "dict" else collections.OrderedDict
        return lambda tensors: collect([(key, part(tensors)) for key, part in named.items()])
    make = _constructor(structure)
    return lambda tensors: make(**{key: part(tensors) for key, part in named.items()})


def _constructor(structure: Structure) -> Callable[..., Any]:
    """The original class if this process has it already, else a stand-in. A bundle never causes an import."""
    path, fields = structure["class"], list(structure["items"])
    module_name, _, qualname = path.rpartition(".")
    found: Any = sys.modules.get(module_name)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and _takes_fields(found):
        return found
    if structure["kind"] == "namedtuple":
        return collections.namedtuple(qualname, fields)
    return type(qualname, (Record,), {"__module__": module_name})


def _takes_fields(cls: type) -> bool:
    return hasattr(cls, "_fields") or dataclasses.is_dataclass(cls)


def flatten(structure: Structure, tree: Any, where: str) -> list[Any]:
    """The tensors of `tree` in the order of `structure`.

    Raises:
        InputError: `tree` nests otherwise, or a constant differs from the one captured.
    """
    flat: dict[int, Any] = {}
    for kind, expected, found, path in _pairs(structure, tree, where):
        if kind == "tensor":
            flat[expected] = found
        elif kind == "constant" and not (expected is found or expected == found):
            raise InputError(
                f"the model was captured with {expected!r}, not {found!r}",
                where=path,
                hint="Optimize it again with this value",
            )
    return [flat[index] for index in sorted(flat)]


def _pairs(structure: Structure, tree: Any, path: str) -> Iterator[tuple[str, Any, Any, str]]:
    kind = structure["kind"]
    if kind == "tensor":
        yield kind, structure["index"], tree, path
        return
    if kind == "constant":
        yield kind, structure["value"], tree, path
        return
    items = structure["items"]
    if isinstance(items, list):
        if not isinstance(tree, (list, tuple)) or len(tree) != len(items):
            raise InputError(f"expected a {kind} of {len(items)}, found {_shown(tree)}", where=path)
        for i, (item, found) in enumerate(zip(items, tree, strict=True)):
            yield from _pairs(item, found, f"{path}[{i}]")
        return
    found = _fields(tree)
    named = found[1] if found else tree
    if not isinstance(named, Mapping) or set(named) != set(items):
        raise InputError(f"expected fields {sorted(items)}, found {_shown(tree)}", where=path)
    for key, item in items.items():
        yield from _pairs(item, named[key], f"{path}.{key}")


def output_names(outputs: Structure, count: int) -> list[str]:
    """A name for each of `count` flat outputs: its path in what the model returns."""
    names = [f"output{i}" for i in range(count)]

    def walk(node: Structure, path: str) -> None:
        if node["kind"] == "tensor":
            names[outputs["positions"][node["index"]]] = path or "output"
        elif node["kind"] != "constant":
            items = node["items"]
            for key, item in items.items() if isinstance(items, Mapping) else enumerate(items):
                walk(item, f"{path}.{key}" if path else str(key))

    walk(outputs, "")
    return names


def _shown(tree: Any) -> str:
    if isinstance(tree, Mapping):
        return f"fields {sorted(map(str, tree))}"
    if isinstance(tree, (list, tuple)):
        return f"a {type(tree).__name__} of {len(tree)}"
    return f"a {type(tree).__name__}"
