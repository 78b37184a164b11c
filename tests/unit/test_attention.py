"""Attention as primitives of its own, with the oneDNN of this machine's PyTorch."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import armopt
from armopt.bundle import reader
from armopt.bundle.program import Program
from armopt.kernels.onednn import attention, primitives
from armopt.kernels.onednn.attention import Attention, Wanted, is_quicker
from armopt.kernels.onednn.attention_any_size import AnyAttention
from armopt.kernels.onednn.workspaces import Workspaces
from armopt.plan.threshold_policy import ThresholdPolicy
from armopt.runtime import attend, bind
from tests.own_programs import found_api, lowered, random, wrong_at_once
from tests.planning import programs

Tensor = torch.Tensor
WANTED = Wanted(2, 3, 40, 24, 16, 8, torch.float32, 0.3)


@pytest.fixture(scope="module", autouse=True)
def api() -> primitives.Api:
    return found_api()


class Net(nn.Module):
    """One layer of attention of four heads; a mask is an input, a constant, or none."""

    def __init__(self, *, causal: bool = False, constant: Tensor | None = None, scale: float | None = None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.causal, self.scale = causal, scale
        self.constant = constant

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mask = self.constant if mask is None else mask
        y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))


def bound(program: Program) -> torch.fx.GraphModule:
    """Bound as where BLAS has no product in BF16, so that attention of any size is quicker as primitives."""
    return bind.Binder(False, bf16_attention=False).bind(program)[0]


def is_own(module: torch.fx.GraphModule) -> bool:
    return all(node.target is not functional.scaled_dot_product_attention for node in module.graph.nodes)


TOKENS = 12
LOWER = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
MASKS: dict[str, tuple[Callable[[], Net], tuple[Tensor, ...]]] = {
    "none": (Net, ()),
    "another scale": (lambda: Net(scale=0.3), ()),
    "causal": (lambda: Net(causal=True), ()),
    "a constant": (lambda: Net(constant=random(4, TOKENS, TOKENS)), ()),
    "a constant of booleans": (lambda: Net(constant=LOWER), ()),
    "a constant that hides nothing": (lambda: Net(constant=torch.ones(TOKENS, TOKENS, dtype=torch.bool)), ()),
    "an input": (Net, (random(3, 1, 1, TOKENS),)),
    "an input with minus infinity": (Net, (torch.zeros(TOKENS, TOKENS).masked_fill(~LOWER, -math.inf),)),
    "an input of booleans": (Net, (LOWER.expand(3, 1, -1, -1).clone(),)),
    "an input that hides all from one": (Net, (LOWER & (torch.arange(TOKENS) > 0),)),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_program_gives_what_pytorch_gives(name: str) -> None:
    make, given = MASKS[name]
    torch.manual_seed(0)
    net, x = make().eval(), random(3, TOKENS, 32)
    module = bound(lowered(net, x, *given))
    assert is_own(module)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(module(x, *given)[0], net(x, *given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_in_bf16_too(name: str) -> None:
    make, given = MASKS[name]
    torch.manual_seed(0)
    net, x = make().eval(), random(3, TOKENS, 32)
    (program,) = programs(net, x, *given, policy=ThresholdPolicy(1))
    module = bound(program)
    if not is_own(module):
        pytest.skip("NOT TESTED: this core has no code for products in BF16")
    with torch.no_grad():
        expected = net(x, *given)
        found = module(x, *given)[0]
    assert (found - expected).norm() < 1e-2 * expected.norm()


def test_heads_may_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part takes its part of a mask."""
    x, mask = random(3, TOKENS, 32), random(3, 4, TOKENS, TOKENS)
    program = lowered(Net(), x, mask)
    whole = bound(program)(x, mask)[0]
    size = 4 * TOKENS * TOKENS
    for heads in (1, 2, 4, 12):
        monkeypatch.setattr(attention, "SCORES", heads * size)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        torch.testing.assert_close(bound(program)(x, mask)[0], whole, rtol=1e-5, atol=1e-5)


def test_parts_are_of_whole_batches_or_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = replace(WANTED, batch=4, heads=6)
    size = 4 * wanted.queries * wanted.keys
    found = []
    for heads in (1, 2, 4, 5, 6, 11, 12, 23, 24, 99):
        monkeypatch.setattr(attention, "SCORES", heads * size)
        found.append(wanted.together(1))
    assert found == [1, 2, 3, 3, 6, 6, 12, 12, 24, 24]


@pytest.mark.parametrize("kind", ["float", "bool"])
def test_nan_comes_out_where_pytorch_gives_it(kind: str) -> None:
    x = random(3, TOKENS, 32)
    x[1, 4, 3] = math.nan
    mask = LOWER if kind == "bool" else torch.zeros(TOKENS, TOKENS).masked_fill(~LOWER, -math.inf)
    for net, given in ((Net(), (mask,)), (Net(causal=True), ()), (Net(), ())):
        module = bound(lowered(net, x, *given))
        assert is_own(module)
        with torch.no_grad():
            assert torch.equal(module(x, *given)[0].isnan(), net(x, *given).isnan())


@pytest.mark.parametrize("heads_first", [False, True])
def test_a_result_lies_as_that_of_pytorch(heads_first: bool) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: Tensor, k: Tensor) -> Tensor:
            q = self.q(x)
            q, k = (q, k) if heads_first else (q.transpose(1, 2), k.transpose(1, 2))
            return functional.scaled_dot_product_attention(q, k, k)

    net, x, k = Bare().eval(), random(2, 10, 10, 8), random(2, 10, 10, 8)
    module = bound(lowered(net, x, k))
    assert is_own(module)
    with torch.no_grad():
        found, expected = module(x, k)[0], net(x, k)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Grouped(nn.Module):
    """More heads of queries than of keys."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return functional.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True)


class OfThree(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("part", [Grouped(), OfThree()])
def test_other_attention_is_left_to_pytorch(part: nn.Module) -> None:
    net, x = nn.Sequential(nn.Linear(32, 32), part).eval(), random(2, TOKENS, 32)
    module = bound(lowered(net, x))
    assert not is_own(module)
    with torch.no_grad():
        torch.testing.assert_close(module(x)[0], net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_small_attention_is_left_to_openblas(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_wide_vectors", lambda: wide)

    def taken(dtype: torch.dtype, keys: int, *, multiplies_bf16: bool) -> bool:
        return is_quicker(replace(WANTED, dtype=dtype, keys=keys), multiplies_bf16=multiplies_bf16)

    assert [taken(torch.bfloat16, keys, multiplies_bf16=True) for keys in (32, 49, 64)] == [False, not wide, True]
    assert [taken(torch.float32, keys, multiplies_bf16=True) for keys in (32, 64, 256)] == [False, not wide, True]
    assert all(taken(dtype, 8, multiplies_bf16=False) for dtype in (torch.bfloat16, torch.float32))
    assert not is_quicker(replace(WANTED, queries=1, keys=512), multiplies_bf16=False)  # a step of decoding
    assert not is_quicker(replace(WANTED, queries=2048, keys=2048), multiplies_bf16=False)  # 16 MB of scores a head


def test_wrong_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = attend.Planned(WANTED)
    made = attend.make(planned, multiplies_bf16=False)
    assert made is not None
    assert attend.refusal(planned, made) is None
    said = attend.refusal(replace(planned, wanted=replace(WANTED, scale=0.31)), made)
    assert said is not None
    assert "wrong numbers" in said
    monkeypatch.setattr(attend, "refusal", lambda planned, made: "gives wrong numbers")
    net, x = Net().eval(), random(3, TOKENS, 32)
    module = bound(lowered(net, x))
    assert not is_own(module)
    with torch.no_grad():
        torch.testing.assert_close(module(x)[0], net(x), rtol=1e-5, atol=1e-5)


def test_threads_run_one_program_at_once() -> None:
    module = bound(lowered(Net(), random(3, TOKENS, 32)))
    assert not wrong_at_once(module, [(random(3, TOKENS, 32, seed=seed),) for seed in range(4)])


def test_a_call_makes_nothing(api: primitives.Api) -> None:
    """Memory of calls lies in a workspace, which calls share one after the other, or where the caller wants it."""
    made, workspaces = Attention(api, WANTED), Workspaces()
    workspaces.layers.append(made)
    workspaces.arena, workspaces.places = made.size, {0: 0}
    q, k, v = random(2, 3, 40, 16), random(2, 3, 24, 16), random(2, 3, 24, 8)
    workspace, call = workspaces.take(), made.function(0)
    found = call(workspace, q, k, v)
    exact = (q.double() @ k.double().mT * WANTED.scale).softmax(-1) @ v.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert call(workspace, q, k, v) is found
    out = torch.zeros_like(found)
    workspace.arguments[0].lend(out)
    assert call(workspace, q, k, v) is out
    assert torch.equal(out, found)
    workspace.arguments[0].lend(torch.zeros(2, 3, 40, 8))  # which lies otherwise
    assert call(workspace, q, k, v) is found


class Layers(nn.Module):
    """Two layers of attention, one with a mask of booleans, one causal, of any number of sentences and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.masked, self.causal = Net(), Net(causal=True)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        mask = (torch.arange(x.shape[1]) < length[:, None])[:, None, None]
        return self.causal(torch.relu(self.masked(x, mask)))


@pytest.fixture(scope="module")
def of_any_size() -> tuple[nn.Module, Program]:
    """Sentences and tokens are dynamic."""
    torch.manual_seed(0)
    net, dynamic = Layers().eval(), {"x": {0: "batch", 1: "tokens"}, "length": {0: "batch"}}
    x, length = random(3, TOKENS, 32), torch.tensor([12, 5, 9])
    folder = Path(tempfile.mkdtemp())
    exported = torch.export.export(net, (x, length), dynamic_shapes=named(dynamic))
    torch.export.save(exported, folder / "model.pt2")
    armopt.optimize(folder / "model.pt2", target="host", output=folder / "bundle", policy="threshold=1000000")
    (program,) = reader.read(folder / "bundle").programs
    shutil.rmtree(folder)
    return net, program


def named(dynamic: dict[str, dict[int, str]]) -> dict[str, dict[int, Any]]:
    dims = {"batch": torch.export.Dim("batch", max=64), "tokens": torch.export.Dim("tokens", max=512)}
    return {name: {at: dims[dim] for at, dim in each.items()} for name, each in dynamic.items()}


SIZES = [(3, TOKENS), (1, 40), (5, 8), (2, 7), (3, TOKENS), (2, 300), (1, 40)]


def test_attention_of_any_size(of_any_size: tuple[nn.Module, Program]) -> None:
    """Seven queries are left to PyTorch; 300 tokens need more memory than was planned."""
    net, program = of_any_size
    module = bound(program)
    assert is_own(module)
    for batch, tokens in SIZES:
        x, length = random(batch, tokens, 32), torch.arange(batch) + tokens // 2
        with torch.no_grad():
            expected = net(x, length)
        assert (module(x, length)[0] - expected).norm() < 1e-2 * expected.norm()  # BF16 where this machine has it


def test_sizes_of_attention_are_forgotten(
    of_any_size: tuple[nn.Module, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Wanted] = []
    resized = Attention.resized
    monkeypatch.setattr(Attention, "resized", lambda self, wanted: (made.append(wanted), resized(self, wanted))[1])
    module = bound(of_any_size[1])
    for _ in range(2):
        for tokens in range(8, 70):
            module(random(1, tokens, 32), torch.tensor([tokens]))
    # one masked and one causal of each size, made anew once more than 32 were met since
    assert len(made) == 2 * 2 * len(range(8, 70))
    made.clear()
    module(random(1, 69, 32), torch.tensor([69]))
    assert not made


def test_threads_run_one_program_of_any_size_at_once(of_any_size: tuple[nn.Module, Program]) -> None:
    inputs = [(random(1 + i, 10 + 30 * i, 32), torch.arange(1 + i) + 8) for i in range(4)]
    assert not wrong_at_once(bound(of_any_size[1]), inputs)


def test_keys_of_another_number_of_images_are_left_to_pytorch(api: primitives.Api) -> None:
    """PyTorch spreads the one over the others, on either side."""
    workspaces = Workspaces()
    workspaces.layers.append(AnyAttention(Attention(api, WANTED), {}, 0, multiplies_bf16=False))
    call, workspace = workspaces.layers[0].function(0), workspaces.take()
    for batches in ((1, 3), (3, 1), (2, 2)):
        q, k = random(batches[0], 3, 40, 16), random(batches[1], 3, 24, 16)
        found = call(workspace, q, k, k)
        torch.testing.assert_close(found, (q @ k.mT * WANTED.scale).softmax(-1) @ k, rtol=1e-5, atol=1e-5)


class Given(nn.Module):
    """A learned query, and keys, values and a mask as the caller gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Parameter(random(1, 4, 10, 8)), nn.Linear(8, 8)

    def forward(self, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.out(functional.scaled_dot_product_attention(self.query, k, v, mask))


def test_what_a_bundle_is_given_or_holds_is_attended_to(tmp_path: Path) -> None:
    net, given = Given().eval(), (random(1, 4, 12, 8), random(1, 4, 12, 8), torch.arange(12) < torch.tensor([[9]]))
    armopt.optimize(net, given, target="host", output=tmp_path / "bundle", policy="threshold=1000000")
    module = bound(reader.read(tmp_path / "bundle").programs[0])
    assert is_own(module)
    with torch.no_grad():
        expected = net(*given)
    assert (module(*given)[0] - expected).norm() < 1e-2 * expected.norm()


def test_memory_that_is_made_in_inference_mode_serves_other_calls(of_any_size: tuple[nn.Module, Program]) -> None:
    """Nothing may write to a tensor of that mode outside of it."""
    fixed, of_any = bound(lowered(Net(), random(3, TOKENS, 32))), bound(of_any_size[1])
    length = torch.tensor([20, 9])
    with torch.no_grad():
        for module, given in ((fixed, (random(3, TOKENS, 32),)), (of_any, (random(2, 400, 32), length))):
            before = torch.get_num_threads()
            torch.set_num_threads(before + 1)  # for which there is no workspace yet
            try:
                with torch.inference_mode():
                    (expected,) = module(*given)
                assert torch.equal(module(*given)[0], expected)
            finally:
                torch.set_num_threads(before)
