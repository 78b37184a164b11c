"""`armopt.compile` checks what it gives against the module itself, and repairs it, as `optimize` does with a bundle."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import armopt
from armopt import Checks
from armopt.errors import ArmoptWarning, InputError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS: dict[str, Any] = {"policy": "threshold=1", "target": "graviton3"}
X = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))


class Cancelled(nn.Module):
    """A bias of three hundred that is taken away again: in BF16 three hundred has steps of two."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 8)
        with torch.no_grad():
            self.up.bias.add_(300.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x) - 300))


class Deciding(nn.Module):
    """Python decides on data: the parts are compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Cancelled()

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.inner(x)
        return {"y": y if float(y.sum()) > 0 else -y, "n": 3, "s": "text"}


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        self.mean.mul_(0.5).add_(y.mean(0))
        return y + self.mean


@pytest.fixture
def model() -> Cancelled:
    torch.manual_seed(0)
    return Cancelled().eval()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def run(module: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        found: Any = module(x)
    return found["y"] if isinstance(found, dict) else found


def reasons(module: nn.Module) -> list[str]:
    return [layer.reason for layer in armopt.explain(module).layers if layer.reason.startswith("repaired: ")]


@pytest.mark.parametrize("release", [False, True])
def test_what_bf16_breaks_is_repaired(model: Cancelled, release: bool) -> None:
    wanted, other = run(model), run(model, X[:7])
    made = armopt.compile(model, (X,), release_original=release, **OPTIONS)
    assert cosine(wanted, run(made)) > 0.999
    outcome: Any = made.forward.outcome  # type: ignore[attr-defined]
    assert outcome.validation.passed
    assert outcome.repair.said.startswith("1 layer repaired")
    assert len(reasons(made)) == 1
    assert cosine(other, run(made, X[:7])) > 0.999  # another graph, of another size
    assert len(reasons(made)) == 2


def test_without_checks_nothing_is_compared(model: Cancelled) -> None:
    wanted = run(model)
    for made in (armopt.compile(model, (X,), checks=None, **OPTIONS), armopt.compile(model, **OPTIONS)):
        assert cosine(wanted, run(made)) < 0.9
        assert made.forward.outcome is None  # type: ignore[attr-defined]


def test_the_first_call_is_checked_where_that_is_asked_for(model: Cancelled) -> None:
    wanted = run(model)
    made = armopt.compile(model, checks=Checks(first_call=True), **OPTIONS)
    assert cosine(wanted, run(made)) > 0.999
    outcome: Any = made.forward.outcome  # type: ignore[attr-defined]
    assert outcome.repair.passed
    run(made, X[:5])
    assert made.forward.outcome is outcome  # type: ignore[attr-defined]


def test_changed_weights_keep_the_repair(model: Cancelled) -> None:
    made = armopt.compile(model, (X,), **OPTIONS)
    model.load_state_dict({name: 1.01 * tensor for name, tensor in model.state_dict().items()})
    assert cosine(run(model), run(made)) > 0.99


def test_a_copy_is_checked_at_its_first_call(model: Cancelled) -> None:
    wanted = run(model)
    made = armopt.compile(model, (X,), **OPTIONS)
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert cosine(wanted, run(again)) > 0.999
        assert again.forward.outcome is not None


def test_parts_are_repaired_where_the_model_is_divided() -> None:
    torch.manual_seed(0)
    model = Deciding().eval()
    wanted = run(model)
    made = armopt.compile(model, (X,), **OPTIONS)
    assert made.forward.divided  # type: ignore[attr-defined]
    assert cosine(wanted, run(made)) > 0.999
    assert len(reasons(made)) == 1


def test_a_gate_that_fails_is_a_warning(model: Cancelled) -> None:
    with pytest.warns(ArmoptWarning, match=r"Cancelled as compiled is not the model: cosine is .*the gate is >=0\.99"):
        made = armopt.compile(model, (X,), checks=Checks(repair=False), **OPTIONS)
    assert not made.forward.outcome.validation.passed  # type: ignore[attr-defined]
    with pytest.warns(ArmoptWarning, match="There is no repair: the gates fail with every layer in FP32 too"):
        armopt.compile(model, (X,), checks=Checks(gates=("max_abs<0",)), **OPTIONS)


def test_buffers_and_random_numbers_stay_as_they_were() -> None:
    torch.manual_seed(0)
    model = Remembering().eval()
    before = torch.get_rng_state()
    made = armopt.compile(model, (X,), **OPTIONS)
    assert float(model.mean.abs().sum()) == 0.0  # type: ignore[operator]
    assert torch.equal(torch.get_rng_state(), before)
    assert made.forward.outcome.validation.passed  # type: ignore[attr-defined]


def test_random_numbers_are_the_same_on_both_sides() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(nn.functional.dropout(y + torch.randn_like(y)))

    torch.manual_seed(0)
    made = armopt.compile(Noisy().eval(), (X,), **OPTIONS)
    outcome: Any = made.forward.outcome  # type: ignore[attr-defined]
    assert outcome.validation.passed
    assert outcome.repair is None


def test_what_can_not_be_compared_is_said() -> None:
    class Nan(Cancelled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.nan

    with pytest.warns(ArmoptWarning, match="Nan was not compared with FP32: gives nothing but NaN"):
        made = armopt.compile(Nan().eval(), (X,), **OPTIONS)
    assert run(made).isnan().all()


def test_settings_of_bundles_alone_are_refused(model: Cancelled) -> None:
    for checks, what in (
        (Checks(inputs={"x": X}), r"checks\.inputs: a compiled model is checked on its example inputs"),
        (Checks(against="capture"), r"checks\.against: a compiled model has no capture"),
        (Checks(gates=("cosin>=1",)), "unknown metric 'cosin'"),
    ):
        with pytest.raises(InputError, match=what):
            armopt.compile(model, (X,), checks=checks, **OPTIONS)


def test_nothing_is_said_where_all_holds() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArmoptWarning)
        armopt.compile(nn.Sequential(nn.Linear(32, 8)).eval(), (X,), **OPTIONS)


class Quantized(nn.Module):
    def __init__(self, last: Any) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(32, 8), last

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.fc(x))
        return result


@pytest.mark.parametrize(
    "last",
    [lambda y: torch.quantize_per_tensor(y, 0.01, 0, torch.qint8), lambda y: y.relu().to_sparse()],
    ids=["quantized", "sparse"],
)
def test_results_that_are_not_plain_tensors_are_compared_by_what_they_stand_for(last: Any) -> None:
    model = Quantized(last).eval()
    compiled: Any = armopt.compile(model, (X,), **OPTIONS)
    (entry,) = compiled.forward.outcome.validation.entries
    assert 0.999 < entry.cosine < 1
    assert compiled(X).layout is model(X).layout
    assert compiled(X).is_quantized == model(X).is_quantized
