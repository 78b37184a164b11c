"""How a bundle may be called: as the model, whatever is set around it; what does not fit is said in one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import armopt
from armopt.errors import InputError
from armopt.ir import buckets
from armopt.runtime import surroundings


class Named(nn.Module):
    """An embedding, and arguments with defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        scale: float = 1.0,
        *,
        pair: Any = (1, 2),
        at: Any = math.nan,
    ) -> Tensor:
        y = self.layer(self.table(ids))
        return (y if mask is None else y * mask[:, None]) * scale


class Promoting(nn.Module):
    """What the default dtype, device and autocast decide: new tensors, whole numbers times a fraction, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        rows, new = torch.arange(x.shape[0]), torch.zeros(x.shape[0])
        return self.layer(x) + y + torch.ones(x.shape[0], 1), new, rows * 0.5, (x > 0) * 0.5, x @ y.t()


class Halves(nn.Module):
    """Twice as many rows in one input as in another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.layer(x), x]) + y


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", armopt.ArmoptWarning)
        yield


_IDS = torch.tensor([1, 5, 2, 9])


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Any, Any]:
    """The model, and bundles without and with a mask."""
    model, place = Named().eval(), tmp_path_factory.mktemp("named")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", armopt.ArmoptWarning)
        armopt.optimize(model, (_IDS,), output=place / "a", target="graviton2")
        armopt.optimize(model, {"ids": _IDS, "mask": torch.ones(4)}, output=place / "b", target="graviton2")
        return model, armopt.load(place / "a"), armopt.load(place / "b")


@pytest.fixture(scope="module")
def promoting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _promoting(tmp_path_factory.mktemp("promoting") / "a", batch=(2, 4))


@pytest.fixture(scope="module")
def promoting_three(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """For three rows alone: its calls go the quick way."""
    return _promoting(tmp_path_factory.mktemp("promoting") / "three", batch=(3,))


def _promoting(place: Path, batch: tuple[int, ...]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", armopt.ArmoptWarning)
        inputs = torch.randn(4, 8), torch.randn(4, 8)
        armopt.optimize(Promoting().eval(), inputs, output=place, target="graviton2", batch=batch)
        return armopt.load(place)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {"ids": _IDS}),
        ((_IDS, None), {}),
        ((_IDS,), {"mask": None}),
        ((_IDS, None, 1.0), {"pair": (1, 2)}),
        ((_IDS,), {"scale": 1, "pair": [1, 2]}),
        ((_IDS.int(),), {}),
        ((_IDS.int()[:, None].expand(4, 2)[:, 0],), {}),
    ],
)
def test_what_the_model_takes_as_the_same_the_bundle_takes(named: Any, args: Any, kwargs: Any) -> None:
    model, plain, _ = named
    with torch.no_grad():
        torch.testing.assert_close(plain(*args, **kwargs), model(*args, **kwargs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "^inputs: ids is missing. The model was captured with: ids$"),
        ((_IDS, torch.ones(4)), {}, "captured with None for mask, not with a Tensor"),
        ((_IDS,), {"mask": torch.ones(4)}, "captured with None for mask, not with a Tensor"),
        ((_IDS,), {"scale": 2.0}, "captured with 1.0 for scale, not with 2.0"),
        ((_IDS,), {"scale": torch.ones(2)}, "captured with 1.0 for scale, not with a Tensor"),
        ((_IDS,), {"pair": (1, 3)}, "captured with its default for pair, not with a tuple"),
        ((_IDS,), {"at": math.nan}, "the model takes no input at"),
        ((_IDS,), {"other": 1}, "^inputs: the model takes no input other. The model was captured with: ids$"),
        ((_IDS,), {"ids": _IDS}, "ids is given twice, by position and by name"),
        ((_IDS, None, 1.0, (1, 2)), {}, "too many inputs: 4 by position, where the model takes 3"),
        ((_IDS.short(),), {}, r"expected int64, found int16.*\.to\(torch.int64\)"),
        ((_IDS.float(),), {}, "expected int64, found float32"),
        ((_IDS.bool(),), {}, "expected int64, found bool"),
        ((_IDS.numpy(),), {}, "expected a tensor, found a ndarray.*from_numpy"),
        ((_IDS.tolist(),), {}, "expected a tensor, found a list"),
        ((_IDS.to("meta"),), {}, "is on the device meta.*cpu"),
        ((_IDS.to_sparse(),), {}, "expected a dense tensor, found torch.sparse_coo.*to_dense"),
        ((_IDS[None],), {}, "expected shape 4, found 1x4"),
    ],
)
def test_what_differs_is_said_in_plain_english(named: Any, args: Any, kwargs: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        named[1](*args, **kwargs)


def test_a_captured_mask_is_asked_for(named: Any) -> None:
    with pytest.raises(InputError, match=r"^inputs: mask is missing\. The model was captured with: ids, mask"):
        named[2](_IDS)
    with pytest.raises(InputError, match="input mask: expected a tensor, found a NoneType"):
        named[2](_IDS, None)


@contextlib.contextmanager
def _default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        torch.enable_grad,
        _default_float64,
        lambda: torch.device("meta"),
        _deterministic,
    ],
    ids=["autocast", "inference_mode", "enable_grad", "float64", "meta", "deterministic"],
)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("sizes", ["promoting", "promoting_three"])
def test_what_is_set_around_a_bundle_changes_nothing(
    sizes: str, gradients: bool, around: Callable[[], Any], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(sizes)
    inputs = torch.randn(3, 8), torch.randn(3, 8, requires_grad=gradients)
    expected = model(*inputs)
    before = torch.get_default_dtype()
    with around():
        set_there = torch.get_default_dtype()
        found = model(*inputs)
        assert torch.get_default_dtype() is set_there
    assert torch.get_default_dtype() is before
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert not a.requires_grad
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("sizes", ["promoting", "promoting_three"])
def test_inputs_by_position_and_by_name_are_the_same(sizes: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(sizes)
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    expected = model(x, y)
    for found in (model(x, y=y), model(y=y, x=x)):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    for args, kwargs in (((x,), {"x": y}), ((x,), {"z": y}), ((), {"x": x, "z": y}), ((x,), {"y": None}), ((x,), {})):
        with pytest.raises(InputError, match=r"input"):
            model(*args, **kwargs)


def test_the_default_dtype_comes_back_once_nobody_needs_it_otherwise() -> None:
    with _default_float64():
        with surroundings.as_captured():
            with surroundings.as_captured():
                assert torch.get_default_dtype() is torch.float32
            assert torch.get_default_dtype() is torch.float32
        assert torch.get_default_dtype() is torch.float64
    assert not surroundings.differ()


def test_sizes_that_do_not_agree_are_named_with_both_inputs(promoting: Any) -> None:
    said = r"^input y: dimension 0 is 4, but batch is 3 by dimension 0 of input x\. Give both the same size there$"
    with pytest.raises(InputError, match=said):
        promoting(torch.randn(3, 8), torch.randn(4, 8))


def test_sizes_that_follow_from_others_are_checked(tmp_path: Path) -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    inputs = torch.randn(4, 8), torch.randn(8, 8)
    program = torch.export.export(Halves().eval(), inputs, dynamic_shapes=({0: rows}, {0: 2 * rows}))
    armopt.optimize(program, inputs, output=tmp_path / "a", target="graviton2")
    loaded = armopt.load(tmp_path / "a")
    assert loaded(torch.randn(5, 8), torch.randn(10, 8)).shape == (10, 8)
    with pytest.raises(InputError, match=r"^input y: dimension 0 is 9, expected 2\*batch, which is 10: batch is 5 by"):
        loaded(torch.randn(5, 8), torch.randn(9, 8))
    with pytest.raises(InputError, match=r"^input x: dimension 0 is 65, the model takes up to 64"):
        loaded(torch.randn(65, 8), torch.randn(130, 8))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        *(("2*a", 6), ("a + 2*b - 1", 12), ("(a//2)", 1), ("-a", -3), ("c", None), ("a**9", None), ("a(", None)),
        *(("__import__('os')", None), ("a//0", None), ("(" * 500, None), ("True", None)),
    ],
)
def test_arithmetic_on_sizes(expression: str, value: int | None) -> None:
    assert buckets.evaluate(expression, {"a": 3, "b": 5}) == value


@dataclasses.dataclass
class Found:
    """A dataclass that nobody registered with torch."""

    y: Any
    more: Any = None


class Finding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Any) -> Found:
        return Found(self.fc(x.y), [Found(x.y + 1)])


def test_dataclasses_among_inputs_and_outputs_need_no_registration(tmp_path: Path) -> None:
    model, x = Finding().eval(), Found(torch.randn(2, 8))
    armopt.optimize(model, (x,), output=tmp_path / "bundle", target="graviton2")
    found = armopt.load(tmp_path / "bundle")(x)
    expected = model(x)
    assert type(found).__name__ == "Found"
    torch.testing.assert_close(found.y, expected.y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.more[0].y, expected.more[0].y)
