from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import armopt.kernels  # noqa: F401
from armopt.bundle import codec, graph_file, schema
from armopt.bundle.program import Program
from armopt.errors import BundleError, CaptureError
from armopt.ir.graph import shown_name

aten = torch.ops.aten


def program(build: Any, **weights: torch.Tensor) -> Program:
    graph, root = fx.Graph(), nn.Module()
    for name, tensor in weights.items():
        root.register_buffer(name, tensor)
    graph.output((build(graph, graph.placeholder("x"), *[graph.get_attr(name) for name in weights]),))
    return Program({"batch": 2}, fx.GraphModule(root, graph), {}, {})


def decode(content: Any, weights: Mapping[str, torch.Tensor]) -> Program:
    return codec.decode(schema.convert(content, graph_file.StoredProgram, "graph.json"), weights, "graph.json")


def round_trip(source: Program) -> Program:
    data = json.loads(schema.encode(codec.encode(source)))
    weights = dict(source.graph_module.named_buffers())
    return decode(data, weights)


VALUES = {
    "none": None,
    "bool": True,
    "int": -3,
    "str": "same",
    "float": 0.1,
    "inf": math.inf,
    "minus inf": -math.inf,
    "complex": 1 + 2j,
    "list": [1, [2.5, None]],
    "text": "bij,bjk->bik",
    "dtype": torch.bfloat16,
    "memory_format": torch.channels_last,
    "layout": torch.strided,
    "device": torch.device("cpu"),
}


@pytest.mark.parametrize("name", VALUES)
def test_each_kind_of_argument_survives(name: str) -> None:
    source = program(lambda g, x: g.call_function(aten.add.Tensor, (x, VALUES[name]), {"alpha": VALUES[name]}))
    node = list(round_trip(source).graph_module.graph.nodes)[1]
    assert node.args[1] == VALUES[name]
    assert type(node.args[1]) is type(VALUES[name]) or isinstance(node.args[1], list)
    assert node.kwargs["alpha"] == VALUES[name]


def test_nan_survives() -> None:
    source = program(lambda g, x: g.call_function(aten.add.Tensor, (x, math.nan)))
    assert math.isnan(list(round_trip(source).graph_module.graph.nodes)[1].args[1])


def test_a_graph_survives_and_runs() -> None:
    def build(g: fx.Graph, x: fx.Node, w: fx.Node) -> fx.Node:
        parts = g.call_function(aten.split.Tensor, (x, 2, 1))
        part = g.call_function(operator.getitem, (parts, 1))
        return g.call_function(aten.cat.default, ([part, g.call_function(aten.mul.Tensor, (part, w))], 1))

    source = program(build, w=torch.randn(3, 2))
    again = round_trip(source)
    x = torch.randn(3, 4)
    assert torch.equal(again.graph_module(x)[0], source.graph_module(x)[0])
    names = [shown_name(n) for n in again.graph_module.graph.nodes]
    assert names == [n.name for n in source.graph_module.graph.nodes]
    assert again.bucket == {"batch": 2}


def test_a_weight_read_twice_is_held_once() -> None:
    def build(g: fx.Graph, x: fx.Node, w: fx.Node) -> fx.Node:
        return g.call_function(aten.add.Tensor, (w, g.get_attr("w")))

    again = round_trip(program(build, w=torch.ones(2)))
    assert len(list(again.graph_module.buffers())) == 1


def calling(target: str, *args: Any, **kwargs: Any) -> Program:
    """A program of one call."""
    call = {"name": "y", "op": "call", "target": target, "args": list(args), "kwargs": kwargs}
    return decode({"bucket": {}, "nodes": [{"name": "x", "op": "input"}, call], "output": [node("y")]}, {})


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default",
        "aten.from_file.out",
        "aten._from_file.default",
        "builtins.eval",
        "os.system",
        "operator.attrgetter",
        "operator.methodcaller",
        "torch.load",
        "math.prod",
        "aten.relu",
        "quantized.linear.default",
        "profiler._record_function_enter.default",
        "aten.__class__.default",
        "aten..",
        "",
        "prim.Print.default",
    ],
)
def test_what_is_not_on_the_list_is_refused(name: str) -> None:
    with pytest.raises(BundleError):
        calling(name)


def test_an_operation_this_torch_lacks_says_what_to_install() -> None:
    with pytest.raises(BundleError, match=r"aten\.no_such_thing\.default, which torch .* does not have\. Install"):
        calling("aten.no_such_thing.default")


def test_banned_operations_are_not_written_either() -> None:
    with pytest.raises(CaptureError, match=r"aten\.from_file\.default, which is not on the list"):
        codec.target_name(aten.from_file.default)
    with pytest.raises(CaptureError, match="print, which is no operation"):
        codec.target_name(print)


def test_an_argument_without_a_form_names_its_node() -> None:
    source = program(lambda g, x: g.call_function(aten.relu.default, (x, slice(0, 1))))
    with pytest.raises(CaptureError, match="node relu_default has an argument of type slice"):
        codec.encode(source)


def node(name: str) -> dict[str, str]:
    return {"kind": "node", "name": name}


GOOD: dict[str, Any] = {
    "bucket": {},
    "nodes": [
        {"name": "x", "op": "input"},
        {"name": "w", "op": "weight", "target": "w"},
        {"name": "y", "op": "call", "target": "aten.mul.Tensor", "args": [node("x"), node("w")]},
    ],
    "output": [node("y")],
}
WEIGHTS = {"w": torch.ones(2)}


def test_the_good_one_is_good() -> None:
    assert decode(GOOD, WEIGHTS).graph_module(torch.ones(2))[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "change",
    [
        {
            "nodes": [
                *GOOD["nodes"][:2],
                {"name": "y", "op": "call", "target": "aten.mul.Tensor", "args": [node("x"), node("z")]},
            ]
        },
        {"nodes": [{"name": "w", "op": "weight", "target": "missing"}]},
        {"nodes": [{"op": "input"}]},
        {
            "nodes": [
                {"name": "y", "op": "call", "target": "aten.relu.default", "args": [{"kind": "dtype", "name": "load"}]}
            ]
        },
        {
            "nodes": [
                {"name": "y", "op": "call", "target": "aten.relu.default", "args": [{"kind": "code", "name": "1"}]}
            ]
        },
        {"output": [node("nothing")]},
        {"output": 3},
    ],
)
def test_what_does_not_fit_is_an_error_of_ours(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError) as found:
        decode(GOOD | change, WEIGHTS)
    assert found.value.where.startswith("graph.json: ")  # and the place in it


@pytest.mark.parametrize(
    "change",
    [
        {
            "nodes": [
                {
                    "name": "y",
                    "op": "call",
                    "target": "aten.relu.default",
                    "args": [{"kind": "node", "name": "x", "b": 2}],
                }
            ]
        },
        {
            "nodes": [
                {"name": "y", "op": "call", "target": "aten.relu.default", "args": [{"kind": "float", "name": "much"}]}
            ]
        },
        {
            "nodes": [
                {"name": "y", "op": "call", "target": "aten.relu.default", "args": [{"kind": "device", "name": "moon"}]}
            ]
        },
    ],
    ids=["two keys", "float", "device"],
)
def test_other_exceptions_are_errors_of_ours_too(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        decode(GOOD | change, {"": torch.ones(1)} | WEIGHTS)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from(["x", "w", "y", "aten.relu.default", "os.system", "input", "node", "dtype", "float"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["kind", "kwargs", "shape", "source", "name", "op", "target", "args"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(_JSON, st.sampled_from(["nodes", "output", "args", "name", "op", "target"]))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_anything_in_a_graph_is_listed_operations_or_an_error_of_ours(value: Any, place: str) -> None:
    """Whatever stands in graph.json, nothing is called."""
    data = json.loads(json.dumps(GOOD))
    (data if place in data else data["nodes"][2])[place] = value
    try:
        found = decode(data, WEIGHTS)
    except BundleError:
        return
    for each in found.graph_module.graph.nodes:
        if each.op == "call_function":
            codec.target_name(each.target)
