"""Mixtures of experts as transformers writes them: each expert is a layer, in bundles and when compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import armopt
from armopt.models import torchvision_ops
from armopt.onnx_export import export

torchvision_ops.ensure_torchvision_if_installed()
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
FORMS = ("grouped_mm", "batched_mm")
#: Relative to the largest value: BF16 rounds weights to 2^-9, and three layers follow on each other.
TOLERANCE = 0.03


def block(form: str) -> Any:
    """Eight experts, of which each token asks two."""
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2
    )
    config._experts_implementation = form
    torch.manual_seed(0)
    model = MixtralSparseMoeBlock(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def tokens(count: int) -> torch.Tensor:
    return torch.randn(1, count, 32, generator=torch.Generator().manual_seed(count))


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_a_bundle(form: str, tmp_path: Path) -> None:
    model, path = block(form), tmp_path / "bundle"
    result = armopt.optimize(model, (tokens(6),), output=path, target="graviton3")
    assert result.verdict is not None
    with pytest.warns(armopt.ArmoptWarning, match="portable twins"):
        loaded = armopt.load(path)
    for seed in range(3):
        x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            check(loaded(x), model(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["compile", "backend"])
def test_compiled(form: str, how: str) -> None:
    model = block(form)
    with torch.no_grad():
        expected = {count: model(tokens(count)) for count in (1, 6)}
        compiled: Any = (
            armopt.compile(model, target="graviton3")
            if how == "compile"
            else torch.compile(model, backend="armopt", options={"target": "graviton3"})
        )
        for count, wanted in expected.items():
            check(compiled(tokens(count)), wanted)
    if how == "compile":
        found = armopt.explain(compiled)
        names = {layer.node for layer in found.layers}
        assert {f"experts_{part}_{i}" for part in ("gate_up_proj", "down_proj") for i in range(8)} <= names
        assert "expert" not in str(found.not_in_bf16)


@pytest.mark.parametrize("form", FORMS)
def test_onnx(form: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = block(form), tmp_path / "bundle"
    armopt.optimize(model, (tokens(6),), output=path, target="graviton3")
    export.export(path, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for seed in range(3):
        x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(seed))
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            check(torch.from_numpy(found), model(x))
