"""Which parts of a model become graphs where it can't be captured whole, and why the others stay Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armopt.capture import submodules
from armopt.errors import InputError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, by: Any = 1) -> Tensor:
        return self.layer(x) * (by if isinstance(by, int) else 1)


class Deciding(nn.Module):
    """Decides on a value, so that its layers are captured alone; the second is called as a function says."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], *, first: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8) if first else nn.Identity(), Scaled()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.second, self.first(x) if x.sum() < 1e9 else x)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda second, y: second(y) + second(y[None])[0], "its inputs have other ranks from call to call"),
        (lambda second, y: second(y, 2) + second(y, 3), "its inputs nest otherwise from call to call"),
        (lambda second, y: second(y, object()), "holds a object, which a bundle can't describe"),
        (lambda second, y: y, "it is not called as a module on the example inputs"),
    ],
)
def test_what_is_called_in_several_ways_stays_python(call: Callable[[nn.Module, Tensor], Tensor], reason: str) -> None:
    parts, left = submodules.find(Deciding(call).eval(), [((X,), {})], "here")
    assert "first" in [part.path for part in parts]
    assert reason in {skip.node: skip.reason for skip in left}["second"]


def test_layers_in_lists_are_found() -> None:
    class Listed(Deciding):
        def __init__(self) -> None:
            super().__init__(lambda second, y: second(y))
            self.more = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(8, 8)})])

        def forward(self, x: Tensor) -> Tensor:
            return self.more[0]["a"](super().forward(x))  # type: ignore[index]

    parts, _ = submodules.find(Listed().eval(), [((X,), {})], "here")
    assert [part.path for part in parts] == ["first", "second", "more.0.a"]


def test_a_model_without_any_graph_says_why() -> None:
    model = Deciding(lambda second, y: second.layer(y) + second.layer(y[None])[0], first=False).eval()
    with pytest.raises(InputError, match=r"here: nothing in the model can be captured: .*See docs/compile\.md"):
        submodules.find(model, [((X,), {})], "here")
