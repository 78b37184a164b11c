"""PyTorch's operations write to places in the arena: the same bits, nothing allocated, nothing that a caller got."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from armopt.bundle.program import Program
from armopt.kernels.onednn import primitives
from armopt.runtime import bind, memory
from tests.allocations import Made
from tests.own_programs import found_api, lowered, random

_functional = nn.functional


@pytest.fixture(scope="module", autouse=True)
def api() -> primitives.Api:
    return found_api()


class Between(nn.Module):
    """An operation between two layers, which both read what the first gives."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.operation = nn.Linear(16, 16), nn.Linear(16, 16), operation

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(self.operation(y)) - y


def bound(program: Program) -> fx.GraphModule:
    return bind.Binder(False).bind(program)[0]


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda y: y + y.flip(0),
    "numbers": lambda y: (3 - y * 2) / 5 + 1,
    "clamp": lambda y: y.clamp(-1, 1).pow(2),
    "exp": lambda y: y.exp().sqrt(),
    "joined": lambda y: torch.cat([y, y * 2], 1)[:, 8:24],
    "stacked": lambda y: torch.stack([y, y.sin()]).sum(0),
    "softmax": lambda y: _functional.softmax(y, -1),
    "mean": lambda y: y - y.mean(-1, keepdim=True),
    "products": lambda y: (y @ y.mT) @ y,
    "turned": lambda y: y.mT.clone().mT * y.mT.contiguous().mT,
    "casts": lambda y: (y.to(torch.bfloat16) * 2).float(),
    "compared": lambda y: torch.where(y > 0, y, y * 0.1),
    "pooled": lambda y: _functional.avg_pool2d(y.view(1, 1, 4, 16), (1, 3), 1, (0, 1)).view(4, 16),
    "picked": lambda y: y.index_select(1, torch.arange(15, -1, -1)),
    "spread": lambda y: y.sum(1, keepdim=True).expand(4, 16),
    "in place": lambda y: (y * 2).relu_().add_(1),
    "halved": lambda y: _functional.interpolate(y.view(1, 1, 4, 16), size=(4, 16), mode="bilinear").view(4, 16),
    "normal": lambda y: _functional.layer_norm(y, (16,)) * y,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_are_the_same_bits(name: str) -> None:
    program = lowered(Between(OPERATIONS[name]), random(4, 16))
    assert program.results
    placed, plain = bound(program), bound(replace(program, results={}))
    for seed in range(4):  # the first call learns how results lie
        x = random(4, 16, seed=seed)
        found, expected = placed(x)[0], plain(x)[0]
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


def test_a_steady_call_allocates_its_outputs_alone() -> None:
    model = Between(lambda y: torch.softmax(torch.cat([y.exp(), y * 2], 1), -1)[:, :16].to(torch.bfloat16).float())
    module = bound(lowered(model, random(4, 16)))
    x, first = random(4, 16, seed=2), module(random(4, 16, seed=1))[0]
    with Made() as made:
        second = module(x)[0]
    assert made.operations == ["aten.sub.Tensor"]
    assert first.data_ptr() != second.data_ptr()


def test_what_a_caller_got_stays() -> None:
    module = bound(lowered(Between(OPERATIONS["joined"]), random(4, 16)))
    results = [module(random(4, 16, seed=seed))[0] for seed in range(5)]
    kept = [result.clone() for result in results]
    module(random(4, 16, seed=9))
    assert all(torch.equal(a, b) for a, b in zip(results, kept, strict=True))
    assert len({result.data_ptr() for result in results}) == len(results)


def test_calls_at_once_do_not_meet() -> None:
    module = bound(lowered(Between(OPERATIONS["softmax"]), random(4, 16)))
    inputs = [random(4, 16, seed=seed) for seed in range(64)]
    expected = [module(x)[0] for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: module(x)[0], inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_callers_tensor_is_written_to() -> None:
    module = bound(lowered(Between(OPERATIONS["exp"]), random(4, 16)))
    x, out = random(4, 16, seed=3), torch.empty(4, 16)
    expected = module(x)[0]
    with Made() as made:
        (found,) = module(x, [out])
    assert found is out
    assert torch.equal(out, expected)
    assert made.operations == []
    # one that lies otherwise is not taken, and the next call has a result of its own
    (other,) = module(x, [torch.empty(16, 4).mT])
    assert torch.equal(other, expected)
    assert module(x)[0] is not out


def test_the_arena_holds_them_too() -> None:
    program = lowered(Between(OPERATIONS["joined"]), random(4, 16))
    with_operations, each = memory.between_layers(program)
    layers_alone, _ = memory.between_layers(replace(program, results={}))
    assert layers_alone < with_operations <= each


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: (s.first(x), torch.exp(x) + 1),
        lambda s, x: (s.first(x), torch.cat([x * 2, x], 0).sinh()),
        lambda s, x: (s.first(torch.sin(x)), x.to(torch.float64).float()),
        lambda s, x: (s.first(x), torch.relu(x).clone() * torch.exp(x).mT.cos().mT),
    ],
)
def test_what_one_caller_gave_does_not_lay_out_what_the_next_one_gets(forward: Callable[..., Any]) -> None:
    """A result lies as its operands do, and callers may lay these out otherwise each time."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Any:
            return forward(self, x)

    program = lowered(Net(), random(4, 16))
    placed, plain = bound(program), bound(replace(program, results={}))
    x = random(4, 16)
    for given in (x.mT.contiguous().mT, x, x.expand(4, 16), random(4, 32)[:, ::2], x.mT.contiguous().mT, x):
        for found, wanted in zip(placed(given), plain(given), strict=True):
            assert torch.equal(found, wanted)
            assert found.stride() == wanted.stride()


def test_a_first_call_in_inference_mode_serves_later_ones_out_of_it() -> None:
    """Nothing may write to a tensor of that mode outside of it."""
    x = random(8, 16)
    module = bound(lowered(Between(lambda y: y.sin() + y), x))
    with torch.no_grad():
        with torch.inference_mode():
            (expected,) = module(x)
        assert torch.equal(module(x)[0], expected)
