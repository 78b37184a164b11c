"""Segmentation: do pixels keep their class?"""

from __future__ import annotations

from typing import ClassVar

import torch

from armopt.accuracy.metrics import Metric
from armopt.accuracy.tasks.base import Outputs, Sample, Task, images, scores

_NAMES = ("out", "masks", "logits", "segmentation")


class Segmentation(Task):
    """Agreement of the classes of pixels, on scores [batch, classes, height, width]; FP32's classes are the truth."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("miou", True, "mean over classes of the intersection over union of the pixels given to them"),
        Metric("mask_iou", True, "least intersection over union of a class with a hundredth of the pixels or more"),
        Metric("pixel_agreement", True, "pixels that keep their class"),
    )
    needs: ClassVar[str] = "an output [batch, classes, height, width] with at least two classes"

    def __init__(self) -> None:
        self._confusion = torch.zeros(0, 0, dtype=torch.int64)

    @classmethod
    def fits(cls, inputs: Outputs, outputs: Outputs, *, asked: bool) -> bool:
        """Whether there are scores for pixels; unasked, of an image's size."""
        name = cls.scores(outputs)
        if name is None:
            return False
        sizes = [x.shape[2:] for x in images(inputs)]
        return asked or outputs[name].shape[2:] in sizes

    @classmethod
    def scores(cls, outputs: Outputs) -> str | None:
        """The name of the output that holds them; None where none does."""
        return scores(outputs, 4, _NAMES)

    def update(self, sample: Sample) -> None:
        """Counts pixels by the class that FP32 gives them and the one found."""
        name = self.scores(sample.reference)
        if name is None:
            return
        classes = sample.reference[name].shape[1]
        wanted, won = sample.reference[name].argmax(1).flatten(), sample.found[name].argmax(1).flatten()
        counts = torch.bincount(wanted * classes + won, minlength=classes**2).reshape(classes, classes)
        self._confusion = counts if self._confusion.numel() == 0 else self._confusion + counts

    def results(self) -> dict[str, float]:
        """Over all pixels; classes that neither side gives don't count."""
        if self._confusion.numel() == 0:
            return {}
        matrix = self._confusion.double()
        total = matrix.sum()
        both = matrix.diagonal()
        union = matrix.sum(0) + matrix.sum(1) - both
        given = union > 0
        iou = both[given] / union[given]
        large = matrix.sum(1)[given] >= 0.01 * total
        return {
            "miou": float(iou.mean()),
            "mask_iou": float(iou[large].min()) if bool(large.any()) else float(iou.mean()),
            "pixel_agreement": float(both.sum() / total),
        }
