"""Decomposing what a program reaches gives what decomposing with all of torch's operations gives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import exported_program

from armopt import capture
from armopt.capture import decompositions


class Of(nn.Module):
    """A function, with a convolution, its norm and a Linear to make it a model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(36, 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.function(self.norm(self.conv(x)).relu_()).flatten(1))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "moved": lambda x: x.transpose(1, 2).contiguous().reshape(2, 4, 3, 3).expand_as(x),
    "divided": lambda x: torch.cat(x.chunk(2, 1)).unflatten(0, (2, 2)).flatten(1, 2),
    "cast": lambda x: x.to(torch.float64).to(torch.float32).to("cpu"),
    "dropped": lambda x: nn.functional.dropout(nn.functional.dropout(x, training=False), training=False, inplace=True),
    "whole": lambda x: nn.functional.layer_norm(torch.matmul(x, x), (3, 3)) + torch.einsum("abcd->abdc", x).softmax(1),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x, x, x),
    "written": lambda x: x.clone().clamp_(0, 1).mul_(2),
}  # fmt: skip
#: What is left to torch: composites that write, and graphs in a graph.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "squared": lambda x: x.clone().square_(),
    "branch": lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
}


def program(function: Callable[[Tensor], Tensor]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(Of(function).eval(), (torch.randn(2, 3, 5, 5),), strict=False)


@pytest.mark.parametrize("name", [*FUNCTIONS, *OTHERS])
def test_it_is_what_torch_gives(name: str) -> None:
    made = program((FUNCTIONS | OTHERS)[name])
    assert (decompositions.reached(made) is None) == (name in OTHERS)
    with torch.no_grad():
        expected = made.run_decompositions({})
    assert str(decompositions.without_writes(made).graph) == str(expected.graph)


def test_other_threads_see_all_of_torchs_operations() -> None:
    seen: list[int] = []
    collect = exported_program._collect_all_valid_cia_ops
    with decompositions.showing(frozenset()):
        look = threading.Thread(target=lambda: seen.append(len(exported_program._collect_all_valid_cia_ops())))
        look.start()
        look.join()
        assert exported_program._collect_all_valid_cia_ops() == set()
    assert seen == [len(collect())]


def test_a_torch_without_that_function_is_asked_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(vars(exported_program))
    monkeypatch.delattr(exported_program, "_collect_all_valid_cia_ops")
    with decompositions.showing(frozenset()):
        assert set(vars(exported_program)) == before - {"_collect_all_valid_cia_ops"}


@pytest.mark.parametrize(
    ("hop", "options"),
    [
        (16, {}),
        (16, {"win_length": 48, "window": torch.hann_window(48) + 0.1, "normalized": True, "length": 420}),
        (20, {"center": False}),
        (16, {"window": torch.hann_window(64), "length": 300}),
    ],
)
@pytest.mark.parametrize("shape", [(2, 400), (400,)])
def test_an_inverse_short_time_transform_needs_no_data(shape: tuple[int, ...], hop: int, options: Any) -> None:
    class Filtered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.stft(x, 64, hop, return_complex=True, window=torch.ones(64))
            return torch.istft(z * 0.5, 64, hop, **options)

    model, x = Filtered().eval(), torch.randn(shape)
    captured = capture.module(model, (x,))
    called = {str(node.target) for node in captured.graph_module.graph.nodes}
    assert "aten.istft.default" not in called
    (found,), expected = captured.graph_module(x), model(x)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # FP32 sums in another order
