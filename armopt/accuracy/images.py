"""Images from files, prepared as the model's own weights want them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from armopt.errors import InputError, first_line
from armopt.ir.records import InputSpec

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
#: What Pillow is to take them for, whatever the file says of itself.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
#: Pixels on a side; all together Pillow's own limit holds, some 90 million.
_MOST_SIDE = 32_768
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Preparation:
    """How an image becomes a tensor [3, height, width], and that in words."""

    said: str
    transform: Callable[[Any], torch.Tensor]

    def read(self, path: Path) -> torch.Tensor:
        """One image.

        Raises:
            InputError: The file is no image, or is damaged.
        """
        return self.transform(open_image(path))


def open_image(path: Path) -> Any:
    """An image in RGB, turned as its camera was held.

    Raises:
        InputError: The file is no image, or is damaged.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if max(image.size) > _MOST_SIDE:
                    raise ValueError(f"{image.width}x{image.height} pixels, more than {_MOST_SIDE} on a side")
                return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # whatever a damaged image makes Pillow say
        raise InputError(
            f"is no image that can be read: {first_line(error)}",
            where=str(path),
            hint="Remove it from the folder, or save it again",
        ) from None


def is_image(spec: InputSpec) -> bool:
    """Whether an input is a batch of RGB images: [batch, 3, height, width] in FP32, its sides fixed."""
    shape = spec.shape
    return len(shape) == 4 and shape[1] == 3 and spec.dtype == "float32" and all(isinstance(s, int) for s in shape[2:])


def preparation(spec: InputSpec, model: str) -> Preparation:
    """How images are prepared for an input.

    Args:
        spec: The input.
        model: ``torchvision:NAME`` for the transforms of that model's weights, else ImageNet's are taken.
    """
    height, width = (int(size) for size in spec.shape[2:])
    if model.startswith("torchvision:"):
        transform = _of_weights(model.removeprefix("torchvision:"))
        if transform is not None and tuple(transform(_blank()).shape) == (3, height, width):
            return Preparation(f"prepared as torchvision's weights of {model.split(':')[1]} are", transform)
    return Preparation(
        f"prepared as for ImageNet: shorter side to {_shorter(height, width)}, cut to {height}x{width} in the middle, "
        "scaled to [0, 1], normalized by ImageNet's mean and deviation",
        lambda image: _imagenet(image, height, width),
    )


def _of_weights(name: str) -> Callable[[Any], torch.Tensor] | None:
    """The transforms that torchvision publishes with a model's weights; no weights are fetched."""
    from armopt.models import torchvision_ops

    torchvision_ops.ensure_torchvision()
    from torchvision import models

    try:
        weights = next(iter(models.get_model_weights(name)))
    except (ValueError, StopIteration):
        return None
    transform: Callable[[Any], torch.Tensor] = weights.transforms()
    return transform


def _blank() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 48))


def _shorter(height: int, width: int) -> int:
    """The side before the cut: ImageNet's 256 for 224."""
    return round(min(height, width) * 256 / 224)


def _imagenet(image: Any, height: int, width: int) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    scale = max(_shorter(height, width) / min(image.size), height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    mean, std = np.asarray(_MEAN, dtype=np.float32), np.asarray(_STD, dtype=np.float32)
    return torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1).copy())


def unprepare(tensor: torch.Tensor) -> torch.Tensor:
    """[3, height, width] as pixels in [0, 1], whether it was normalized or not."""
    if float(tensor.min()) < 0 or float(tensor.max()) > 1:
        tensor = tensor * torch.tensor(_STD)[:, None, None] + torch.tensor(_MEAN)[:, None, None]
    return tensor.clamp(0, 1)
