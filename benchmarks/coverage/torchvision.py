"""All of torchvision's models."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from armopt.models import references, torchvision_inputs, torchvision_ops
from benchmarks import random_weights
from benchmarks.coverage.cases import Case, Sample

SECTION = "torchvision"
#: Pixels on a side: with fewer, the last layers of a classifier have so few places that BLAS takes them.
MOST, MOST_OF_LARGE = 224, 128
#: From so many parameters on a model is large.
LARGE = 50_000_000
#: Kinds in the order of the page, as torchvision's own folders.
KINDS = ("classification", "segmentation", "detection", "video", "optical_flow", "quantization")


def names(*kinds: str) -> list[str]:
    """Every model of these kinds, all where none is given, each kind sorted by name."""
    torchvision_ops.ensure_torchvision()
    every = importlib.import_module("torchvision.models").list_models()
    by_kind: dict[str, list[str]] = {kind: [] for kind in kinds or KINDS}
    for name in every:
        by_kind.get(references.kind_of(name), []).append(name)
    return [name for found in by_kind.values() for name in sorted(found)]


def cases() -> Iterator[Case]:
    """One for each."""
    for name in names():
        yield Case(SECTION, references.kind_of(name), name, partial(build, name), _parameters(name))


def _parameters(name: str) -> int:
    """How many it has, as torchvision says."""
    weights: Any = importlib.import_module("torchvision.models").get_model_weights(name)
    return next((int(each.meta["num_params"]) for each in weights), 0)


def build(name: str) -> Sample:
    """A model by name, with random weights."""
    from tests import detection

    if references.kind_of(name) == "detection":
        images = [detection.images(*sizes) for sizes in (((3, 96, 128),), detection.IMAGES)]
        return Sample(detection.named(name), tuple(((each,), {}) for each in images), detects=True)
    torch.manual_seed(0)
    model = random_weights.randomize(references.resolve(references.TORCHVISION + name)())
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(shape, generator=generator) for shape in shapes(name))
    return Sample(model, ((inputs, {}),))


def shapes(name: str) -> tuple[tuple[int, ...], ...]:
    """Of its inputs: an image as it was made for, of 224 pixels at most; clips and pairs of images are smaller.

    Large models get smaller ones, but for those whose positions are learnt for a size.
    """
    found = torchvision_inputs.entry(name)
    if found.kind in ("video", "optical_flow"):
        return torchvision_inputs.entry(name, "smallest").input_shapes
    fixed = name.startswith(("vit_", "maxvit_"))
    most = MOST_OF_LARGE if _parameters(name) > LARGE and not fixed else MOST
    return tuple((*shape[:2], *(min(side, most) for side in shape[2:])) for shape in found.input_shapes)
