from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Case, Contract, Forward, by_hand, noise, run_pass, seeded
from torch import Tensor, fx, nn

from armopt import capture
from armopt.capture import submodules
from armopt.compiler.recipe import Recipe
from armopt.ir import graph as g
from armopt.ir import strides
from armopt.passes import PREPARE, Pass
from armopt.passes.keep_strides import KeepStrides
from tests.sampling import sampled

_aten = torch.ops.aten
_CONTIGUOUS = "aten.contiguous.default"
_channels_last = {"memory_format": torch.channels_last}


def _conv(**more: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 6, 3, padding=1, **more)


class TestKeepStrides(Contract):
    folder = "keep_strides"
    tolerance = 0.0  # nothing is computed

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        assert isinstance(PREPARE[0], KeepStrides)
        return graph_module

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return KeepStrides()

    cases = (
        Case("output", lambda: Forward(lambda s, x: s.conv(x).relu(), conv=_conv()), (noise(2, 4, 5, 5),), rewritten=1),
        Case(
            "as_strided",
            lambda: Forward(lambda s, x: s.conv(x).as_strided((4, 8), (8, 1)).sum(1), conv=_conv()),
            (noise(2, 4, 5, 5),),
            ops={_CONTIGUOUS: 2},
            rewritten=2,
        ),
        Case(
            "views_again",  # what reads the convolution without looking at its strides stays as it was
            lambda: Forward(
                lambda s, x: (s.conv(x).flatten(2).chunk(2, 1)[1], s.last(s.conv(x)).mean((2, 3)) @ s.w),
                conv=_conv(),
                last=nn.Conv2d(6, 6, 1),
                w=noise(6, 6),
            ),
            (noise(2, 4, 5, 5),),
        ),
        Case(
            "channels_last",
            lambda: Forward(lambda s, x: s.conv(x), conv=_conv()),
            (noise(2, 4, 5, 5).contiguous(**_channels_last),),
            ops={_CONTIGUOUS: 1},
        ),
        Case(
            "permuted",
            lambda: Forward(lambda s, x: (x @ x).transpose(1, 2) * 2),
            (noise(2, 4, 4),),
            ops={_CONTIGUOUS: 1, "aten.permute.default": 2},
        ),
        Case(
            "merged_products",
            lambda: Forward(lambda s, x: (s.q(x), s.k(x).view(2, 3, 2, 2)), q=nn.Linear(4, 4), k=nn.Linear(4, 4)),
            (noise(2, 3, 4),),
            rewritten=2,
        ),
        Case(
            "dynamic_batch",
            lambda: Forward(lambda s, x: s.conv(x)[:, 1:].flatten(2), conv=_conv()),
            (noise(2, 4, 5, 5),),
            batch=(1, 4),
            rewritten=1,
        ),
        Case(
            "classifier",
            lambda: Forward(lambda s, x: s.fc(s.conv(x).mean((2, 3))), conv=_conv(), fc=nn.Linear(6, 3)),
            (noise(2, 4, 5, 5),),
            absent=(_CONTIGUOUS,),
            rewritten=0,
        ),
        Case(
            "own_copy",
            lambda: Forward(lambda s, x: s.conv(x).permute(0, 2, 3, 1).contiguous(), conv=_conv()),
            (noise(2, 4, 5, 5),),
            rewritten=0,
        ),
    )


def test_gaps_in_memory_are_refused() -> None:
    def build(call: Any, x: fx.Node) -> fx.Node:
        made = call(_aten.bmm.default, x, x)
        made.meta["val"] = made.meta["val"].new_empty_strided((2, 3, 3), (18, 6, 2))
        return made  # type: ignore[no-any-return]

    result = KeepStrides()(by_hand(noise(2, 3, 3), constants={}, build=build))
    assert [skip.reason for skip in result.skipped] == ["it has gaps or overlaps in memory"]
    assert not result.modified


def test_random_numbers_are_drawn_in_the_order_of_the_models_memory() -> None:
    result = run_pass(
        KeepStrides(), lambda: Forward(lambda s, x: torch.rand_like(s.c(x)), c=_conv()), noise(2, 4, 5, 5)
    )
    assert result.rewritten


def same(found: Tensor, expected: Tensor) -> bool:
    return strides.are_equal(found, expected) and found.shape == expected.shape and found.dtype == expected.dtype


_IMAGE, _ROWS = noise(2, 4, 6, 6), noise(2, 4, 12)
_SEEN: dict[str, tuple[Any, Tensor]] = {
    "output": (lambda: _conv(), _IMAGE),
    "channels_last input": (lambda: _conv(), _IMAGE.contiguous(**_channels_last)),
    "channels_last model": (lambda: _conv().to(**_channels_last), _IMAGE),
    "residual": (lambda: Forward(lambda s, x: torch.relu(s.c(x) + s.d(x)), c=_conv(), d=_conv()), _IMAGE),
    "view of a part": (lambda: Forward(lambda s, x: s.c(x)[:, 1:3, ::2], c=_conv()), _IMAGE),
    "as tokens": (lambda: Forward(lambda s, x: s.c(x).flatten(2).transpose(1, 2), c=_conv()), _IMAGE),
    "chunks": (lambda: Forward(lambda s, x: s.c(x).chunk(3, 1)[1], c=_conv()), _IMAGE),
    "one dimension": (lambda: nn.Conv1d(4, 6, 3), _ROWS),
    "three dimensions": (lambda: nn.Conv3d(4, 6, 2), noise(1, 4, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2), _IMAGE),
    "transposed and dilated": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, dilation=2), _IMAGE),
    "as_strided": (lambda: Forward(lambda s, x: s.c(x).as_strided((4, 9), (9, 1), 3), c=_conv()), _IMAGE),
    "as_strided of rows": (
        lambda: Forward(lambda s, x: s.c(x).as_strided((4, 9), (9, 1)), c=nn.Conv1d(4, 6, 3)),
        _ROWS,
    ),
    "complex": (
        lambda: Forward(lambda s, x: torch.view_as_complex(s.c(x).view(2, 6, 6, 3, 2)).abs(), c=_conv()),
        _IMAGE,
    ),
    "bits": (lambda: Forward(lambda s, x: s.c(x).view(torch.int32).view(torch.float32), c=_conv()), _IMAGE),
    "query and key": (
        lambda: Forward(lambda s, x: (s.q(x), s.k(x).view(2, 4, 3, 4).mT), q=nn.Linear(12, 12), k=nn.Linear(12, 12)),
        _ROWS,
    ),
    "copied, then scaled": (
        lambda: Forward(lambda s, x: (s.q(x).mT.contiguous() * 2).relu(), q=nn.Linear(12, 5)),
        _ROWS,
    ),
    "copied to channels_last": (
        lambda: Forward(lambda s, x: (s.c(x).contiguous(**_channels_last) * 2).as_strided((9,), (1,)), c=_conv()),
        _IMAGE,
    ),
    "attention": (
        lambda: Forward(lambda s, x: ((x @ x.mT / 3).softmax(-1) @ x).as_strided((9,), (2,))),
        noise(1, 2, 4, 9),
    ),
}


@pytest.mark.parametrize("target", sampled(["graviton3", "graviton2"], 2))
@pytest.mark.parametrize("name", _SEEN)
def test_a_program_gives_the_models_strides(name: str, target: str) -> None:
    """Lowered for a target, whose twins lie in memory as its kernels do."""
    build, x = _SEEN[name]
    model = seeded(build)
    with torch.no_grad():
        expected = model(x)
    captured = capture.module(model, (x,))
    recipe = Recipe.of(target)
    (program,) = recipe.lower_part(recipe.plan_part(submodules.CapturedPart("", captured, ({},))))
    with torch.no_grad():
        found = program.graph_module(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for one, other in zip(found, expected, strict=True):
        assert same(one, other), (one.stride(), other.stride())
        assert torch.allclose(one, other, atol=0.03 * float(other.abs().max()))  # BF16


def test_nothing_is_copied_inside() -> None:
    """A residual network with a classifier has no copy; one whose image is seen has one, at its end."""

    def blocks(s: Any, x: Tensor) -> Tensor:
        y = torch.relu(s.a(x))
        return torch.relu(s.c(torch.relu(s.b(y))) + y)

    parts = {"a": _conv(), "b": nn.Conv2d(6, 6, 1), "c": nn.Conv2d(6, 6, 3, padding=1), "fc": nn.Linear(6, 3)}
    image = run_pass(KeepStrides(), lambda: Forward(blocks, **parts), _IMAGE)
    classes = run_pass(KeepStrides(), lambda: Forward(lambda s, x: s.fc(blocks(s, x).mean((2, 3))), **parts), _IMAGE)
    copies = [list(g.calls_to(each.graph_module.graph, _aten.contiguous.default)) for each in (image, classes)]
    assert [len(found) for found in copies] == [1, 0]
    assert [user.op for user in copies[0][0].users] == ["output"]


def test_what_has_the_strides_already_is_not_copied() -> None:
    x = noise(2, 4, 5, 5).contiguous(**_channels_last)
    result = run_pass(KeepStrides(), lambda: Forward(lambda s, x: s.conv(x), conv=_conv()), x)
    (kept,) = g.calls_to(result.graph_module.graph, _aten.contiguous.default)
    assert kept.kwargs == _channels_last
    assert x.contiguous(**_channels_last).data_ptr() == x.data_ptr()
