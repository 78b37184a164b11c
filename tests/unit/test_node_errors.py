"""Errors per node: what a layer adds alone, what is carried along, and where it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import armopt
from armopt.accuracy import nodes
from armopt.accuracy.nodes import NodeError
from armopt.errors import InputError
from tests.planning import plan, programs


class Three(nn.Module):
    """A convolution, a Linear whose weights BF16 holds exactly, and one on inputs that BF16 holds exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.exact, self.signs = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.exact.weight.copy_(self.exact.weight.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu().permute(0, 2, 3, 1)
        return self.signs(self.exact(y).sign())


def errors(model: nn.Module, x: Tensor, kernel: str = "") -> dict[str, NodeError]:
    recipe, planned = plan(model, x)
    (program,) = recipe.lower_part(planned)
    return {error.node: error for error in nodes.errors(program, planned.prepared.graph_module, [x])}


@pytest.fixture(scope="module")
def found() -> dict[str, NodeError]:
    torch.manual_seed(0)
    return errors(Three().eval(), torch.randn(2, 3, 8, 8))


def test_every_layer_in_order(found: dict[str, NodeError]) -> None:
    assert list(found) == ["conv", "exact", "signs"]
    assert [error.kernel for error in found.values()] == ["conv_bf16", "conv1x1_bf16", "conv1x1_bf16"]


def test_the_first_layer_carries_what_it_adds(found: dict[str, NodeError]) -> None:
    first = found["conv"]
    assert first.isolated == pytest.approx(first.cumulative)
    # weights, inputs and results are rounded, each with an error of 2^-9 / sqrt(3) of a value or so
    assert 2**-10 < first.isolated < 2**-7


def test_alone_a_layer_is_the_planned_one_on_fp32s_inputs(found: dict[str, NodeError]) -> None:
    torch.manual_seed(0)
    model, x = Three().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = model.conv(x).relu().permute(0, 2, 3, 1)
        wanted = model.exact(before)
        rounded = torch.nn.functional.linear(
            before.bfloat16().float(), model.exact.weight, model.exact.bias.bfloat16().float()
        )
        error = (rounded.bfloat16().float() - wanted).norm() / wanted.norm()
    assert found["exact"].isolated == pytest.approx(float(error), rel=1e-3)
    assert found["exact"].cumulative > found["exact"].isolated


def test_where_it_comes_from(found: dict[str, NodeError]) -> None:
    assert found["exact"].weights == 0.0
    assert found["exact"].comes_from == "activations"
    signs = found["signs"]
    assert 0 < signs.weights < signs.isolated
    assert NodeError("n", "linear", "k", "bf16", (), 0.1, 0.1, 0.1, 0.05).comes_from == "weights"
    assert NodeError("n", "linear", "k", "bf16", (), 0.1, 0.1, 0.1, 0.09).comes_from == "both"
    assert NodeError("n", "linear", "k", "fp32", (), 0.0, 0.1, 0.0, 0.0).comes_from == "-"


def test_a_model_without_such_layers_is_named() -> None:
    torch.manual_seed(0)
    first, second = Three().eval(), nn.Sequential(nn.Conv2d(3, 16, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    (program,) = programs(first, x)
    _, other = plan(second, x)
    with pytest.raises(InputError, match="has no layer conv"):
        nodes.errors(program, other.prepared.graph_module, [x])


def test_state_stays_as_it_was() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.fc(x) * self.calls

    model = Counter().eval()
    recipe, planned = plan(model, torch.ones(64, 4))
    (program,), prepared = recipe.lower_part(planned), planned.prepared.graph_module
    first = nodes.errors(program, prepared, [torch.ones(64, 4)])
    assert first == nodes.errors(program, prepared, [torch.ones(64, 4)])
    assert float(prepared.calls) == 0.0


def test_validate_ranks_them(mlp_bundle: Path, mlp: nn.Module) -> None:
    report = armopt.validate(mlp_bundle, against=mlp)
    alone = [entry["isolated"] for entry in report["nodes"]]
    assert alone == sorted(alone, reverse=True)
    assert {entry["node"] for entry in report["nodes"]} == {"first", "second"}
    assert report["node_bucket"] in report["outputs"]
    # without the original, weights count as they are stored
    own = armopt.validate(mlp_bundle)
    assert {entry["weights"] for entry in own["nodes"]} == {0.0}
