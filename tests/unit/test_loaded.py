"""What a user of nn.Module expects of a loaded bundle: it does it, or says what it is instead."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import armopt
from armopt.errors import BundleError, InputError
from armopt.kernels import table

Pair = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", armopt.ArmoptWarning)
        yield


@pytest.fixture
def model(mlp_bundle: Path) -> Any:
    return armopt.load(mlp_bundle)


def test_it_is_short_to_look_at(model: Any, host_bundle: Path) -> None:
    found = re.fullmatch(r"<armopt Model for graviton3 at batch 2; batch 64: (.+); portable twins>", repr(model))
    assert found
    kernels = [part.split() for part in found[1].split(", ")]  # which they are depends on the release of torch
    assert sum(int(count) for count, _ in kernels) == 4
    assert all(table.get(kernel) for _, kernel in kernels)
    assert repr(armopt.load(host_bundle)).endswith("native kernels>")


def test_what_serves_a_module_serves_a_bundle(model: Any, mlp_inputs: Pair) -> None:
    served = model.eval().to("cpu").to(torch.device("cpu")).train(False).cpu().requires_grad_(False)
    assert served is model
    assert not model.training
    assert model.to(mlp_inputs[0].device) is model


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.train(), "a bundle can't be trained"),
        (lambda m: m.requires_grad_(), "a bundle can't be trained"),
        (lambda m: m.to("cuda"), "runs on the CPU, not on cuda"),
        (lambda m: m.to("meta"), "runs on the CPU, not on meta"),
        (lambda m: m.to(torch.bfloat16), r"can't be converted to torch\.bfloat16"),
        (lambda m: m.to("cpu", torch.float64), r"can't be converted to torch\.float64"),
    ],
)
def test_what_it_cannot_do_is_said(model: Any, call: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        call(model)


@pytest.mark.parametrize("name", ["parameters", "state_dict", "register_forward_hook", "half", "named_modules"])
def test_what_only_a_module_has_is_named(model: Any, name: str) -> None:
    with pytest.raises(AttributeError, match=f"no '{name}': it is no torch.nn.Module"):
        getattr(model, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        model.nothing  # noqa: B018


def test_pickled_it_is_loaded_again(model: Any, mlp_inputs: Pair) -> None:
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(*mlp_inputs)["logits"], model(*mlp_inputs)["logits"])
    assert len(pickle.dumps(model)) < 1000


def run(model: Any, inputs: Pair) -> torch.Tensor:
    """What a worker does with a model that it was given."""
    found: torch.Tensor = model(*inputs)["logits"]
    return found


@pytest.mark.slow
def test_a_spawned_worker_takes_it(model: Any, mlp_inputs: Pair) -> None:
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        found = pool.submit(run, model, mlp_inputs).result()
    assert torch.equal(found, model(*mlp_inputs)["logits"])


def test_a_bundle_that_is_gone_or_another_is_named(mlp: nn.Module, mlp_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(mlp_bundle, path)
    kept = pickle.dumps(armopt.load(path))
    shutil.rmtree(path)
    with pytest.raises(BundleError, match="bundle"):
        pickle.loads(kept)
    armopt.optimize(nn.Linear(4, 4).eval(), (torch.ones(2, 4),), output=path)
    with pytest.raises(BundleError, match="another bundle is in its place"):
        pickle.loads(kept)


class Divided(nn.Module):
    """A model that can't be captured whole."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return y if float(y.sum()) > 0 else -y


def test_a_model_of_parts_too(tmp_path: Path) -> None:
    model, x = Divided().eval(), torch.randn(3, 8)
    armopt.optimize(model, [(x,)], kind="module", output=tmp_path / "b")
    loaded = armopt.load(tmp_path / "b", model=Divided)
    assert loaded.eval() is loaded
    assert repr(loaded).startswith("<armopt ModuleModel for graviton3: 1 ")
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(x), loaded(x))
    with pytest.raises(InputError, match="Load it with model=factory"):
        pickle.dumps(armopt.load(tmp_path / "b", model=Divided()))


FORKED = """
import os, sys, warnings
import torch, armopt
warnings.simplefilter("ignore")
torch.set_num_threads(2)
model = armopt.load(sys.argv[1])
inputs = torch.randn(64, 16), torch.randn(8)
expected = model(*inputs)["logits"]
for how in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        if how == "one thread":
            torch.set_num_threads(1)
        try:
            if how == "a load more":
                model = armopt.load(sys.argv[1])
            found = model(*inputs)["logits"]
            print("right" if torch.allclose(found, expected) else "wrong", flush=True)
        except armopt.HostError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_a_forked_child_does_not_wait_for_ever(host_bundle: Path) -> None:
    wanted = {
        "two threads": "loaded before this process was forked.*Load bundles in the workers alone",
        "a load more": "can't be loaded in a process that was forked.*Load bundles in the workers alone",
        "one thread": "right",
    }
    words = [sys.executable, "-c", FORKED, str(host_bundle), *wanted]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    for found, said in zip(done.stdout.splitlines(), wanted.values(), strict=True):
        assert re.search(said, found), found
