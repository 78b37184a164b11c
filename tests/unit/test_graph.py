from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from armopt import capture
from armopt.errors import PassError
from armopt.ir import graph as g

aten = torch.ops.aten


@pytest.fixture
def graph_module() -> fx.GraphModule:
    return g.copy(capture.module(nn.Linear(4, 3).eval(), (torch.zeros(2, 4),)).graph_module)


def test_a_copy_has_its_own_graph_and_the_same_memory(graph_module: fx.GraphModule) -> None:
    again = g.copy(graph_module)
    before = str(graph_module.graph)
    for node in g.calls_to(again.graph, aten.linear.default):
        node.target = aten.relu.default
    assert str(graph_module.graph) == before
    ours, theirs = dict(graph_module.named_buffers()), dict(again.named_buffers())
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)


def test_inserted_calls_carry_true_metadata(graph_module: fx.GraphModule) -> None:
    layer = next(g.calls_to(graph_module.graph, aten.linear.default))
    node = g.insert_call(graph_module.graph, layer, aten.sum.dim_IntList, (layer.args[0], [1]), {"keepdim": True})
    assert (g.fake_value(node).shape, g.fake_value(node).dtype) == ((2, 1), torch.float32)


def test_a_graph_without_fake_tensors_says_so() -> None:
    with pytest.raises(PassError, match="no fake tensors"):
        g.fake_mode(fx.Graph())


def test_the_same_memory_is_registered_once(graph_module: fx.GraphModule) -> None:
    layer = next(g.calls_to(graph_module.graph, aten.linear.default))
    weight = graph_module.weight
    assert g.add_constant(graph_module, "again", weight.view(3, 4), layer).target == "weight"
    assert g.add_constant(graph_module, "again", weight.clone(), layer).target == "again"
    assert g.add_constant(graph_module, "again", weight.t(), layer).target == "again_1"
    empty = [g.add_constant(graph_module, "none", torch.zeros(0), layer).target for _ in range(2)]
    assert empty == ["none", "none_1"]


@pytest.mark.parametrize(("wanted", "name"), [("a.b", "a_b"), ("1x", "_1x"), ("", "_"), ("weight", "weight_1")])
def test_attribute_names_are_free_and_legal(graph_module: fx.GraphModule, wanted: str, name: str) -> None:
    assert g.attribute_name(graph_module, wanted) == name


def test_sweep_drops_what_nobody_reads_and_keeps_the_rest(graph_module: fx.GraphModule) -> None:
    layer = next(g.calls_to(graph_module.graph, aten.linear.default))
    dead = g.insert_call(graph_module.graph, layer, aten.relu.default, (layer.args[1],))
    g.insert_call(graph_module.graph, layer, aten.neg.default, (dead,))
    graph_module.register_buffer("unused", torch.zeros(1))
    g.remove_unused(graph_module)
    assert [n.op for n in graph_module.graph.nodes].count("call_function") == 1
    assert sorted(name for name, _ in graph_module.named_buffers()) == ["bias", "weight"]


def test_sweep_keeps_inputs_and_writes() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x * 2

    captured = capture.module(Counter(), (torch.zeros(2), torch.zeros(3)))
    graph_module = g.copy(captured.graph_module)
    g.remove_unused(graph_module)
    ops = [n.op for n in graph_module.graph.nodes]
    assert ops.count("placeholder") == 2
    assert any(n.target is aten.copy_.default for n in graph_module.graph.nodes)


def test_shapes_of_a_dynamic_batch() -> None:
    captured = capture.module(nn.Linear(4, 3).eval(), (torch.zeros(2, 4),), batch=(1, 8))
    node = next(g.calls_to(captured.graph_module.graph, aten.linear.default))
    (symbol,) = captured.symbols
    shape = g.fake_value(node).shape
    assert g.symbolic_shape(shape) == (symbol.expression, 3)
    assert g.shape_at(shape, captured.values({"batch": 5})) == (5, 3)
    assert g.shape_at([shape[0] * 2 + 1], captured.values({"batch": 5})) == (11,)
    assert g.shape_at(shape, {}) == (1, 3)  # a symbol that no input names
