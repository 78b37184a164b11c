"""torchvision's models: the shapes of their inputs, example inputs, and calls that show what may vary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from armopt.errors import InputError
from armopt.models.references import TORCHVISION, Kind, kind_of, resolve

#: "natural" is what the model was made for; "smallest" is quick to run and still keeps every layer at work.
Size = Literal["natural", "smallest"]


# The resolution each was published for, where it is not 224.
_NATURAL = {
    "inception_v3": 299,
    "efficientnet_b1": 240,
    "efficientnet_b2": 260,
    "efficientnet_b3": 300,
    "efficientnet_b4": 380,
    "efficientnet_b5": 456,
    "efficientnet_b6": 528,
    "efficientnet_b7": 600,
    "efficientnet_v2_s": 384,
    "efficientnet_v2_m": 480,
    "efficientnet_v2_l": 480,
    "swin_v2_t": 256,
    "swin_v2_s": 256,
    "swin_v2_b": 256,
}
# 64 leaves 2x2 pixels after the usual five halvings; one pixel would hide what a 3x3 kernel does.
_SMALLEST = 64
# Positions are learnt for this size, or (inception) the last layers need more pixels.
_SMALLEST_EXCEPTIONS = {"vit_": 224, "maxvit_": 224, "inception_": 96}


@dataclass(frozen=True, slots=True)
class ZooEntry:
    """One torchvision model and the shapes of its inputs.

    Attributes:
        name: As in ``torchvision.models.list_models()``.
        kind: The family it belongs to.
        input_shapes: One shape for each input; for detection, the shape of each image of the one list.
    """

    name: str
    kind: Kind
    input_shapes: tuple[tuple[int, ...], ...]

    @property
    def reference(self) -> str:
        """What :func:`resolve` takes."""
        return TORCHVISION + self.name


def entry(name: str, size: Size = "natural") -> ZooEntry:
    """The entry of any torchvision model.

    Args:
        name: As in ``torchvision.models.list_models()``.
        size: Which input it gets.

    Raises:
        InputError: torchvision has no such model.
    """
    resolve(TORCHVISION + name)
    kind = kind_of(name)
    return ZooEntry(name, kind, _input_shapes(name, kind, size))


def _input_shapes(name: str, kind: Kind, size: Size) -> tuple[tuple[int, ...], ...]:
    small = size == "smallest"
    if kind == "optical_flow":  # RAFT's pyramid halves an eighth of the image three times more
        return ((1, 3, 128, 128),) * 2 if small else ((1, 3, 368, 496),) * 2
    if kind == "video":
        return (_clip(name, small),)
    if kind == "detection":
        return ((3, 64, 64) if small else (3, 480, 640),)
    if kind == "segmentation":
        return ((1, 3, 64, 64) if small else (1, 3, 520, 520),)
    name = name.removeprefix("quantized_")
    side = _NATURAL.get(name, 224)
    if small:
        side = next((least for stem, least in _SMALLEST_EXCEPTIONS.items() if name.startswith(stem)), _SMALLEST)
    return ((1, 3, side, side),)


def _clip(name: str, small: bool) -> tuple[int, ...]:
    """Channels first, then frames."""
    if name.startswith("mvit"):  # positions are learnt for this size
        return (1, 3, 16, 224, 224)
    if name == "s3d":  # its last pooling covers 2x7x7
        return (1, 3, 16, 224, 224)
    if name.startswith("swin3d"):
        return (1, 3, 8, 64, 64) if small else (1, 3, 32, 224, 224)
    return (1, 3, 8, 56, 56) if small else (1, 3, 16, 112, 112)


def example_inputs(reference: str, size: Size = "natural", seed: int = 0) -> tuple[Any, ...]:
    """Positional inputs for a torchvision model.

    Args:
        reference: ``torchvision:NAME``.
        size: Which input it gets.
        seed: Of the random numbers.

    Returns:
        Float32 tensors; for detection one list of images with values in [0, 1].

    Raises:
        InputError: Not a torchvision model.
    """
    if not reference.startswith(TORCHVISION):
        raise InputError(
            "inputs are known for torchvision's models only",
            where=reference,
            hint="Describe them with --input NAME=1x3x224x224:float32",
        )
    found = entry(reference.removeprefix(TORCHVISION).lower(), size)
    generator = torch.Generator().manual_seed(seed)
    if found.kind == "detection":
        return ([torch.rand(shape, generator=generator) for shape in found.input_shapes],)
    return tuple(torch.randn(shape, generator=generator) for shape in found.input_shapes)


def is_detection(reference: str) -> bool:
    """Whether a reference names one of torchvision's detection models, which take a list of images."""
    return reference.startswith(TORCHVISION) and entry(reference.removeprefix(TORCHVISION).lower()).kind == "detection"


def detection_calls(
    reference: str, images: Sequence[Tensor] = (), seed: int = 0
) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]:
    """Calls that show what may vary: one image, and two of other sizes in one list.

    Args:
        reference: ``torchvision:NAME`` of a detection model.
        images: To take instead of random ones; as one list, and the first alone.
        seed: Of the random ones.
    """
    if not images:
        generator = torch.Generator().manual_seed(seed)
        (shape,) = entry(reference.removeprefix(TORCHVISION).lower()).input_shapes
        sizes = (shape, (shape[0], shape[2], shape[1]), shape)
        images = [torch.rand(size, generator=generator) for size in sizes]
        return (([images[0]],), {}), (([images[1], images[2]],), {})
    if len(images) == 1:
        images = [images[0], images[0].transpose(1, 2).contiguous()]
    return (([images[0]],), {}), ((list(images),), {})
