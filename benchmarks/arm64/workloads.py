"""Whole models and the ways to run them, prepared on the emulated side (and, for bundles, built on this one)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

Inputs = tuple[Any, ...]


class Block(nn.Module):
    """One transformer block; norms in front (GPT-2) or behind (BERT)."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        b, t, width = x.shape
        q, k, v = (p(x).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.query, self.key, self.value))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, t, width))  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        approximate = "tanh" if self.causal else "none"
        if self.causal:
            x = x + self.attend(self.norm1(x))
            return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate=approximate))  # type: ignore[no-any-return]
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.down(functional.gelu(self.up(x), approximate=approximate)))  # type: ignore[no-any-return]


class Prefill(nn.Module):
    """GPT-2 small on a prompt: logits of the last token, and the cache of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        transformers = _transformers()
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config())

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.step(tokens, _transformers().DynamicCache())

    def step(self, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, ...]:
        logits = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return (logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


class Decode(Prefill):
    """GPT-2 small on one more token."""

    def forward(self, tokens: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = _transformers().DynamicCache()
        for i, (key, value) in enumerate(zip(keys.unbind(), values.unbind(), strict=True)):
            cache.update(key, value, i)
        return self.step(tokens, cache)


class Experts(nn.Module):
    """A small Mixtral's block: eight experts, of which each token asks two.

    A buffer has the router's random weights, as constant ones would send all tokens to the same two experts.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        config = _transformers().MixtralConfig(hidden_size=width, intermediate_size=hidden)
        config._experts_implementation = "grouped_mm"  # as a whole model has it
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        self.block = MixtralSparseMoeBlock(config)
        for parameter in self.block.parameters():
            nn.init.normal_(parameter, std=0.02)
        router = self.block.gate
        del router.weight
        router.register_buffer("weight", torch.randn(config.num_local_experts, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)  # type: ignore[no-any-return]


def _transformers() -> Any:
    from armopt.models import torchvision_ops

    torchvision_ops.ensure_torchvision_if_installed()
    import transformers

    return transformers


def _bert() -> nn.Module:
    transformers = _transformers()
    return transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)  # type: ignore[no-any-return]


def _mlp(scale: int) -> nn.Module:
    """The tutorial's 4096-4096-11008-10, each width divided."""
    a, b = 4096 // scale, 11008 // scale
    return nn.Sequential(nn.Linear(a, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 10))


def _vision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from armopt.models import references

        return references.resolve(f"torchvision:{name}")()

    return make


def mask_rcnn() -> nn.Module:
    """Mask R-CNN for a small image, with a few proposals."""
    from armopt.models import torchvision_ops

    torchvision_ops.ensure_torchvision()
    from torchvision.models import get_model

    sizes = {"min_size": 128, "max_size": 128, "rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 50}
    options = {"weights": None, "weights_backbone": None, "num_classes": 4, "box_detections_per_img": 10}
    return get_model("maskrcnn_resnet50_fpn", **options, **sizes)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Workload:
    """A model and its inputs.

    Attributes:
        make: The model.
        inputs: Positional ones; also the shape of the one FP32 input.
        macs: Multiply-adds of one call, for the floor macs / 32.
        slow: Whether it takes minutes a call under emulation; then only `--only` and `--all` run it.
        whole: Whether it is one graph.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs] | tuple[int, ...]
    macs: int
    slow: bool = False
    whole: bool = True

    def build(self) -> tuple[nn.Module, Inputs]:
        """The seeded model in eval mode, and its input."""
        torch.manual_seed(0)
        model = self.make().eval()
        return model, (torch.randn(self.inputs),) if isinstance(self.inputs, tuple) else self.inputs()

    def build_quickly(self) -> tuple[nn.Module, Inputs]:
        """The same with constant weights: random ones take minutes under emulation, and no kernel looks at them."""
        made = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
        with mock.patch.multiple(nn.init, **{name: lambda tensor, *args, **kwargs: tensor for name in made}):
            model, inputs = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(2**-6)
        return model, inputs


def _mlp_at(batch: int, scale: int) -> Workload:
    a, b = 4096 // scale, 11008 // scale
    macs = batch * (a * a + a * b + b * 10)
    return Workload(lambda: _mlp(scale), (batch, a), macs, slow=scale == 1)


def _block_at(tokens: int, *, causal: bool) -> Workload:
    return Workload(lambda: Block(768, 12, causal=causal), (1, tokens, 768), tokens * 768 * (12 * 768 + 2 * tokens))


def _experts_at(tokens: int, width: int = 512, hidden: int = 1024) -> Workload:
    macs = tokens * (2 * 3 * width * hidden + 8 * width)
    return Workload(lambda: Experts(width, hidden), (1, tokens, width), macs)


def _image() -> torch.Tensor:
    return torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))


def _tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 30000, (1, length))


def _gpt2_macs(tokens: int, past: int) -> int:
    """Linear layers, the head for the last token, and attention."""
    return tokens * 12 * 12 * 768**2 + 50257 * 768 + 12 * 2 * tokens * (tokens + past) * 768


WORKLOADS = {
    **{f"mlp/4 batch {batch}": _mlp_at(batch, 4) for batch in (10, 32, 256)},
    **{f"mlp batch {batch}": _mlp_at(batch, 1) for batch in (10, 32, 256)},
    "gpt2 block, 64 tokens": _block_at(64, causal=True),
    "gpt2 block, 1 token": _block_at(1, causal=True),
    "bert block, 128 tokens": _block_at(128, causal=False),
    "mixtral experts, 64 tokens": _experts_at(64),
    "mixtral experts, 1 token": _experts_at(1),
    "gpt2, prefill of 64": Workload(Prefill, lambda: (_tokens(64),), _gpt2_macs(64, 0), slow=True),
    "gpt2, decode after 64": Workload(
        Decode, lambda: (_tokens(1), *torch.randn(2, 12, 1, 12, 64, 64).unbind()), _gpt2_macs(1, 64), slow=True
    ),
    "bert base, 128 tokens": Workload(_bert, lambda: (_tokens(128),), 12 * 128 * 768 * (12 * 768 + 2 * 128), slow=True),
    "mobilenet_v3_large 224": Workload(_vision("mobilenet_v3_large"), (1, 3, 224, 224), 216_589_760),
    "efficientnet_b0 224": Workload(_vision("efficientnet_b0"), (1, 3, 224, 224), 385_814_752, slow=True),
    "resnet50 224": Workload(_vision("resnet50"), (1, 3, 224, 224), 4_089_184_256, slow=True),
    "convnext_tiny 224": Workload(_vision("convnext_tiny"), (1, 3, 224, 224), 4_455_531_264, slow=True),
    "vit_b_16 224": Workload(_vision("vit_b_16"), (1, 3, 224, 224), 17_563_828_992, slow=True),
    "swin_t 224": Workload(_vision("swin_t"), (1, 3, 224, 224), 4_490_566_656, slow=True),
    "mask r-cnn 128": Workload(mask_rcnn, lambda: ([_image()],), 8_357_514_240, slow=True, whole=False),
    "empty": Workload(nn.ReLU, (1, 16), 0),
}


def eager(workload: str, dtype: str = "float32", channels_last: bool = False) -> Callable[[], Any]:
    """The model as users call it."""
    each = WORKLOADS[workload]
    # what a detection model finds, and so what it does, depends on its weights
    model, inputs = each.build_quickly() if each.whole else each.build()
    kind = getattr(torch, dtype)
    model = model.to(kind)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    prepared = [_prepared(x, kind, channels_last) for x in inputs]
    return lambda: model(*prepared)


def _prepared(x: Any, dtype: torch.dtype, channels_last: bool) -> Any:
    if isinstance(x, list):
        return [_prepared(each, dtype, channels_last) for each in x]
    x = x.to(dtype) if x.is_floating_point() else x
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x


def inductor(workload: str) -> Callable[[], Any]:
    """The calls that Inductor emits with freezing: batch norms folded, weights packed, channels_last."""
    model, inputs = WORKLOADS[workload].build_quickly()
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        from torch.fx.experimental import optimization

        model = optimization.fuse(model)
    for name, module in list(model.named_modules()):
        packed = _packed(module)
        if packed is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, packed)
    prepared = [_prepared(x, torch.float32, True) for x in inputs]
    return lambda: model(*prepared)


def _packed(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.Linear):
        return PackedLinear(module.weight, module.bias)
    if type(module).__name__ == "Conv1D":  # transformers' name for addmm(bias, x, weight)
        weight: Any = module.weight
        return PackedLinear(weight.t().contiguous(), module.bias)
    if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str):
        return PackedConv(module)
    return None


class PackedLinear(nn.Module):
    """mkldnn::_linear_pointwise without a post-op."""

    def __init__(self, weight: Any, bias: Any) -> None:
        super().__init__()
        self.plain, self.bias = weight.detach(), bias
        self.packed: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None:  # Inductor knows the rows of the input when it packs
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.plain, x.numel() // x.shape[-1])
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]


class PackedConv(nn.Module):
    """mkldnn::_convolution_pointwise without a post-op."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.geometry = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        self.plain, self.bias = conv.weight.detach(), conv.bias
        self.packed: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(self.plain, *self.geometry, list(x.shape))
        call = torch.ops.mkldnn._convolution_pointwise
        return call(x, self.packed, self.bias, *self.geometry, "none", [], "")  # type: ignore[no-any-return]
