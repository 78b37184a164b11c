"""armopt.compile on models that can't be captured whole: generate loops, recurrent layers, control flow on data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import armopt
from armopt.dynamo import backend
from armopt.models import torchvision_ops
from tests import detection

torchvision_ops.ensure_torchvision_if_installed()
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]
DETECTORS = (
    *(
        "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_resnet50_fpn",
        "maskrcnn_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
        "ssdlite320_mobilenet_v3_large",
    ),
    *("ssd300_vgg16", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn"),
)


def louder(model: torch.nn.Module) -> Any:
    """Larger weights: logits that differ by more than BF16 rounds, and tokens that depend on their context."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1,
        n_head=4,
        n_embd=64,
        vocab_size=211,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=210,
        pad_token_id=210,
    )
    return louder(transformers.GPT2LMHeadModel(config))


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 211}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 210, "pad_token_id": 210}
    return louder(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **ends)))


def generated(model: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(prompt, max_new_tokens=10, do_sample=False, **options)
    return found[:, prompt.shape[1] :]


def prompts(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 200, (batch, length), generator=torch.Generator().manual_seed(batch + length))


def check_tokens(model: Any, made: Any, prompt: torch.Tensor, **options: Any) -> None:
    """The same tokens; where two logits lie within BF16's rounding, the first that differs is one of those two."""
    expected, found = generated(model, prompt, **options), generated(made, prompt, **options)
    assert expected.unique().numel() > 1, "these weights generate the same token again and again"
    for row, (a, b) in enumerate(zip(expected, found, strict=True)):
        differing = (a != b).nonzero().flatten()
        if not differing.numel():
            continue
        first = int(differing[0])
        tokens = torch.cat([prompt[row], a[:first]])[None]
        mask = options.get("attention_mask")
        if mask is not None:
            mask = torch.cat([mask[row], mask.new_ones(first)])[None]
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask).logits[0, -1]
        gap = float(logits[a[first]] - logits[b[first]])
        assert gap < 0.02 * float(logits.abs().max()), f"row {row} diverges at token {first}, by {gap:.3f}"


@pytest.mark.parametrize("make", [pytest.param(gpt2, marks=pytest.mark.full), llama])
def test_generate_gives_the_tokens_of_fp32(make: Any) -> None:
    """Prefill and decode get kernels by their shapes."""
    model = make()
    made = armopt.compile(model, target="graviton3", policy="threshold=8")
    check_tokens(model, made, prompts(1, 9))
    check_tokens(model, made, prompts(3, 20))
    with torch.no_grad():  # and it was BF16 that gave them
        assert not torch.equal(made(prompts(2, 5)).logits, model(prompts(2, 5)).logits)
    # prefill and decode, each at first as it came and then for all sizes, with one and several rows
    assert counters["stats"]["unique_graphs"] <= 8
    rows: dict[str, set[int]] = {}
    for layer in made.forward.explain().layers:
        rows.setdefault(layer.kernel, set()).add(math.prod(layer.shape[:-1]))
    assert max(rows["blas_fp32_w16"]) < 8 <= min(rows["conv1x1_bf16"])


@pytest.mark.parametrize("cache", [pytest.param("dynamic", marks=pytest.mark.full), "static"])
def test_generate_with_padding_and_either_cache(cache: str) -> None:
    model = gpt2()
    made = armopt.compile(model, target="graviton3")
    prompt = prompts(3, 12)
    mask = torch.ones_like(prompt)
    mask[0, :5] = mask[1, :2] = 0
    prompt[mask == 0] = model.config.pad_token_id
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    check_tokens(model, made, prompt, attention_mask=mask, **options)


def test_torch_compile_of_forward_serves_generate_too() -> None:
    model = gpt2()
    made = gpt2()
    made.forward = torch.compile(made.forward, backend=backend.backend, options={"target": "graviton3"})
    check_tokens(model, made, prompts(2, 7))


@pytest.mark.full
def test_whisper_like_encoder_and_decoder() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 211, "num_mel_bins": 20}
    lengths = {"max_source_positions": 50, "max_target_positions": 40}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        **sizes, **heads, **lengths, **ends, suppress_tokens=None, begin_suppress_tokens=None
    )
    model = louder(transformers.WhisperForConditionalGeneration(config))
    made = armopt.compile(model, target="graviton3")
    sound = torch.randn(2, 20, 100)
    start = torch.ones(2, 1, dtype=torch.long)
    with torch.no_grad():
        expected, found = (each(sound, decoder_input_ids=start).logits for each in (model, made))
    torch.testing.assert_close(found, expected, atol=0.03 * float(expected.abs().max()), rtol=0)
    assert not torch.equal(found, expected)
    both = [
        each.generate(sound, max_new_tokens=6, do_sample=False, return_dict_in_generate=False) for each in (model, made)
    ]
    assert torch.equal(*both)
    graphs = {layer.graph for layer in made.forward.explain().layers}
    assert any("encoder" in graph for graph in graphs), "generate calls the encoder by itself"


class Tagger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = torch.nn.Linear(16, 32)
        self.lstm = torch.nn.LSTM(32, 48, num_layers=2, batch_first=True, bidirectional=True)
        self.out = torch.nn.Linear(96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.lstm(self.into(x))
        tags: torch.Tensor = self.out(hidden)
        return tags


def test_an_lstm_is_left_alone_with_its_reason() -> None:
    torch.manual_seed(0)
    model = Tagger().eval()
    made = armopt.compile(model, target="graviton3")
    with torch.no_grad():
        for x in (torch.randn(2, 7, 16), torch.randn(3, 5, 16)):
            found, expected = made(x), model(x)
            torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0)
            assert not torch.equal(found, expected)
    explained = made.forward.explain()
    assert {layer.node for layer in explained.layers} == {"into", "out"}
    (reason,) = [skip.reason for skip in explained.left_alone if skip.node == "lstm"]
    assert reason.startswith("recurrent")


class Router(torch.nn.Module):
    """Takes one way or another, and as many steps as the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.left, self.right = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.look(x).relu()
        if hidden.mean() > 0.4:
            hidden = self.left(hidden)
        for _ in range(int(x.abs().sum()) % 3):
            hidden = self.right(hidden)
        return hidden


def test_control_flow_on_data_is_followed() -> None:
    torch.manual_seed(0)
    model = Router().eval()
    made = armopt.compile(model, target="graviton3")
    with torch.no_grad():
        for scale in (0.5, 1.0, 3.0, 5.0):
            x = scale * torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
            expected = model(x)
            torch.testing.assert_close(made(x), expected, atol=0.02 * float(expected.abs().max()), rtol=0)
    explained = made.forward.explain()
    assert {layer.node for layer in explained.layers} == {"look", "left", "right"}
    assert "Router" in {skip.node for skip in explained.left_alone}


@pytest.mark.full
@pytest.mark.parametrize("name", DETECTORS)
def test_detections_of_fp32_are_found_again(name: str) -> None:
    model = detection.named(name)
    made = armopt.compile(model, target="graviton3")
    images = detection.images(seed=1)  # of two sizes
    with torch.no_grad():
        expected, found = model(images), made(images)
    above, alike = detection.found_again(expected, found)
    assert above >= 5
    # random weights rank boxes and proposals by next to nothing: which of them are kept may change
    assert alike >= above - max(1, 0.05 * above)
    boxes = [torch.cat([each["boxes"] for each in run]) for run in (expected, found)]
    assert not torch.equal(*boxes)
    assert len(made.forward.explain().layers) > 30


class UNetBlock(torch.nn.Module):
    """A block of a diffusion model: residual convolutions with a time embedding, then attention over the pixels."""

    def __init__(self, channels: int = 32, time: int = 64) -> None:
        super().__init__()
        self.first_norm, self.second_norm, self.attention_norm = (torch.nn.GroupNorm(8, channels) for _ in range(3))
        self.first, self.second = (torch.nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.time = torch.nn.Linear(time, channels)
        self.query, self.key, self.value, self.project = (torch.nn.Linear(channels, channels) for _ in range(4))
        self.down = torch.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        silu, attend = torch.nn.functional.silu, torch.nn.functional.scaled_dot_product_attention
        hidden = self.first(silu(self.first_norm(x))) + self.time(silu(time))[:, :, None, None]
        x = x + self.second(silu(self.second_norm(hidden)))
        pixels = self.attention_norm(x).flatten(2).transpose(1, 2)
        heads = [part(pixels).unflatten(2, (4, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        attended = self.project(attend(*heads).transpose(1, 2).flatten(2))
        x = x + attended.transpose(1, 2).reshape(x.shape)
        down: torch.Tensor = self.down(x)
        return down


def test_a_diffusion_block_at_several_sizes() -> None:
    torch.manual_seed(0)
    model = UNetBlock().eval()
    made = armopt.compile(model, target="graviton3")
    with torch.no_grad():
        for batch, height, width in ((2, 16, 16), (2, 24, 16), (3, 8, 32)):
            x, time = torch.randn(batch, 32, height, width), torch.randn(batch, 64)
            found, expected = made(x, time), model(x, time)
            assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.9999
            assert not torch.equal(found, expected)
    layers = {layer.node for layer in made.forward.explain().layers}
    assert layers == {"first", "time", "second", "query_merged", "project", "down"}
