from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from armopt import capture, passes
from armopt.errors import InputError, PassError
from armopt.ir import graph as g
from armopt.ir.records import PassResult, Skip
from armopt.passes import pipeline
from armopt.passes.remove_identities import RemoveIdentities


@pytest.fixture
def graph_module() -> fx.GraphModule:
    captured = capture.module(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.zeros(2, 4),))
    return g.copy(captured.graph_module)


def named(name: str, act: Callable[[fx.GraphModule], None]) -> passes.Pass:
    def call(self: object, graph_module: fx.GraphModule) -> PassResult:
        act(graph_module)
        return PassResult(graph_module, True, ("node",), (Skip("other", "why"),))

    return type(name, (), {"__call__": call})()  # type: ignore[no-any-return]


def _dangling(graph_module: fx.GraphModule) -> None:
    node = next(n for n in graph_module.graph.nodes if n.op == "call_function")
    graph_module.graph.inserting_before(node)
    node.prepend(next(iter(node.users)))


def _no_val(graph_module: fx.GraphModule) -> None:
    del next(n for n in graph_module.graph.nodes if n.op == "call_function").meta["val"]


def _call_module(graph_module: fx.GraphModule) -> None:
    graph_module.add_submodule("part", nn.ReLU())
    node = next(n for n in graph_module.graph.nodes if n.op == "call_function")
    with graph_module.graph.inserting_after(node):
        graph_module.graph.call_module("part", (node,))


def _other_constant(graph_module: fx.GraphModule) -> None:
    name = next(n for n in graph_module.graph.nodes if n.op == "get_attr").target
    setattr(graph_module, name, torch.zeros(9))


def _missing_constant(graph_module: fx.GraphModule) -> None:
    delattr(graph_module, next(n for n in graph_module.graph.nodes if n.op == "get_attr").target)


def _crash(graph_module: fx.GraphModule) -> None:
    raise ZeroDivisionError("by zero")


@pytest.mark.parametrize("act", [_dangling, _no_val, _call_module, _other_constant, _missing_constant, _crash])
def test_a_broken_pass_is_named_with_its_predecessors(graph_module: fx.GraphModule, act: Callable[..., None]) -> None:
    steps = (RemoveIdentities(), named("Harmless", lambda _: None), named("Broken", act), named("Never", _crash))
    with pytest.raises(PassError) as found:
        pipeline.run(graph_module, steps)
    assert found.value.where == "pass Broken (after RemoveIdentities, Harmless)"
    assert "report it" in found.value.hint
    assert found.value.exit_code == 1


def test_the_first_pass_has_no_predecessors(graph_module: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"pass Broken \(after nothing\): ZeroDivisionError: by zero"):
        pipeline.run(graph_module, (named("Broken", _crash),))


def test_an_error_for_the_user_is_left_as_it_is(graph_module: fx.GraphModule) -> None:
    def refuse(graph_module: fx.GraphModule) -> None:
        raise InputError("bad", where="model")

    with pytest.raises(InputError, match="model: bad"):
        pipeline.run(graph_module, (named("Refusing", refuse),))


def test_a_pass_error_names_its_pass_too(graph_module: fx.GraphModule) -> None:
    def fail(graph_module: fx.GraphModule) -> None:
        raise PassError("the graph has no fake tensors")

    with pytest.raises(PassError) as found:
        pipeline.run(graph_module, (named("Broken", fail),))
    assert "Broken" in str(found.value)


def test_the_record_says_what_each_did(graph_module: fx.GraphModule) -> None:
    _, records = pipeline.run(graph_module, (RemoveIdentities(), named("Second", lambda _: None)))
    assert [r.name for r in records] == ["RemoveIdentities", "Second"]
    assert (records[1].rewritten, records[1].skipped) == (("node",), (Skip("other", "why"),))


def test_the_order_is_one_visible_tuple() -> None:
    assert isinstance(passes.PREPARE, tuple)
    assert [type(step).__name__ for step in passes.PREPARE] == [
        "KeepStrides",
        "RemoveIdentities",
        "FillEmpty",
        "RelaxViews",
        "CanonicaliseSplit",
        "FoldConstants",
        "FuseAttention",
        "SplitRecurrence",
        "SplitExperts",
        "CanonicaliseContraction",
        "CanonicaliseLinear",
        "RestoreRows",
        "CanonicaliseConv",
        "CanonicaliseActivation",
        "FoldBatchNorm",
        "FusePointwise",
        "ConvertTransposedConv",
        "ConvertVolumeConv",
        "ConvertPixelConv",
        "MergeShortcut",
        "FoldStride",
        "MergeProjections",
    ]


def test_passes_make_no_code_until_the_graph_runs(
    graph_module: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch makes it anew after each pass, a seventh of the time of an optimization, and nobody runs it."""
    made: list[fx.Graph] = []
    of_torch = fx.Graph.python_code

    def counted(graph: fx.Graph, *args: object, **options: object) -> object:
        made.append(graph)
        return of_torch(graph, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(fx.Graph, "python_code", counted)
    prepared, records = pipeline.Pipeline().prepare(g.copy(graph_module))
    assert any(record.rewritten for record in records)
    assert not made
    x = torch.randn(2, 4)
    torch.testing.assert_close(prepared(x)[0], graph_module(x)[0])
    assert prepared.graph in made
