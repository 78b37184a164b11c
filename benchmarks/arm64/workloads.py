"""Whole models and the ways to run them, prepared on the emulated side (and, for bundles, built on this one)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Inputs = tuple[torch.Tensor, ...]


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


def _mlp(scale: int) -> nn.Module:
    """The tutorial's 4096-4096-11008-10, each width divided."""
    a, b = 4096 // scale, 11008 // scale
    return nn.Sequential(nn.Linear(a, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 10))


def _vision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from armopt import zoo

        return zoo.resolve(f"torchvision:{name}")()

    return make


@dataclass(frozen=True)
class Workload:
    """A model and the shape of its one FP32 input.

    Attributes:
        make: The model.
        shape: Of the input.
        macs: Multiply-adds of one call, for the floor macs / 32.
        slow: Whether it takes minutes a call under emulation; then only `--only` runs it.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    macs: int
    slow: bool = False

    def build(self) -> tuple[nn.Module, Inputs]:
        """The seeded model in eval mode, and its input."""
        torch.manual_seed(0)
        model = self.make().eval()
        return model, (torch.randn(self.shape),)


def _mlp_at(batch: int, scale: int) -> Workload:
    a, b = 4096 // scale, 11008 // scale
    macs = batch * (a * a + a * b + b * 10)
    return Workload(lambda: _mlp(scale), (batch, a), macs, slow=scale == 1)


def _block_at(tokens: int, *, causal: bool) -> Workload:
    return Workload(lambda: Block(768, 12, causal=causal), (1, tokens, 768), tokens * 768 * (12 * 768 + 2 * tokens))


WORKLOADS = {
    **{f"mlp/4 batch {batch}": _mlp_at(batch, 4) for batch in (10, 32, 256)},
    **{f"mlp batch {batch}": _mlp_at(batch, 1) for batch in (10, 32, 256)},
    "gpt2 block, 64 tokens": _block_at(64, causal=True),
    "gpt2 block, 1 token": _block_at(1, causal=True),
    "bert block, 128 tokens": _block_at(128, causal=False),
    "mobilenet_v3_large 224": Workload(_vision("mobilenet_v3_large"), (1, 3, 224, 224), 216_589_760),
    "resnet50 224": Workload(_vision("resnet50"), (1, 3, 224, 224), 4_089_184_256, slow=True),
}


def eager(workload: str, dtype: str = "float32", channels_last: bool = False) -> Callable[[], Any]:
    """The model as users call it."""
    model, inputs = WORKLOADS[workload].build()
    kind = getattr(torch, dtype)
    model = model.to(kind)
    inputs = tuple(x.to(kind) for x in inputs)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)
    return lambda: model(*inputs)
