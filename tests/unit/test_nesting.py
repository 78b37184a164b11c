from __future__ import annotations

import collections
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armopt.errors import InputError
from armopt.ir import nesting


class Leaf:
    """Stands for a tensor."""

    def __repr__(self) -> str:
        return "leaf"  # without its address, which would be another in each process that collects these tests


class Point(NamedTuple):
    y: Any
    x: Any


@dataclass
class Output:
    logits: Any
    hidden: Any = None


@dataclass
class ModelOutput(collections.OrderedDict):
    """As Hugging Face's: a dataclass and an ordered dictionary of what is not None."""

    logits: Any = None
    attentions: Any = None

    def __post_init__(self) -> None:
        for name in ("logits", "attentions"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


def is_leaf(value: Any) -> bool:
    return isinstance(value, Leaf)


def read(content: Any) -> nesting.Structure:
    return msgspec.convert(content, nesting.Structure)  # type: ignore[call-overload, no-any-return]


def written(structure: nesting.Structure) -> Any:
    return json.loads(json.dumps(msgspec.to_builtins(structure)))


def round_trip(tree: Any) -> tuple[nesting.Structure, list[Any], Any]:
    """Through JSON, as in a bundle."""
    described, leaves = nesting.describe(tree, is_leaf, "output")
    stored = read(written(described))
    return stored, leaves, nesting.builder(stored)(leaves)


@pytest.mark.parametrize(
    "tree",
    [
        Leaf(),
        (Leaf(), [Leaf(), None], {"b": Leaf(), "a": 1.5}),
        Point(Leaf(), (Leaf(),)),
        Output(Leaf(), {"deep": [Leaf()]}),
        [],
        {},
        ((),),
        {"self": Leaf(), "a b": True, "class": "text"},
    ],
    ids=repr,
)
def test_what_is_described_is_built_again(tree: Any) -> None:
    stored, leaves, built = round_trip(tree)
    assert built == tree
    assert type(built) is type(tree)
    assert nesting.flatten(stored, tree, "output") == leaves


_TREES = st.recursive(
    st.builds(Leaf)
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(Point, inner, inner)
        | st.builds(Output, inner, inner)
    ),
    max_leaves=12,
)


@given(_TREES)
@settings(max_examples=100, deadline=None)
def test_any_tree_survives(tree: Any) -> None:
    stored, leaves, built = round_trip(tree)
    assert built == tree
    assert nesting.flatten(stored, tree, "output") == leaves
    assert nesting.describe(built, is_leaf, "output")[0] == stored


def test_the_order_of_fields_is_the_models() -> None:
    """y before x: sorted by name, a named tuple would be taken apart the wrong way round."""
    _, leaves, built = round_trip(Point(Leaf(), Leaf()))
    y, x = built
    assert [y, x] == leaves


def test_a_model_output_keeps_its_class_and_leaves_out_none() -> None:
    stored, leaves, built = round_trip(ModelOutput(logits=Leaf()))
    assert type(built) is ModelOutput
    assert (built.logits, built.attentions) == (leaves[0], None)
    assert list(written(stored)["items"]) == ["logits"]


def test_a_class_that_is_not_at_hand_gets_a_stand_in() -> None:
    stored, leaves, _ = round_trip({"point": Point(Leaf(), 2), "record": Output(Leaf(), None)})
    content = written(stored)
    for item in content["items"].values():
        item["class"] = "some.package.never.imported.Thing"
    built = nesting.builder(read(content))(leaves)
    assert built["point"]._fields == ("y", "x")
    assert (built["point"].y, built["point"][1]) == (leaves[0], 2)
    record = built["record"]
    assert type(record).__name__ == "Thing"
    assert record.logits is record["logits"] is record[0] is leaves[1]
    assert record.to_tuple() == (leaves[1],)
    with pytest.raises(AttributeError):
        record.nothing  # noqa: B018


@pytest.mark.parametrize("path", ["os.system", "builtins.eval", "subprocess.Popen", "nowhere", "pathlib.Path"])
@pytest.mark.parametrize("kind", ["record", "namedtuple"])
def test_a_class_name_never_reaches_what_is_no_record(path: str, kind: str) -> None:
    """A bundle names classes: none but those made of fields is ever called."""
    stored = {"kind": kind, "class": path, "items": {"a": {"kind": "constant", "value": "touch /tmp/armopt-was-here"}}}
    built = nesting.builder(read(stored))([])
    assert built == ({"a": "touch /tmp/armopt-was-here"} if kind == "record" else ("touch /tmp/armopt-was-here",))


@pytest.mark.parametrize(
    ("tree", "where"),
    [({1: Leaf()}, "output"), ([{"a": object()}], "output[0]['a']"), ({"s": {1, 2}}, "output['s']"), (b"x", "output")],
)
def test_what_can_not_be_described_is_named(tree: Any, where: str) -> None:
    with pytest.raises(InputError) as found:
        nesting.describe(tree, is_leaf, "output")
    assert found.value.where == where


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"x": 1, "mode": "fast", "pair": (1, 2)}, "inputs.mode: the model was captured with 'exact', not 'fast'"),
        ({"x": 1, "mode": "exact", "pair": (1,)}, "inputs.pair: expected a tuple of 2, found a tuple of 1"),
        ({"x": 1, "mode": "exact", "pair": 3}, "inputs.pair: expected a tuple of 2, found a int"),
        ({"x": 1, "mode": "exact"}, "inputs: expected fields ['mode', 'pair', 'x'], found fields ['mode', 'x']"),
        ([1, 2, 3], "inputs: expected fields ['mode', 'pair', 'x'], found a list of 3"),
    ],
)
def test_what_does_not_fit_is_named(tree: Any, message: str) -> None:
    described, _ = nesting.describe({"x": Leaf(), "mode": "exact", "pair": (Leaf(), Leaf())}, is_leaf, "inputs")
    with pytest.raises(InputError) as found:
        nesting.flatten(described, tree, "inputs")
    assert str(found.value).startswith(message)


def test_output_names_are_paths() -> None:
    described, _ = nesting.describe({"a": (Leaf(), Output(Leaf())), "b": 1}, is_leaf, "output")
    assert nesting.output_names(nesting.Outputs(described, (0, 2)), 3) == ["a.0", "output1", "a.1.logits"]
    assert nesting.output_names(nesting.Outputs(nesting.Tensor(0), (0,)), 1) == ["output"]


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["class", "x"], ("_0", "x")),
        (["__import__('os').system('touch pwned')", "x"], ("_0", "x")),
        (["_make", "x"], ("_0", "x")),
    ],
)
def test_names_that_python_can_not_take_become_numbers(names: list[str], shown: tuple[str, ...]) -> None:
    """Of a named tuple's fields Python makes source text."""
    items = {name: {"kind": "tensor", "index": i} for i, name in enumerate(names)}
    built = nesting.builder(read({"kind": "namedtuple", "class": "nowhere.lambda", "items": items}))([1, 2])
    assert (built._fields, tuple(built)) == (shown, (1, 2))


@pytest.mark.parametrize("name", ["a\nb", "x; import os", "", "a b"])
def test_a_class_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        read({"kind": "record", "class": name, "items": {}})


@pytest.mark.parametrize("index", [1, -1, 1 << 40])
def test_tensors_have_to_be_numbered_in_order(index: int) -> None:
    content = {"tree": {"kind": "tensor", "index": index}, "positions": [0]}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(content, nesting.Outputs)
