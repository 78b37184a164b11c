"""torch.compile(model, backend="armopt"): what Dynamo's graphs become."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import armopt
from armopt.dynamo import backend
from armopt.dynamo import graphs as dynamo_graphs
from armopt.errors import ArmoptWarning, InputError
from tests.sampling import sampled

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend=backend.backend, options={"target": "graviton3", **options})


class Block(torch.nn.Module):
    """A Linear, a convolution with its norm, a counter that is written to, and an input that is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(4, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm1d(8)
        self.fc = torch.nn.Linear(64, 96)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.add_(1)
        seen[:, 0] += 1
        return self.fc(self.norm(self.conv(x)).relu()), x.shape[0] * seen


def held_for(model: torch.nn.Module) -> list[dynamo_graphs.Weights]:
    """What was made for a model's own weights."""
    own = {id(tensor) for tensor in model.parameters()}
    return [
        weights
        for graph in dynamo_graphs.graphs()
        for weights in graph.held
        if own & {id(tensor) for tensor in weights.tensors}
    ]


@pytest.fixture
def block() -> torch.nn.Module:
    torch.manual_seed(0)
    return Block().eval()


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 4, 64, generator=generator), torch.zeros(batch, 3)


@pytest.mark.parametrize("target", ["graviton3", "graviton2", "host"])
def test_it_computes_what_the_model_does(block: torch.nn.Module, target: str) -> None:
    run = compiled(block, target=target, policy="threshold=1")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ArmoptWarning)
        for batch in (3, 5, 9, 1):
            (x, seen), (_, seen_too) = inputs(batch), inputs(batch)
            before = block.calls.item()
            y, counted = run(x, seen)
            assert block.calls.item() == before + 1
            expected, counted_too = block(x, seen_too)
            assert torch.equal(counted, counted_too)
            assert torch.equal(seen, seen_too)
            # BF16 has 8 bits: two layers' rounding stays within 2 % of the largest value
            torch.testing.assert_close(y, expected, atol=0.02 * float(expected.abs().max()), rtol=0)
            exact = target == "graviton2"
            assert torch.allclose(y, expected, atol=1e-5) == exact or target == "host"


def test_it_computes_bit_for_bit_what_a_bundle_does(
    mlp: torch.nn.Module, mlp_inputs: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    armopt.optimize(mlp, mlp_inputs, output=tmp_path / "b", target="graviton3", policy="threshold=1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ArmoptWarning)
        bundled = armopt.load(tmp_path / "b")(*mlp_inputs)
    with torch.no_grad():
        found = compiled(mlp, policy="threshold=1")(*mlp_inputs)
        plain = mlp(*mlp_inputs)
    for name in bundled:
        assert torch.equal(found[name], bundled[name])
        assert not torch.equal(found[name], plain[name])


@pytest.mark.slow
@pytest.mark.parametrize("shapes", sampled([60, 1000], 2))
def test_many_shapes_make_few_graphs_and_plans(block: torch.nn.Module, shapes: int) -> None:
    run = compiled(block, plans=4)
    with torch.no_grad():
        for batch in range(2, 1002, 1000 // shapes):
            run(*inputs(batch))
    assert counters["stats"]["unique_graphs"] <= 3
    plans = [len(weights.programs) for weights in held_for(block)]
    assert max(plans) == 4
    assert sum(plans) <= 9


def test_past_the_limit_the_nearest_plan_serves_and_is_right(block: torch.nn.Module) -> None:
    run = compiled(block, plans=1)
    with torch.no_grad():
        for batch in (2, 3, 400, 17):
            y, _ = run(*inputs(batch))
            expected, _ = block(*inputs(batch))
            torch.testing.assert_close(y, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("change", ["in place", "data", "load_state_dict", "assigned"])
def test_changed_weights_are_noticed(block: torch.nn.Module, change: str) -> None:
    run = compiled(block)
    with torch.no_grad():
        first, _ = run(*inputs(4))
        if change == "in place":
            block.fc.weight.mul_(2)
        elif change == "data":
            block.fc.weight.data = block.fc.weight.data * 2
        elif change == "load_state_dict":
            block.load_state_dict(
                {name: t * 2 if t.is_floating_point() else t for name, t in block.state_dict().items()}
            )
        else:
            block.fc.weight = torch.nn.Parameter(block.fc.weight * 2)
        second, _ = run(*inputs(4))
        expected, _ = block(*inputs(4))
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


def test_layers_that_share_code_have_weights_of_their_own() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU()).eval() for _ in range(4)]
    runs = [compiled(layer) for layer in layers]
    x = torch.randn(8, 32)
    with torch.no_grad():
        for _ in range(2):
            for layer, run in zip(layers, runs, strict=True):
                torch.testing.assert_close(run(x), layer(x), atol=0.02, rtol=0)


def test_weights_are_dropped_with_their_model(block: torch.nn.Module) -> None:
    run = compiled(block)
    with torch.no_grad():
        run(*inputs(2))
    (held,) = held_for(block)
    assert held.alive
    block.fc = torch.nn.Linear(64, 96)
    assert not held.alive
    assert held_for(block) == []


def test_training_falls_back_with_one_warning(block: torch.nn.Module) -> None:
    block.train()
    run = compiled(block)
    with torch.no_grad(), pytest.warns(ArmoptWarning, match="training mode.*eval") as said:
        results = [run(*inputs(batch))[0] for batch in (4, 5)]
    assert len([w for w in said if issubclass(w.category, ArmoptWarning)]) == 1
    assert all(torch.isfinite(y).all() for y in results)


def test_gradients_fall_back_with_one_warning_and_are_right(block: torch.nn.Module) -> None:
    run = compiled(block)
    x, seen = inputs(4)
    with pytest.warns(ArmoptWarning, match="gradients.*no_grad") as said:
        results = [run(x, seen)[0] for _ in range(2)]
    results[0].sum().backward()
    assert len([w for w in said if issubclass(w.category, ArmoptWarning)]) == 1
    found, block.fc.weight.grad = block.fc.weight.grad, None
    block(x, inputs(4)[1])[0].sum().backward()
    torch.testing.assert_close(found, block.fc.weight.grad)


def test_inference_mode(block: torch.nn.Module) -> None:
    with torch.inference_mode():
        y, _ = compiled(block)(*inputs(4))
        expected, _ = block(*inputs(4))
    torch.testing.assert_close(y, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nonsense": 1}, "unknown option 'nonsense'.*Known are target.*policy.*plans"),
        ({"target": "graviton33"}, "unknown target 'graviton33'"),
        ({"target": 3}, "target is a int"),
        ({"policy": "fast"}, "unknown policy 'fast'"),
        ({"plans": 0}, "plans is 0"),
    ],
)
def test_wrong_options_are_one_clear_error(block: torch.nn.Module, options: dict[str, Any], says: str) -> None:
    run = torch.compile(block, backend=backend.backend, options=options)
    with torch.no_grad(), pytest.raises(InputError, match=says):
        run(*inputs(2))


def test_there_are_no_modes(block: torch.nn.Module) -> None:
    with torch.no_grad(), pytest.raises(InputError, match="no mode 'max-autotune'"):
        torch.compile(block, backend=backend.backend, mode="max-autotune")(*inputs(2))


class Conditional(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.fc(x), lambda x: -x, (x,))


def test_control_flow_inside_a_graph_is_left_alone() -> None:
    model = Conditional().eval()
    x = torch.ones(3, 8)
    with torch.no_grad(), pytest.warns(ArmoptWarning, match="control flow"):
        torch.testing.assert_close(compiled(model)(x), model(x))


def test_a_graph_without_layers_costs_nothing() -> None:
    with torch.no_grad():
        assert torch.equal(compiled(lambda x: x * 2 + 1)(torch.ones(3)), torch.full((3,), 3.0))
    assert not [graph for graph in dynamo_graphs.graphs() if graph.name.startswith("test_dynamo")]
