"""Memory that results share: no two that are needed at once, nothing that a caller gets, no allocation in a call."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from armopt.bundle.program import Program
from armopt.compiler.captured_model import capture_model
from armopt.compiler.recipe import Recipe
from armopt.ir import arena
from armopt.kernels.onednn import primitives
from armopt.plan.threshold_policy import ThresholdPolicy
from armopt.runtime import bind, memory, own
from tests.allocations import Made
from tests.own_programs import found_api, lowered, random

_aten = torch.ops.aten


def chain(length: int) -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(length):
        nodes.append(graph.call_function(torch.ops.aten.exp.default, (nodes[-1],)))
    return graph, nodes


def test_a_chain_takes_two_places() -> None:
    graph, nodes = chain(8)
    graph.output(nodes[-1])
    made = arena.plan(graph, dict.fromkeys(nodes[1:], 100))
    assert set(made.places) == set(nodes[1:-1])  # the last is the caller's
    assert set(made.places.values()) == {0, 128}
    assert made.size == 228


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_needed_at_once_never_overlaps(data: st.DataObject) -> None:
    graph = fx.Graph()
    nodes, sizes = [graph.placeholder("x")], {}
    shows = {nodes[0]: {nodes[0]}}
    for _ in range(data.draw(st.integers(1, 14))):
        sources = data.draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=2))
        if data.draw(st.booleans()):
            node = graph.call_function(_aten.view.default, (sources[0], [-1]))
            shows[node] = shows[sources[0]] | {node}
        else:
            node = graph.call_function(_aten.cat.default, (sources,))
            sizes[node] = data.draw(st.integers(1, 300))
            shows[node] = {node}
        nodes.append(node)
    given = data.draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=2))
    graph.output(given)
    made = arena.plan(graph, sizes)
    escaping = set().union(*(shows[node] for node in given))
    assert set(made.places) == set(sizes) - escaping
    # what is alive while each node runs: what it gives, and all that it or a later one reads
    for at, node in enumerate(nodes):
        later = {source for each in [node, *nodes[at + 1 :]] for source in each.all_input_nodes}
        alive = set().union({node}, *(shows[source] for source in later)) & set(nodes[: at + 1]) & set(made.places)
        taken = sorted((made.places[each], made.places[each] + sizes[each]) for each in alive)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(taken))
        assert all(end <= made.size and start % 64 == 0 for start, end in taken)


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (_aten.dropout.default, (0.5, False)),
        (_aten.reshape.default, ([-1],)),
        (_aten.split.Tensor, (2,)),
        (_aten.relu_.default, ()),
        (_aten.expand_as.default, ("x",)),
        (_aten.einsum.default, ()),
    ],
    ids=str,
)
def test_what_may_be_the_same_memory_stays_the_callers(target: object, arguments: tuple[object, ...]) -> None:
    graph, nodes = chain(1)
    first = [nodes[1]] if target is not _aten.einsum.default else ["ij->ji", [nodes[1]]]
    rest = [nodes[0] if each == "x" else each for each in arguments]
    graph.output(graph.call_function(target, (*first, *rest)))
    assert not arena.plan(graph, {nodes[1]: 8}).places


def test_what_is_turned_in_place_gets_no_place() -> None:
    graph, nodes = chain(1)
    turned = graph.call_function(_aten.t_.default, (nodes[1],))
    graph.output(graph.call_function(_aten.exp.default, (turned,)))
    assert not arena.plan(graph, {nodes[1]: 8}).places


# -- with the primitives of this machine's PyTorch


@pytest.fixture
def api() -> primitives.Api:
    return found_api()


def of_any_batch(model: nn.Module, *inputs: torch.Tensor, batch: tuple[int, ...]) -> Program:
    """The program of the first size."""
    recipe = Recipe.of("graviton2", ThresholdPolicy(1))
    return recipe.lower_part(recipe.plan_part(capture_model(model.eval(), inputs, batch=batch).parts[0]))[0]


class Net(nn.Module):
    """Layers in a chain, one whose result is read late, a view between two, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.first, self.second, self.third = nn.Linear(512, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        early = torch.relu(self.stem(x))
        y = self.first((torch.sigmoid(self.body(early)) + early).flatten(1))
        z = self.second(y)
        return self.third(torch.nn.functional.dropout(z, training=False)), z.view(-1)


@pytest.mark.usefixtures("api")
def test_layers_allocate_outputs_alone() -> None:
    model, x = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6))), random(4, 32)
    module, bound = bind.Binder(False).bind(lowered(model, x))
    assert all(each.implementation for each in bound)
    with Made() as made:
        module(x)
    assert made.operations == ["aten.empty_like.default"]


@pytest.mark.usefixtures("api")
def test_results_are_the_callers_own() -> None:
    model, images = Net().eval(), [random(2, 3, 8, 8, seed=i) for i in range(3)]
    module, _ = bind.Binder(False).bind(lowered(model, images[0]))
    given = [module(x) for x in images]
    for x, results in zip(images, given, strict=True):
        for found, wanted in zip(results, model(x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("api")
def test_an_input_may_change_between_calls() -> None:
    """Also in place, and also one that has the very same object, or the memory of an earlier one."""
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval(), random(4, 32)
    module, _ = bind.Binder(False).bind(lowered(model, x))
    module(x)
    x.mul_(2)
    torch.testing.assert_close(module(x)[0], model(x), rtol=1e-4, atol=1e-5)
    x.set_(random(4, 32, seed=5))
    torch.testing.assert_close(module(x)[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("api")
def test_sizes_that_fit_share_the_arena_of_the_planned_one() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8)).eval()
    module, _ = bind.Binder(False).bind(of_any_batch(model, random(8, 32), batch=(8, 64)))
    for count in (8, 3, 8, 20, 8, 1):
        x = random(count, 32, seed=count)
        torch.testing.assert_close(module(x)[0], model(x), rtol=1e-4, atol=1e-5)
    for count, results in ((3, 1), (20, 3)):
        x = random(count, 32)
        with Made() as made:
            module(x)
        assert made.operations == ["aten.empty_like.default"] * results


@pytest.mark.usefixtures("api")
def test_threads_have_arenas_of_their_own() -> None:
    model, images = Net().eval(), [random(2, 3, 8, 8, seed=i) for i in range(4)]
    module, _ = bind.Binder(False).bind(lowered(model, images[0]))
    expected = [module(x) for x in images]

    def call(i: int) -> bool:
        found = [module(images[i]) for _ in range(50)]
        return all(torch.equal(a, b) for each in found for a, b in zip(each, expected[i], strict=True))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(call, range(4)))


def _faults_of_a_call() -> tuple[int, int]:
    """Page faults of five calls of a program, and of its model, where malloc gives back to the system what it can."""
    trim, threshold = -1, -3
    malloc = ctypes.CDLL(None)
    malloc.mallopt(trim, 0)
    malloc.mallopt(threshold, 1 << 16)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)), nn.Linear(256, 1)).eval()
    x = random(1024, 256)
    module, _ = bind.Binder(False).bind(lowered(model, x))

    def faults(run: nn.Module) -> int:
        run(x)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            run(x)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with torch.no_grad():
        return faults(module), faults(model)


@pytest.mark.usefixtures("api")
def test_a_steady_call_makes_no_page_fault() -> None:
    """Memory that a call frees may go back to the system, and comes again page by page: an arena stays.

    In a process of its own: what other tests have freed would serve the model.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        ours, of_the_model = process.submit(_faults_of_a_call).result()
    # a result of 1 MB has 256 pages
    assert ours < 5 < 5 * 3 * 256 <= of_the_model


@pytest.mark.usefixtures("api")
def test_what_is_told_of_memory_is_what_a_call_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    program = lowered(nn.Sequential(*(nn.Linear(32, 32) for _ in range(6))), random(4, 32))
    planned, alone = memory.between_layers(program)
    assert (planned, alone) == (2 * 4 * 32 * 4, 6 * 4 * 32 * 4)
    finished = []
    finish = own.Calls.finish
    monkeypatch.setattr(own.Calls, "finish", lambda calls, *given: finished.append(given) or finish(calls, *given))
    bind.Binder(False).bind(program)
    assert planned in [size for size, *_ in filter(None, finished)]
