"""All of torchvision's models."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial

import torch

from armopt.models import references, torchvision_inputs, torchvision_ops
from benchmarks import random_weights
from benchmarks.coverage.cases import Case, Sample

SECTION = "torchvision"
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
        yield Case(SECTION, references.kind_of(name), name, partial(build, name))


def build(name: str) -> Sample:
    """A model by name, with random weights, on an input of the size that it was made for."""
    from tests import detection

    if references.kind_of(name) == "detection":
        images = [detection.images(*sizes) for sizes in (((3, 96, 128),), detection.IMAGES)]
        return Sample(detection.named(name), tuple(((each,), {}) for each in images), detects=True)
    found = torchvision_inputs.entry(name)
    torch.manual_seed(0)
    model = random_weights.randomize(references.resolve(found.reference)())
    return Sample(model, ((torchvision_inputs.example_inputs(found.reference), {}),))
