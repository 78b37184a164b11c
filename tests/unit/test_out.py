"""Results written where their caller wants them: `run(…, out=…)`."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import armopt
from armopt.errors import InputError
from armopt.kernels.onednn import primitives
from tests.allocations import Made

pytestmark = pytest.mark.filterwarnings("ignore::armopt.ArmoptWarning")


class Two(nn.Module):
    """One result of a layer, one of an operation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.second(torch.relu(self.first(x)))
        return {"y": y, "sum": y.sum(0)}


def loaded(model: nn.Module, x: torch.Tensor, path: Path, **options: Any) -> Any:
    armopt.optimize(model.eval(), (x,), output=path, target="host", policy="threshold=1", **options)
    return armopt.load(path)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    return loaded(model, random(8, 32), tmp_path_factory.mktemp("out") / "chain", batch=(1, 8))


def test_results_are_those_of_a_call(tmp_path: Path) -> None:
    model, x = loaded(Two(), random(4, 32), tmp_path / "b"), random(4, 32, seed=1)
    wanted = model(x)
    out = {"y": torch.full((4, 16), 7.0), "sum": torch.full((16,), 7.0)}
    assert model.run(x, out=out) is out
    assert all(torch.equal(out[name], wanted[name]) for name in wanted)
    # and a call that gives none has results of its own again
    again = model(random(4, 32, seed=2))
    assert again["y"].data_ptr() != out["y"].data_ptr()
    assert torch.equal(out["y"], wanted["y"])


def test_a_steady_call_makes_no_tensor(chain: Any, tmp_path: Path) -> None:
    if isinstance(found := primitives.api(), str):
        pytest.skip(f"NOT TESTED: {found}")
    one_size = loaded(nn.Sequential(nn.Linear(32, 64), nn.Sigmoid(), nn.Linear(64, 32)), random(8, 32), tmp_path / "b")
    for model, rows in ((one_size, 8), (chain, 8), (chain, 1), (chain, 3)):
        x = random(rows, 32)
        out = model(x)
        model.run(x, out=out)
        with Made() as made:
            model.run(x, out=out)
        # hosts that multiply in BF16 cast what comes in and goes out: of any size that makes tensors
        assert set(made.operations) <= (set() if model is one_size else {"aten._to_copy.default"})


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_any_size(chain: Any, rows: int) -> None:
    x, out = random(rows, 32, seed=rows), torch.empty(rows, 32)
    chain.run(x, out=out)
    assert torch.equal(out, chain(x))


def test_an_input_may_be_where_the_result_goes(chain: Any) -> None:
    x = random(8, 32)
    wanted = chain(x.clone())
    assert torch.equal(chain.run(x, out=x), wanted)


def test_a_tensor_that_lies_otherwise_is_copied_to(chain: Any) -> None:
    x, out = random(8, 32), torch.empty(32, 8).T
    assert torch.equal(chain.run(x, out=out), chain(x))


@pytest.mark.parametrize("rows", [8, 3])
def test_a_tensor_is_the_callers_alone_afterwards(chain: Any, rows: int) -> None:
    """Whatever size is called next, nothing keeps its memory."""
    out = torch.empty(rows, 32)
    chain.run(random(rows, 32), out=out)
    kept = weakref.ref(out)
    del out
    gc.collect()
    assert kept() is None


def test_threads_have_their_own(chain: Any) -> None:
    wanted = [chain(random(8, 32, seed=i)) for i in range(4)]

    def call(i: int) -> bool:
        x, out = random(8, 32, seed=i), torch.empty(8, 32)
        return all(torch.equal(chain.run(x, out=out), wanted[i]) for _ in range(100))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(call, range(4)))


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (torch.empty(8, 31), "expected float32 8x32, found float32 8x31"),
        (torch.empty(8, 32, dtype=torch.float64), "found float64 8x32"),
        (torch.empty(1, 32).expand(8, 32), "can't be written to"),
        (3, "expected a tensor, found a int"),
        ([torch.empty(8, 32)], "out, tensor 0: expected a tensor, found a list"),
    ],
    ids=["shape", "dtype", "expanded", "no tensor", "nested"],
)
def test_what_does_not_fit(chain: Any, out: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        chain.run(random(8, 32), out=out)


def test_portable_twins_too(tmp_path: Path, mlp_bundle: Path, mlp_inputs: tuple[torch.Tensor, ...]) -> None:
    model = armopt.load(mlp_bundle)
    wanted = model(*mlp_inputs)
    out = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    model.run(*mlp_inputs, out=out)
    assert all(torch.equal(out[name], wanted[name]) for name in wanted)
