"""The models that the emulated cores run, and their bundles, made on this machine."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import armopt
from armopt import targets
from armopt.bundle import reader
from armopt.bundle.manifest import Manifest
from armopt.ir.records import Site, Target
from armopt.kernels import table
from armopt.models.torchvision_ops import ensure_torchvision
from armopt.plan import cost_policy, planner, threshold_policy
from benchmarks.arm64 import counts, models
from benchmarks.random_weights import randomize

#: What `armopt run` sets but for the allocator; what is freed goes back at once, so that memory can be counted.
BARE = {**counts.FAST_MATH, **models.FREED_AT_ONCE}


@dataclass(frozen=True)
class Example:
    """A model, the inputs for each of its buckets, and how it is planned."""

    build: Callable[[], nn.Module]
    inputs: tuple[dict[str, torch.Tensor], ...]
    batch: tuple[int, ...] = ()
    policy: planner.Policy | None = None


@dataclass(frozen=True)
class Made:
    """A bundle, the calls to make, and what they give in FP32 and by the portable twins."""

    path: Path
    manifest: Manifest
    sites: tuple[dict[str, Site], ...]
    calls: tuple[dict[str, torch.Tensor], ...]
    reference: tuple[torch.Tensor, ...]
    twin: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Prefer:
    """A policy: for each kind of layer the first of some kernels that takes it."""

    kernels: tuple[str, ...]

    @property
    def name(self) -> str:
        return "prefer=" + ",".join(self.kernels)

    def choose(self, sites: Sequence[Site], target: Target) -> Sequence[planner.Choice]:
        chosen = []
        for site in sites:
            kernels = [table.get(name) for name in self.kernels]
            fits = [kernel for kernel in kernels if kernel.op == site.op and not kernel.refuses(site)]
            chosen.append(planner.Choice(fits[0], "asked for"))
        return chosen


def mlp(*sizes: int) -> nn.Module:
    """The tutorial's: Linear and relu in turn."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ConvNet(nn.Module):
    """What a residual network is made of, once each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.wide = nn.Conv2d(32, 64, 1, 2)
        self.dilated = nn.Conv2d(64, 48, 3, padding=2, dilation=2)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.body(x) + x)
        x = nn.functional.hardswish(self.depthwise(x))
        x = nn.functional.silu(self.dilated(torch.relu(self.wide(x))))
        return self.head(x.mean((2, 3)))


class Windows(nn.Module):
    """Attention written out over windows, each with its own mask as Swin has them, and a layer with silu."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)
        self.up, self.down = nn.Linear(128, 320), nn.Linear(320, 128)
        self.register_buffer("bias", torch.linspace(-1, 1, 4 * 24 * 24).view(1, 4, 24, 24))
        self.register_buffer("mask", (torch.arange(4 * 24 * 24).view(4, 24, 24) % 7 == 0) * -100.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 24, 3, 4, 32).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * 32**-0.5) @ k.transpose(-2, -1) + self.bias
        scores = scores.view(-1, 4, 4, 24, 24) + self.mask[:, None][None]
        y = scores.view(-1, 4, 24, 24).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.silu(self.up(x)))


def _torchvision(name: str) -> nn.Module:
    ensure_torchvision()
    import torchvision

    model = randomize(getattr(torchvision.models, name)(), [(4, 3, 64, 64)])
    for block in model.modules():  # as in a trained network, a block changes its input by little
        if isinstance(block, torchvision.models.resnet.Bottleneck):
            block.bn3.weight.data.mul_(0.2)
        if isinstance(block, torchvision.models.mobilenetv2.InvertedResidual) and block.use_res_connect:
            block.conv[-1].weight.data.mul_(0.2)
    return model


def _gpt2() -> nn.Module:
    ensure_torchvision()
    import transformers

    config = transformers.GPT2Config(
        vocab_size=500,
        n_positions=96,
        n_embd=256,
        n_layer=1,
        n_head=4,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return randomize(transformers.GPT2LMHeadModel(config))


def _bert() -> nn.Module:
    ensure_torchvision()
    import transformers

    config = transformers.BertConfig(
        vocab_size=500,
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=96,
    )
    return randomize(transformers.BertModel(config))


def _noise(*shape: int) -> dict[str, torch.Tensor]:
    return {"": torch.randn(*shape, generator=torch.Generator().manual_seed(1))}


def _text(batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length * 3 // 4 :] = 0
    return {
        "input_ids": torch.randint(0, 500, (batch, length), generator=generator),
        "attention_mask": mask,
    }


# No example has a weight of the shape of an activation.
EXAMPLES = {
    "mlp": Example(
        lambda: mlp(1024, 256, 344, 10), tuple(_noise(m, 1024) for m in (1, 10, 32, 256)), batch=(1, 10, 32, 256)
    ),
    "mlp-for-2.10": Example(
        lambda: mlp(1024, 256, 344, 10),
        tuple(_noise(m, 1024) for m in (1, 10, 32, 256)),
        batch=(1, 10, 32, 256),
        policy=cost_policy.default(targets.load("graviton3"), "2.10"),
    ),
    "mlp-full-size": Example(lambda: mlp(4096, 4096, 11008, 10), (_noise(10, 4096),)),
    "resnet50": Example(lambda: _torchvision("resnet50"), (_noise(1, 3, 64, 64),)),
    "mobilenet": Example(lambda: _torchvision("mobilenet_v2"), (_noise(1, 3, 64, 64),)),
    "gpt2": Example(_gpt2, (_text(1, 72),)),
    "bert": Example(_bert, (_text(2, 40),)),
    "windows": Example(lambda: randomize(Windows()), (_noise(8, 24, 128),), policy=threshold_policy.ThresholdPolicy()),
    "convnet": Example(
        lambda: randomize(ConvNet(), [(4, 3, 32, 32)]),
        (_noise(2, 3, 32, 32),),
        policy=threshold_policy.ThresholdPolicy(),
    ),
    "fast-math": Example(
        lambda: randomize(ConvNet(), [(4, 3, 32, 32)]),
        (_noise(2, 3, 32, 32),),
        policy=Prefer(("conv_fastmath", "conv1x1_fastmath", "conv_fp32")),
    ),
}


def make(name: str, target: str, folder: Path, policy: planner.Policy | None = None) -> Made:
    """Optimizes an example for a target, and runs what can be run here."""
    example = EXAMPLES[name]
    path = folder / f"{name}-{target}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = example.build().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manifest = armopt.optimize(
            model,
            _arguments(example.inputs[-1]),
            output=path,
            target=target,
            batch=example.batch,
            policy=policy or example.policy,
        ).manifest
        portable = armopt.load(path)
    with torch.no_grad():
        reference = tuple(first(_call(model, inputs)) for inputs in example.inputs)
    twin = tuple(first(_call(portable, inputs)) for inputs in example.inputs)
    sites = tuple({site.node: site for site in each.sites.values()} for each in reader.read(path).programs)
    return Made(path, manifest, sites, example.inputs, reference, twin)


def _arguments(inputs: dict[str, torch.Tensor]) -> Any:
    return tuple(inputs.values()) if "" in inputs else inputs


def _call(model: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
    return model(inputs[""]) if "" in inputs else model(**inputs)


def first(result: Any) -> torch.Tensor:
    """The first tensor of a result: logits, or the last hidden state."""
    if isinstance(result, torch.Tensor):
        return result
    return first(next(iter(result.values() if hasattr(result, "values") else result)))
