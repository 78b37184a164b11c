"""Small random models for the tests: Hugging Face's architectures and small nets, made without arguments.

``EXAMPLES[name]()`` gives the keyword inputs of ``MODELS[name]()``. All are seeded and in eval mode. ``build`` makes
torchvision's by name too, on small inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from armopt.models import references, torchvision_inputs
from armopt.models.torchvision_ops import ensure_torchvision
from benchmarks.random_weights import randomize

VOCABULARY = 1000


def _transformers() -> Any:
    ensure_torchvision()  # transformers' models import torchvision
    import transformers

    return transformers


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(build())


# --- Hugging Face ---


def gpt2() -> nn.Module:
    """Its linears are Conv1D modules (addmm, weight [in, out]); the head shares the embedding."""
    hf = _transformers()
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _seeded(lambda: hf.GPT2LMHeadModel(config))


def bert() -> nn.Module:
    hf = _transformers()
    config = hf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        use_cache=False,
    )
    return _seeded(lambda: hf.BertModel(config))


def distilbert() -> nn.Module:
    hf = _transformers()
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=64, hidden_dim=256, n_layers=2, n_heads=4, max_position_embeddings=64
    )
    return _seeded(lambda: hf.DistilBertForSequenceClassification(config))


def vit() -> nn.Module:
    hf = _transformers()
    config = hf.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=64,
        patch_size=16,
        num_labels=10,
    )
    return _seeded(lambda: hf.ViTForImageClassification(config))


def t5_encoder() -> nn.Module:
    """No biases, RMS norm, relative positions."""
    hf = _transformers()
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4, use_cache=False
    )
    return _seeded(lambda: hf.T5EncoderModel(config))


def whisper_encoder() -> nn.Module:
    """Two conv1d with gelu, then attention; 200 frames of 40 mel bins."""
    hf = _transformers()
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=40,
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=256,
        max_source_positions=100,
        max_target_positions=64,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return _seeded(lambda: hf.WhisperModel(config).encoder)


def llama() -> nn.Module:
    """Rotary positions, grouped-query attention, silu-gated MLP."""
    hf = _transformers()
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return _seeded(lambda: hf.LlamaForCausalLM(config))


# --- convolutions ---


class Residual(nn.Module):
    """conv, norm, relu, conv, norm, + input, relu: ResNet's block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class SeparableNet(nn.Module):
    """Grouped, depthwise, dilated, strided and biasless convolutions, the usual activations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.body = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1, groups=4),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False),  # depthwise
            nn.BatchNorm2d(32),
            nn.Hardswish(),
            nn.Conv2d(32, 16, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 16, 3, padding=2, dilation=2),
            nn.Sigmoid(),
            Residual(16),
            nn.Conv2d(16, 16, (1, 3), padding=(0, 1)),
            nn.Tanh(),
            nn.Conv2d(16, 16, 3, padding="same", padding_mode="reflect"),
            nn.ReLU6(),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def separable() -> nn.Module:
    return _seeded(lambda: randomize(SeparableNet(), [(1, 3, 32, 32)]))


def residual() -> nn.Module:
    return _seeded(lambda: randomize(nn.Sequential(Residual(16), Residual(16)), [(1, 16, 12, 12)]))


def conv1d() -> nn.Module:
    def build() -> nn.Module:
        model = nn.Sequential(
            nn.Conv1d(8, 16, 5, padding=2, bias=False),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 16, 3, padding=2, dilation=2, groups=2),
            nn.GELU(approximate="tanh"),
            nn.Conv1d(16, 16, 3, stride=2, groups=16),
            nn.SiLU(),
        )
        return randomize(model, [(1, 8, 40)])

    return _seeded(build)


def conv3d() -> nn.Module:
    def build() -> nn.Module:
        model = nn.Sequential(
            nn.Conv3d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.Conv3d(8, 8, 3, stride=(1, 2, 2), padding=1, groups=2),
            nn.Hardswish(),
            nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 2, 2), dilation=(1, 2, 2)),
        )
        return randomize(model, [(1, 3, 6, 12, 12)])

    return _seeded(build)


def _transposed(conv: Any, norm: Any) -> nn.Module:
    return nn.Sequential(
        conv(8, 16, 3, stride=2, padding=1, output_padding=1, bias=False),
        norm(16),
        nn.ReLU(),
        conv(16, 8, 3, stride=1, padding=2, dilation=2, groups=2),
        nn.Tanh(),
        conv(8, 4, 2, stride=2),
    )


def conv_transpose1d() -> nn.Module:
    return _seeded(lambda: randomize(_transposed(nn.ConvTranspose1d, nn.BatchNorm1d), [(1, 8, 10)]))


def conv_transpose2d() -> nn.Module:
    return _seeded(lambda: randomize(_transposed(nn.ConvTranspose2d, nn.BatchNorm2d), [(1, 8, 6, 6)]))


def conv_transpose3d() -> nn.Module:
    return _seeded(lambda: randomize(_transposed(nn.ConvTranspose3d, nn.BatchNorm3d), [(1, 8, 4, 4, 4)]))


# --- linears ---


def linear_norm() -> nn.Module:
    """Batch norm after linear, with and without a bias before it."""

    def build() -> nn.Module:
        model = nn.Sequential(
            nn.Linear(32, 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Linear(64, 64, bias=False),
            nn.BatchNorm1d(64),
            nn.GELU(),
            nn.Linear(64, 10),
        )
        return randomize(model, [(1, 32)])

    return _seeded(build)


class SharedWeights(nn.Module):
    """One linear called twice, and a second that holds the same weight with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(F.relu(self.first(x)))))


def shared_weights() -> nn.Module:
    return _seeded(SharedWeights)


class MatmulForms(nn.Module):
    """A linear as it is also written: matmul and mm with a weight [in, out], addmm and einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 64) / 6)
        self.back = nn.Parameter(torch.randn(64, 32) / 8)
        self.bias = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight) + self.bias
        y = torch.mm(F.gelu(y).flatten(0, 1), self.back)
        y = torch.addmm(self.bias, torch.sigmoid(y), self.weight)
        return torch.einsum("bi,ij->bj", y, self.back)


def matmul_forms() -> nn.Module:
    return _seeded(MatmulForms)


# --- structure of inputs and outputs ---


class Pair(NamedTuple):
    """A named tuple among the outputs."""

    left: Tensor
    right: Tensor


@dataclass
class Outcome:
    """A dataclass among the outputs, as Hugging Face's model outputs are."""

    logits: Tensor
    hidden: tuple[Tensor, ...]


pytree.register_dataclass(Outcome, serialized_type_name="tests.zoo_models.Outcome")


class Nested(nn.Module):
    """Returns a dict that holds a named tuple, a dataclass, a list, a number and None."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(16, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = F.relu(self.trunk(x))
        logits = self.head(hidden)
        return {
            "pair": Pair(logits, hidden),
            "outcome": Outcome(logits.softmax(-1), (hidden, x)),
            "list": [logits, {"deep": hidden.sum(-1)}],
            "scale": 2.5,
            "nothing": None,
        }


def nested_outputs() -> nn.Module:
    return _seeded(Nested)


class KeywordOnly(nn.Module):
    """Takes its inputs by name only, one of them optional, and one a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.gate = nn.Linear(8, 16)

    def forward(self, *, features: Tensor, context: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
        y = self.linear(features) * torch.sigmoid(self.gate(context["gate"])) + context["shift"]
        return y if mask is None else y * mask


def keyword_only() -> nn.Module:
    return _seeded(KeywordOnly)


# --- the tables ---


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _tokens(length: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))


def _text() -> dict[str, Any]:
    return {"input_ids": _tokens(), "attention_mask": torch.ones(1, 12, dtype=torch.int64)}


HUGGING_FACE: dict[str, Callable[[], nn.Module]] = {
    factory.__name__: factory for factory in (gpt2, bert, distilbert, vit, t5_encoder, whisper_encoder, llama)
}
NETS: dict[str, Callable[[], nn.Module]] = {
    factory.__name__: factory
    for factory in (
        separable,
        residual,
        conv1d,
        conv3d,
        conv_transpose1d,
        conv_transpose2d,
        conv_transpose3d,
        linear_norm,
        shared_weights,
        matmul_forms,
        nested_outputs,
        keyword_only,
    )
}
MODELS = {**HUGGING_FACE, **NETS}

EXAMPLES: dict[str, Callable[[], dict[str, Any]]] = {
    "gpt2": _text,
    "bert": _text,
    "distilbert": _text,
    "vit": lambda: {"pixel_values": _noise(1, 3, 64, 64)},
    "t5_encoder": _text,
    "whisper_encoder": lambda: {"input_features": _noise(1, 40, 200)},
    "llama": _text,
    "separable": lambda: {"x": _noise(1, 3, 32, 32)},
    "residual": lambda: {"input": _noise(1, 16, 12, 12)},
    "conv1d": lambda: {"input": _noise(1, 8, 40)},
    "conv3d": lambda: {"input": _noise(1, 3, 6, 12, 12)},
    "conv_transpose1d": lambda: {"input": _noise(1, 8, 10)},
    "conv_transpose2d": lambda: {"input": _noise(1, 8, 6, 6)},
    "conv_transpose3d": lambda: {"input": _noise(1, 8, 4, 4, 4)},
    "linear_norm": lambda: {"input": _noise(2, 32)},
    "shared_weights": lambda: {"x": _noise(2, 64)},
    "matmul_forms": lambda: {"x": _noise(2, 3, 32)},
    "nested_outputs": lambda: {"x": _noise(2, 16)},
    "keyword_only": lambda: {
        "features": _noise(2, 16),
        "context": {"gate": _noise(2, 8), "shift": _noise(16)},
        "mask": (_noise(2, 1) > 0).float(),
    },
}


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model of these tables or one of torchvision's, with its positional and named inputs.

    Torchvision's keep their own weights where they have batch norms: without other statistics they are tame.
    """
    if name in MODELS:
        return MODELS[name](), (), EXAMPLES[name]()
    found = torchvision_inputs.entry(name, "smallest")
    torch.manual_seed(0)
    model = references.resolve(found.reference)().eval()
    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        randomize(model)
    return model, torchvision_inputs.example_inputs(found.reference, "smallest"), {}
