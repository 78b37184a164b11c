"""Pictures for the report: the input as the model saw it, with FP32's result and BF16's side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from armopt.accuracy.checker import Evidence
from armopt.accuracy.images import unprepare
from armopt.accuracy.tasks import Outputs
from armopt.accuracy.tasks.detection import MIN_SCORE, groups
from armopt.accuracy.tasks.segmentation import Segmentation

_WIDEST = 460
#: Colours that stay apart on photographs; by class or by object, in turn.
_COLOURS = (
    *((230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (0, 170, 170), (240, 50, 230)),
    *((128, 128, 0), (170, 110, 40), (128, 0, 0), (0, 0, 128), (255, 225, 25)),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The same picture with both results, as data URLs, and what is to be seen."""

    title: str
    reference: str
    found: str
    said: str = ""


def pairs(evidence: Evidence, task: str) -> list[Pair]:
    """Pictures of the images of one call; none where the task has none or the inputs are no images."""
    pictures = [unprepare(image.detach().float().cpu()) for image in _images(evidence.inputs)]
    if task == "detection":
        return _detections(pictures, evidence)
    if task == "segmentation":
        return _segmentations(pictures, evidence)
    return []


def first_image(evidence: Evidence) -> str:
    """The first image that the model saw, as a data URL; empty where there is none."""
    found = _images(evidence.inputs)
    return _url(_pillow(unprepare(found[0].detach().float()))) if found else ""


def _images(inputs: Outputs) -> list[torch.Tensor]:
    """Every [3, height, width] among the inputs."""
    found = []
    for x in inputs.values():
        if x.is_floating_point() and x.dim() in (3, 4) and x.shape[-3] == 3 and min(x.shape[-2:]) >= 16:
            found += list(x) if x.dim() == 4 else [x]
    return found


def _detections(pictures: Sequence[torch.Tensor], evidence: Evidence) -> list[Pair]:
    others = dict(groups(evidence.found))
    shown = []
    for i, (picture, (prefix, wanted)) in enumerate(zip(pictures, groups(evidence.reference), strict=False)):
        found = others.get(prefix, {})
        if not found:
            continue
        counts = [int((side["scores"] >= MIN_SCORE).sum()) for side in (wanted, found)]
        said = f"FP32 {counts[0]} objects, BF16 {counts[1]}, of a score of {MIN_SCORE} or more"
        title = f"image {i + 1}"
        shown.append(Pair(title, _url(_boxes(picture, wanted)), _url(_boxes(picture, found)), said))
    return shown


def _boxes(picture: torch.Tensor, objects: Outputs) -> Any:
    """The picture with boxes, labels, scores and, where there are any, masks."""
    from PIL import ImageDraw

    sure = objects["scores"] >= MIN_SCORE
    image = picture.clone()
    masks = objects.get("masks")
    labels = [int(label) for label in objects["labels"][sure]]
    if masks is not None:
        for label, mask in zip(labels, masks[sure].float(), strict=True):
            inside = mask.reshape(mask.shape[-2:]) > 0.5
            if inside.shape == image.shape[1:]:
                colour = torch.tensor(_colour(label)) / 255
                image[:, inside] = 0.5 * image[:, inside] + 0.5 * colour[:, None]
    shown = _pillow(image)
    scale = shown.width / picture.shape[2]
    draw = ImageDraw.Draw(shown)
    boxes, scores = objects["boxes"][sure].tolist(), objects["scores"][sure].tolist()
    for label, box, score in zip(labels, boxes, scores, strict=True):
        x0, y0, x1, y1 = (scale * side for side in box)
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=_colour(label), width=2)
        said, corner = f"{label}: {score:.2f}", (x0 + 3, y0 + 1)
        draw.rectangle(draw.textbbox(corner, said), fill=_colour(label))
        draw.text(corner, said, fill=(255, 255, 255))
    return shown


def _segmentations(pictures: Sequence[torch.Tensor], evidence: Evidence) -> list[Pair]:
    name = Segmentation.scores(evidence.reference)
    if name is None:
        return []
    wanted, found = evidence.reference[name].argmax(1), evidence.found[name].argmax(1)
    shown = []
    for i, (picture, a, b) in enumerate(zip(pictures, wanted, found, strict=False)):
        if a.shape == picture.shape[1:]:
            share = 100 * float((a == b).double().mean())
            said = f"{share:.3f} % of the pixels have the same class"
            shown.append(Pair(f"image {i + 1}", _url(_classes(picture, a)), _url(_classes(picture, b)), said))
    return shown


def _classes(picture: torch.Tensor, classes: torch.Tensor) -> Any:
    """The picture with its pixels tinted by class; class 0 is the background."""
    palette = torch.tensor([(255, 255, 255), *_COLOURS]) / 255
    tint = palette[torch.where(classes == 0, 0, (classes - 1) % len(_COLOURS) + 1)].permute(2, 0, 1)
    mixed = torch.where(classes == 0, picture, 0.45 * picture + 0.55 * tint)
    return _pillow(mixed)


def _colour(label: int) -> tuple[int, int, int]:
    return _COLOURS[label % len(_COLOURS)]


def _pillow(picture: torch.Tensor) -> Any:
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    if image.width <= _WIDEST:
        return image
    return image.resize((_WIDEST, round(image.height * _WIDEST / image.width)), Image.Resampling.BILINEAR)


def _url(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
