"""Mixtures of experts as transformers writes them: each expert is a layer, in bundles and when compiled."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import armopt
from armopt.models import torchvision_ops
from armopt.onnx_export import export
from tests.sampling import only

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
@pytest.mark.usefixtures("onnx_functions")
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


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 211,
    "use_cache": False,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 210,
    "pad_token_id": 210,
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
GROUPS = {"n_routed_experts": 4, "moe_intermediate_size": 48, "n_group": 1, "topk_group": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "GptOss": {"num_local_experts": 4, "head_dim": 16, "sliding_window": 16},
    "DeepseekV3": {**GROUPS, **LATENT, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16},
    "Olmoe": {"num_experts": 4},
    "GraniteMoe": {"num_local_experts": 4},
    "Phimoe": {"num_local_experts": 4},
    "Glm4Moe": {**GROUPS, "first_k_dense_replace": 1, "head_dim": 16},
}


def language_model(family: str, form: str) -> Any:
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.set_experts_implementation(form)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", only(FAMILIES, ["GptOss"]))
def test_the_experts_of_a_language_model_are_in_bf16(family: str, form: str, tmp_path: Path) -> None:
    model = language_model(family, form)
    ids = torch.randint(1, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    result = armopt.optimize(model, {"input_ids": ids}, output=tmp_path / "b", target="graviton3")
    (left,) = result.manifest.not_in_bf16
    assert not [product for product in left.products if "expert" in product.node]
    with pytest.warns(armopt.ArmoptWarning, match="portable twins"):
        loaded = armopt.load(tmp_path / "b")
    with torch.no_grad():
        found, expected = loaded(input_ids=ids)["logits"], model(ids).logits
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.999
    assert not torch.equal(found, expected)


@pytest.mark.full
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("form", ["eager", *FORMS])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_language_model(family: str, form: str, cached: bool) -> None:
    model = language_model(family, form)
    model.config.use_cache = cached
    compiled = armopt.compile(copy.deepcopy(model), target="graviton3")
    for count in (12, 1, 12):
        ids = torch.randint(1, 200, (1, count), generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            found, expected = compiled(ids).logits, model(ids).logits
        assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.999
