"""Rules for shapes against what operations give; and why there are rules: without, a load imports sympy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import armopt
from armopt.bundle import shape_rules

_aten = torch.ops.aten
_X = torch.randn(2, 3, 8, 6)
_LAST = _X.to(memory_format=torch.channels_last)
CASES: list[tuple[Any, tuple[Any, ...]]] = [
    (_aten.cat.default, ([torch.zeros(0), _X, _X.double()], 1)),
    (_aten.stack.default, ([_X, _X], -1)),
    (_aten.view_copy.default, (_LAST, [-1, 2])),
    (_aten.view_copy.default, (_X.transpose(1, 2), list(_X.shape))),
    (_aten.native_layer_norm.default, (_X, [8, 6], torch.ones(8, 6), None, 1e-5)),
    (_aten.mean.dim, (_X, [-1, 0], True)),
    (_aten.sum.default, (_X,)),
    (_aten.mean.default, (_LAST,)),
    (_aten.sum.dim_IntList, (_LAST, [1], True)),
    (_aten.sum.dim_IntList, (_X > 0, None)),
    (_aten.linalg_vector_norm.default, (_X, 2, [-1], True)),
    (_aten.linalg_vector_norm.default, (torch.complex(_X, _X), 2, [-1])),
    (_aten.gather.default, (_X, 1, torch.zeros(2, 1, 8, 6, dtype=torch.int32))),
    (_aten.gather.default, (_X, 1, torch.zeros(0, dtype=torch.int64))),
    (_aten.tril.default, (_X.transpose(2, 3), 1)),
    (_aten.triu.default, (_LAST,)),
    (_aten.gather.default, (_X, -1, torch.zeros(2, 1, 8, 9, dtype=torch.int64))),
    (_aten.addmm.default, (torch.ones(6), _X[0, 0], torch.ones(6, 6).t())),
    (_aten.hardswish.default, (_LAST,)),
    (_aten.native_group_norm.default, (_X, torch.ones(3), None, 2, 3, 48, 3, 1e-5)),
    (_aten.upsample_nearest2d.default, (_LAST, [16, 9])),
    (_aten.upsample_bilinear2d.default, (_X, [16, 9], False)),
    (_aten._safe_softmax.default, (_LAST, -1)),
    (_aten._softmax.default, (_X, 1, False)),
    (_aten._log_softmax.default, (_LAST, 1, False)),
    (_aten.bmm.default, (_X[0], _X[0].transpose(1, 2))),
    (_aten.embedding.default, (torch.randn(5, 4), torch.tensor([[1, 2, 4]]), 0)),
    (_aten.index.Tensor, (_X, [torch.tensor([[1], [0]]), torch.tensor([0, 2, 2])])),
    (_aten.index.Tensor, (_X, [None, torch.tensor([0, 2])])),
    (_aten.index.Tensor, (_X, [None, None, torch.tensor([[0], [2]]), torch.tensor([1, 2, 3])])),
    (_aten.index.Tensor, (_X, [torch.tensor([0]), None, torch.tensor([1, 2, 3])])),
    (_aten.index.Tensor, (_LAST, [None, torch.tensor([0, 2])])),
    (_aten.max_pool2d_with_indices.default, (_LAST, [3, 2], [2, 1], [1, 0], [1, 2])),
    (_aten.max_pool2d_with_indices.default, (_X, [2, 2])),
    (_aten.max_pool2d_with_indices.default, (_X, [3, 3], [2, 2], [0, 0], [1, 1], True)),
]


@pytest.mark.parametrize(("operation", "args"), CASES)
def test_a_rule_gives_what_the_operation_gives(operation: Any, args: tuple[Any, ...]) -> None:
    def on_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    given = torch.utils._pytree.tree_map(on_meta, args)
    found, expected = shape_rules.RULES[operation](*given), operation(*args)
    for a, b in zip(*((y,) if isinstance(y, Tensor) else y for y in (found, expected)), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize(
    ("operation", "args"),
    [
        (_aten.bmm.default, (_X[0], _X[0])),
        (_aten.embedding.default, (torch.randn(5, 4), torch.ones(2))),
        (_aten.cat.default, ([_X, _X[:, :, 1:]], 1)),
        (_aten.tril.default, (torch.ones(3),)),
        (_aten.gather.default, (_X, 0, torch.zeros(2, 4, 8, 6, dtype=torch.int64))),
        (_aten.addmm.default, (torch.ones(5), _X[0, 0], torch.ones(6, 6))),
        (_aten.addmm.default, (torch.ones(6), _X[0, 0], torch.ones(5, 6))),
        (_aten.native_group_norm.default, (_X, torch.ones(2), None, 2, 3, 48, 3, 1e-5)),
        (_aten.upsample_nearest2d.default, (_X, [16])),
    ],
)
def test_what_does_not_fit_is_refused(operation: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises(shape_rules.UnfitError):
        shape_rules.RULES[operation](*args)


class Mixed(nn.Module):
    """What image and text models are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.table = nn.Embedding(10, 16)
        self.text = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.wide = nn.Sequential(nn.GroupNorm(4, 16), nn.Hardswish(), nn.Upsample(scale_factor=2))

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        resized = nn.functional.interpolate(self.wide(self.image(image)), scale_factor=0.5, mode="bilinear")
        x = torch.cat([resized.flatten(2).transpose(1, 2), self.table(ids)], 1)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        x = (
            x.gather(1, ids[:, :, None].expand(-1, -1, 16)) / x.sum(1, keepdim=True)
            + torch.linalg.vector_norm(x, dim=-1).mean()
        )
        y = self.text(x) + torch.where(causal[:4, :1], 0.0, 1.0)
        return torch.bmm(y, y.transpose(1, 2)).softmax(-1) + y[:, torch.arange(y.shape[1])].mean(-1, keepdim=True)


@pytest.mark.slow
def test_loading_what_most_models_call_imports_no_sympy(tmp_path: Path) -> None:
    inputs = (torch.randn(1, 3, 8, 8), torch.ones(1, 4, dtype=torch.int64))
    armopt.optimize(Mixed().eval(), inputs, output=tmp_path / "bundle", target="graviton3")
    script = "import sys, armopt; armopt.load(sys.argv[1]); print('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "bundle")], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
