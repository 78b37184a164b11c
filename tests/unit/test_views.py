"""Views of what layers give are made once for each call at a time: right, not copies, not what a caller gets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from armopt.kernels.onednn import pointwise, primitives, views
from armopt.runtime import bind
from tests.own_programs import found_api, lowered, random

_aten = torch.ops.aten


@pytest.fixture(scope="module", autouse=True)
def api() -> primitives.Api:
    return found_api()


class Attention(nn.Module):
    """Views of one result by split, reshape and transpose; one reshape that has to copy; one view is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.second = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows, count, width = x.shape
        parts = (each.view(rows, count, 4, 16).transpose(1, 2) for each in self.qkv(x).split(64, -1))
        y = nn.functional.scaled_dot_product_attention(*parts)
        z = torch.relu(self.out(y.transpose(1, 2).reshape(rows, count, width)))
        return self.second(z.mT.reshape(rows, count, width)), self.second(x).view(-1)


@pytest.fixture(scope="module")
def attention() -> tuple[nn.Module, fx.GraphModule]:
    model = Attention().eval()
    return model, bind.Binder(False).bind(lowered(model, random(2, 5, 64)))[0]


def test_views_leave_the_calls(attention: tuple[nn.Module, fx.GraphModule]) -> None:
    called = [getattr(node.target, "__name__", "") for node in attention[1].graph.nodes]
    assert "split" not in called
    assert called.count("transpose") == 1  # of four in the model, the one of attention's result
    assert called.count("reshape") == 3  # that of attention's result, the one that copies, and what the caller gets


def test_each_call_sees_its_own_values(attention: tuple[nn.Module, fx.GraphModule]) -> None:
    model, module = attention
    inputs = [random(2, 5, 64, seed=seed) for seed in range(16)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        alone = [module(x) for x in inputs]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(module, inputs))
    for wanted, *found in zip(expected, alone, together, strict=True):
        for each in found:
            # FP32 sums of 64 terms in another order
            torch.testing.assert_close(tuple(each), wanted, rtol=1e-5, atol=1e-6)


def test_another_number_of_threads_has_views_of_its_own(attention: tuple[nn.Module, fx.GraphModule]) -> None:
    model, module = attention
    x, before = random(2, 5, 64, seed=3), torch.get_num_threads()
    with torch.no_grad():
        module(random(2, 5, 64, seed=4))
        torch.set_num_threads(before + 1)
        try:
            torch.testing.assert_close(tuple(module(x)), model(x), rtol=1e-5, atol=1e-6)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("target", "arguments", "shown"),
    [
        (_aten.transpose.int, (0, 1), True),
        (_aten.split.Tensor, (2,), True),
        (_aten.reshape.default, ([-1],), True),
        (_aten.relu_.default, (), False),
        (_aten.relu.default, (), False),
        (_aten.clone.default, (), False),
        (_aten.dropout.default, (0.5, False), False),
    ],
    ids=str,
)
def test_what_is_a_view(target: torch._ops.OpOverload, arguments: tuple[object, ...], shown: bool) -> None:
    graph = fx.Graph()
    layer = graph.placeholder("layer")
    node = graph.call_function(target, (layer, *arguments))
    assert (node in views.find(graph, {layer: 0}, {0: torch.zeros(4, 4)})) is shown


def test_a_reshape_that_copies_is_no_view_and_one_behind_an_in_place_function_is() -> None:
    graph = fx.Graph()
    layer = graph.placeholder("layer")
    same = graph.call_function(_aten.relu_.default, (layer,))
    turned = graph.call_function(_aten.transpose.int, (same, 0, 1))
    copied = graph.call_function(_aten.reshape.default, (turned, [-1]))
    found = views.find(graph, {layer: 0}, {0: torch.zeros(4, 4)})
    assert turned in found
    assert copied not in found


def test_gelu_behind_a_convolution_gets_what_onednn_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch gives oneDNN what is contiguous; anything else it works out by itself, for more."""
    monkeypatch.setattr(pointwise, "FUNCTIONS", frozenset())

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is _aten.gelu_.default:
                contiguous.append(args[0].is_contiguous())
            return func(*args, **(kwargs or {}))

    contiguous: list[bool] = []
    model, image = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GELU(), nn.Conv2d(16, 8, 3)).eval(), random(1, 3, 16, 16)
    module, _ = bind.Binder(False).bind(lowered(model, image))
    with torch.no_grad(), Seen():
        found = module(image)[0]
    assert contiguous == [True]
    # FP32 sums of 144 terms in another order
    torch.testing.assert_close(found, model(image), rtol=1e-5, atol=1e-5)
