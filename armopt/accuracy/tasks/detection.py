"""Detection: are the same objects found in the same places?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from armopt.accuracy.metrics import Metric
from armopt.accuracy.tasks.base import Outputs, Sample, Task, last

#: Boxes of one class that overlap by this much are the same object, as in PASCAL VOC and COCO's AP50.
MATCH_IOU = 0.5
#: Boxes that FP32 is less sure of than this are noise of the detector, not objects; torchvision's drawings use it too.
MIN_SCORE = 0.5


@dataclass(frozen=True, slots=True)
class Matched:
    """The objects of one image: index pairs of what belongs together, and the overlap of each pair."""

    reference: torch.Tensor
    found: torch.Tensor
    iou: torch.Tensor


class Detection(Task):
    """Boxes matched by class and IoU: ``boxes`` [n, 4] (x1, y1, x2, y2), ``labels`` and ``scores`` [n] of each image.

    The outputs of an image share a prefix (``0.boxes``, ``0.scores``…); ``masks`` [n, 1, height, width] or [n, height,
    width] are compared above a half. What FP32 scores below a half does not have to be found again.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("box_recall", True, "FP32's boxes that are found again, with the same class and an IoU of a half"),
        Metric("box_precision", True, "found boxes that FP32 has too"),
        Metric("box_iou", True, "mean IoU of the boxes that belong together"),
        Metric("score_drift", False, "largest change of a score"),
        Metric("instance_iou", True, "mean IoU of the masks that belong together"),
    )
    needs: ClassVar[str] = "outputs called boxes [n, 4], labels [n] and scores [n]"

    def __init__(self) -> None:
        self._wanted = self._found = self._again = self._known = 0
        self._iou: list[float] = []
        self._masks: list[float] = []
        self._drift = 0.0

    @classmethod
    def fits(cls, inputs: Outputs, outputs: Outputs, *, asked: bool) -> bool:
        """Whether some image has boxes, labels and scores."""
        return any(True for _ in groups(outputs))

    def update(self, sample: Sample) -> None:
        """Matches the boxes of every image."""
        found = dict(groups(sample.found))
        for prefix, a in groups(sample.reference):
            b = found.get(prefix)
            if b is None:
                continue
            matched = match(a, b)
            sure, likely = a["scores"] >= MIN_SCORE, b["scores"] >= MIN_SCORE
            self._wanted += int(sure.sum())
            self._found += int(likely.sum())
            self._again += int(sure[matched.reference].sum())
            self._known += int(likely[matched.found].sum())
            kept = sure[matched.reference]
            self._iou += matched.iou[kept].tolist()
            pairs = matched.reference[kept], matched.found[kept]
            if pairs[0].numel():
                drift = (a["scores"][pairs[0]] - b["scores"][pairs[1]]).abs()
                self._drift = max(self._drift, float(drift.max()))
                if "masks" in a and "masks" in b:
                    self._masks += mask_iou(a["masks"][pairs[0]], b["masks"][pairs[1]]).tolist()

    def results(self) -> dict[str, float]:
        """Over all images; recall and precision are 1 where there is nothing to find."""
        results = {
            "box_recall": self._again / self._wanted if self._wanted else 1.0,
            "box_precision": self._known / self._found if self._found else 1.0,
            "score_drift": self._drift,
        }
        if self._iou:
            results["box_iou"] = sum(self._iou) / len(self._iou)
        if self._masks:
            results["instance_iou"] = sum(self._masks) / len(self._masks)
        return results

    @classmethod
    def align(cls, reference: Outputs, found: Outputs) -> tuple[Outputs, Outputs]:
        """The boxes that belong together, in FP32's order; other outputs as they are."""
        left, right = dict(reference), dict(found)
        others = dict(groups(found))
        for prefix, a in groups(reference):
            b = others.get(prefix)
            if b is None:
                continue
            matched = match(a, b)
            for name in a.keys() & b.keys():
                left[prefix + name], right[prefix + name] = a[name][matched.reference], b[name][matched.found]
        return left, right


def groups(outputs: Outputs) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """For every image the prefix of its outputs' names, and its outputs by last name, all with one row for each box."""
    for name, boxes in outputs.items():
        if last(name) != "boxes" or boxes.dim() != 2 or boxes.shape[1] != 4:
            continue
        prefix = name[: -len("boxes")]
        group = {
            last(other): y
            for other, y in outputs.items()
            if other.startswith(prefix) and "." not in other[len(prefix) :] and y.shape[:1] == boxes.shape[:1]
        }
        if {"labels", "scores"} <= group.keys():
            yield prefix, group


def match(a: Outputs, b: Outputs) -> Matched:
    """Pairs boxes of the same class, the surest of `a` first, each with the free box of `b` that overlaps it most."""
    iou = box_iou(a["boxes"], b["boxes"])
    iou = torch.where(a["labels"][:, None] == b["labels"][None, :], iou, torch.zeros_like(iou))
    left, right, overlaps = [], [], []
    for i in a["scores"].argsort(descending=True, stable=True).tolist():
        if iou.shape[1] == 0:
            break
        overlap, j = iou[i].max(0)
        if float(overlap) < MATCH_IOU:
            continue
        left.append(i)
        right.append(int(j))
        overlaps.append(float(overlap))
        iou[:, j] = 0
    return Matched(
        torch.tensor(left, dtype=torch.int64), torch.tensor(right, dtype=torch.int64), torch.tensor(overlaps)
    )


def box_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of every box of `a` [n, 4] with every box of `b` [m, 4], as [n, m]."""
    a, b = a.double(), b.double()
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    both = (high - low).clamp_min(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(-1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - both
    return torch.where(union > 0, both / union, torch.zeros_like(union))


def mask_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of masks of the same shape, pair by pair; 1 for two empty ones."""
    left, right = (masks.flatten(1) > 0.5 for masks in (a.float(), b.float()))
    both, either = (left & right).sum(1).double(), (left | right).sum(1).double()
    return torch.where(either > 0, both / either, torch.ones_like(both))
