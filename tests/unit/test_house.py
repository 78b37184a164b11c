"""Who may import whom: the drawing in docs/design.md is the code's, and small enough to be read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from radon.complexity import cc_visit

from benchmarks import house


def test_the_house_is_small_and_every_arrow_runs_down() -> None:
    below = house.imports()
    stories = house.floors(below)
    assert len(below) <= 25
    assert len(stories) <= 10
    floor = {room: i for i, rooms in enumerate(stories) for room in rooms}
    assert all(floor[other] < floor[room] for room, others in below.items() for other in others)


def test_the_drawing_is_the_codes() -> None:
    """Regenerate it with: python -m benchmarks.house --write."""
    stories = house.floors(house.imports())
    content = house.PAGE.read_text()
    assert house.page(content, house.text(stories, house.imports())) == content
    assert house.PICTURE.read_text() == house.svg(stories, house.imports())


def test_a_circle_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"circle of imports among \['a', 'b'\]"):
        house.floors({"a": frozenset({"b"}), "b": frozenset({"a"}), "c": frozenset()})


@pytest.mark.parametrize("folder", ["armopt", "passes"])
def test_no_function_is_too_long_to_be_followed(folder: str) -> None:
    """radon counts conditions inside expressions too, which ruff's C901 does not."""
    files = sorted((house.ROOT / folder).rglob("*.py"))
    assert files
    knotted = [f"{path}:{block.lineno} {block.name} {block.complexity}" for path in files for block in _functions(path)]
    assert knotted == []


def _functions(path: Path) -> list[Any]:
    blocks = cc_visit(path.read_text())
    return [block for block in blocks if type(block).__name__ == "Function" and block.complexity > 15]


# --- tests use what is public ---------------------------------------------------------------------

OURS = ("armopt", "benchmarks", "passes")
#: Private names that tests use all the same, and why.
USED = {"unit/test_public_api.py: armopt._version": "the range of torch that pyproject.toml repeats has no other name"}


def test_no_test_uses_a_private_name() -> None:
    """Of a module or an object of armopt's. What a test needs is an interface: it gets a public name or a parameter."""
    tests = house.ROOT / "tests"
    attributes = {name for folder in OURS for path in (house.ROOT / folder).rglob("*.py") for name in _attributes(path)}
    assert "_checker" in attributes
    found = [
        f"{path.relative_to(tests)}: {name}"
        for path in sorted(tests.rglob("*.py"))
        for name in _private_names(ast.parse(path.read_text()), attributes)
    ]
    assert found == list(USED)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from armopt.bundle import _reader", ["armopt.bundle._reader"]),
        ("from passes._pack import weight", ["passes._pack"]),
        ("import benchmarks._house", ["benchmarks._house"]),
        ("from armopt.runtime import bind\nbind._alternatives()", ["bind._alternatives"]),
        ("import armopt.runtime as r\nr.load._models", ["r.load._models"]),
        ("from armopt import Model\nModel(1)._held.size", ["Model(1)._held"]),
        ("from armopt import load\nmodel = load(path)\nmodel._held", ["model._held"]),
        ("from armopt.runtime import load\npatch.setattr(load, '_models', None)", ["load._models"]),
        ("patch.setattr('armopt.runtime.load._models', None)", ["armopt.runtime.load._models"]),
        ("import torch\ntorch._held\nself._held\nmodel._other\nmodel.__dict__\nf(_held)", []),
        ("from torch import _dynamo\nfrom armopt import load\nload.models\npatch.setattr(x, 'y', None)", []),
    ],
)
def test_how_private_names_are_found(source: str, found: list[str]) -> None:
    assert list(_private_names(ast.parse(source), {"_held"})) == found


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in OURS


def _attributes(path: Path) -> Iterator[str]:
    """Private attributes and methods of the classes in a file."""
    for owner in ast.walk(ast.parse(path.read_text())):
        for node in ast.walk(owner) if isinstance(owner, ast.ClassDef) else ():
            match node:
                case (
                    ast.FunctionDef(name=name)
                    | ast.AnnAssign(target=ast.Name(id=name))
                    | ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store())
                ) if _is_private(name):
                    yield name


def _private_names(tree: ast.Module, attributes: set[str]) -> Iterator[str]:
    """Those of armopt's that a test imports, reads or puts something else in the place of.

    Args:
        tree: The test.
        attributes: Private ones of armopt's objects: a test's local names don't tell what they are.
    """
    ours, others = set[str](), {"self"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for each in node.names:
                path = f"{module}.{each.name}".strip(".")
                (ours if _is_ours(path) else others).add(each.asname or each.name.split(".")[0])
                if _is_ours(path) and _is_private(path):
                    yield module if _is_private(module) else path
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name) if _is_private(name):
                root = _root(value)
                if root in ours or (name in attributes and root not in others):
                    yield f"{ast.unparse(value)}.{name}"
            case ast.Call(
                func=ast.Attribute(attr="setattr"), args=[ast.Name(id=owner), ast.Constant(value=str(name)), *_]
            ):
                if owner in ours and _is_private(name):
                    yield f"{owner}.{name}"
            case ast.Call(func=ast.Attribute(attr="setattr"), args=[ast.Constant(value=str(name)), *_]):
                if _is_ours(name) and _is_private(name):
                    yield name


def _root(value: ast.expr) -> str:
    """The name that an expression of attributes, calls and items begins with."""
    while isinstance(value, ast.Attribute | ast.Call | ast.Subscript):
        value = value.func if isinstance(value, ast.Call) else value.value
    return value.id if isinstance(value, ast.Name) else ""
