"""Constants that share memory, or lie in it in other ways: each memory is stored once, and every value comes back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import armopt
from armopt.bundle import mapped_weights, reader, writer
from armopt.errors import BundleError, CaptureError
from tests.unit.test_hostile import rewrite

_POOL = torch.randn(100, generator=torch.Generator().manual_seed(0))
_SQUARE = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
_WAVE = torch.complex(_SQUARE[0], _SQUARE[1])


class Holder(nn.Module):
    """A Linear, and for each case buffers and a function of the input and them."""

    def __init__(self, cases: Mapping[str, tuple[Callable[..., Tensor], Sequence[Tensor]]]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.cases = {}
        for i, (case, (use, buffers)) in enumerate(cases.items()):
            names = [f"b{i}_{j}" for j in range(len(buffers))]
            self.cases[case] = use, names
            for name, buffer in zip(names, buffers, strict=True):
                self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {case: use(x, *(getattr(self, name) for name in names)) for case, (use, names) in self.cases.items()}
        return {"layer": self.layer(x), **found}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", armopt.ArmoptWarning)
        yield


def _rolled(x: Tensor, b: Tensor) -> Tensor:
    mask = torch.roll(b, 1, 0)
    return x * mask.unsqueeze(0) + (x.unsqueeze(-1) * mask.unsqueeze(1)).sum(-1)


def _names(bundle: Path) -> dict[str, Any]:
    with safe_open(bundle / "weights.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


_CASES: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
    "rolled, unsqueezed twice": (_rolled, [_SQUARE[0].clone()]),
    "whole storage in two shapes": (lambda x, b, c: x.sum() + b[:8] + c, [_SQUARE.view(64), _SQUARE]),
    "overlapping": (lambda x, b, c: x + b + c, [_POOL[:8], _POOL[4:12]]),
    "with an offset": (lambda x, b, c: x + b + c, [_POOL[3:11], _POOL[3:11].view(1, 8)]),
    "strided": (lambda x, b: x + b, [_POOL.as_strided((4, 8), (1, 2))]),
    "expanded": (lambda x, b: x + b, [_POOL[:8].expand(4, 8)]),
    "conjugate": (lambda x, b: (b * torch.complex(x, x)).imag, [_WAVE.conj()]),
    "conjugate, folded": (lambda x, b: (torch.conj(b) * torch.complex(x, x)).imag, [_WAVE.clone()]),
    "negative bit": (lambda x, b: x + b, [_WAVE.conj().imag]),
    "negative bit, folded": (lambda x, b: x + b.conj().imag, [_WAVE.clone()]),
    "boolean": (lambda x, b: torch.where(b, x, 1.0), [torch.tensor([True, False] * 4)]),
    "without dimensions": (lambda x, b, c: torch.where(b, x, c), [torch.tensor(True), torch.tensor(3)]),
    "empty": (lambda x, b, c: torch.cat([x, b, c]), [torch.zeros(0, 8), torch.zeros(0, 8)]),
    "of other dtypes": (
        lambda x, b, c, d: x + b + c.float() + d.float(),
        [_POOL[:8].half(), torch.arange(8).to(torch.uint16), _POOL[:8].to(torch.float8_e4m3fn)],
    ),
}


def test_every_value_comes_back(tmp_path: Path) -> None:
    model, x = Holder(_CASES).eval(), torch.randn(4, 8)
    armopt.optimize(model, (x,), output=tmp_path / "b", target="graviton2")
    found = armopt.load(tmp_path / "b")(x)
    with torch.no_grad():
        for case, value in model(x).items():
            torch.testing.assert_close(found[case], value, atol=1e-5, rtol=1e-5, msg=case)


@pytest.mark.parametrize(
    ("buffer", "said"),
    [
        (torch.eye(8).to_sparse(), r"constant b0_0 is sparse \(sparse_coo\).*to_dense"),
        (torch.eye(8).to_sparse_csr(), r"constant b0_0 is sparse \(sparse_csr\).*to_dense"),
        (_WAVE.to(torch.complex128), "constant b0_0 is complex128.*another dtype"),
    ],
)
def test_what_a_file_of_weights_cant_hold_is_named(buffer: Tensor, said: str, tmp_path: Path) -> None:
    use: Any = (lambda x, b: x @ b) if buffer.layout is not torch.strided else (lambda x, b: (b * x).real.float())
    model = Holder({"case": (use, [buffer])}).eval()
    with pytest.raises(CaptureError, match=said):
        armopt.optimize(model, (torch.randn(4, 8),), output=tmp_path / "b", target="graviton2")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_tensor_is_named() -> None:
    with pytest.raises(CaptureError, match=r"constant table is quantized \(qint8\).*dequantize"):
        mapped_weights.check_storable(torch.quantize_per_tensor(_POOL, 0.1, 0, torch.qint8), "table")


class Tied(nn.Module):
    """Two parts that share a weight, and Python around them that shares one too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.outer = nn.Parameter(torch.randn(2, 8))
        self.again = self.outer
        self.scale = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) if x.sum() < 1e9 else x
        return self.second(y) + self.outer[0] + self.again[1] + self.scale[0]


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    model, x = Tied().eval(), torch.randn(4, 8)
    armopt.optimize(model, [(x,)], kind="module", output=tmp_path / "b", target="graviton2")
    stored = _names(tmp_path / "b")
    values = [tensor.float() for tensor in stored.values()]
    assert sum(torch.equal(value, model.first.weight.detach()) for value in values if value.shape == (8, 8)) == 1
    assert sum(value.shape == (2, 8) for value in values) == 1
    with torch.no_grad():
        loaded = armopt.load(tmp_path / "b", model=Tied)
        torch.testing.assert_close(loaded(x), model(x), atol=1e-4, rtol=1e-4)


def test_a_tie_to_nothing_is_refused(tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    armopt.optimize(Tied().eval(), [(torch.randn(4, 8),)], kind="module", output=bundle, target="graviton2")
    graph = json.loads((bundle / "graph.json").read_text())
    assert graph["tied"] == {"again": "/outer", "scale": "first/weight"}
    for tied in ({"again": "/inner"}, {"outer": "/outer"}):
        rewrite(bundle, lambda graph, tied=tied: graph.update(tied=tied))
        with pytest.raises(BundleError, match=f"{next(iter(tied))} is tied to"):
            reader.read(bundle)


def test_each_memory_has_one_name() -> None:
    """As long as it is all of the same tensor; what is empty has none."""
    rest = {"a": _POOL[:8], "b": _POOL[:8], "c": _POOL[8:16], "d": _POOL[:4], "e": _POOL[:0], "f": _POOL[:0]}
    weights = writer.collect_weights((), rest | {"g": _WAVE, "h": _WAVE.conj()})
    names = {"/a": "/a", "/b": "/a", "/c": "/c", "/d": "/d", "/e": "/e", "/f": "/f", "/g": "/g", "/h": "/h"}
    assert dict(weights.names) == names
    assert weights.tied == {"b": "/a"}
    assert len({tensor.untyped_storage().data_ptr() for tensor in weights.tensors.values() if tensor.numel()}) == 5
