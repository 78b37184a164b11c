"""Classification: does the same class win?"""

from __future__ import annotations

from typing import ClassVar

import torch

from armopt.accuracy.metrics import Metric
from armopt.accuracy.tasks.base import Outputs, Sample, Task, scores

_NAMES = ("logits", "scores", "probs", "probabilities", "classes")


class Classification(Task):
    """Agreement of the first class and of the first five, on scores [batch, classes].

    Of several such outputs the first counts, unless one is called logits, scores or probabilities.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("top1", True, "rows whose highest class is FP32's"),
        Metric("top5", True, "rows whose five highest classes hold FP32's highest"),
        Metric("margin_flips", False, "rows whose class changed"),
        Metric("flip_margin", False, "largest FP32 margin between two classes, over their spread, that flipped"),
    )
    needs: ClassVar[str] = "an output [batch, classes] with at least two classes"

    def __init__(self) -> None:
        self._rows = self._first = self._five = 0
        self._margin = 0.0

    @classmethod
    def fits(cls, inputs: Outputs, outputs: Outputs, *, asked: bool) -> bool:
        """Whether there are scores of two classes or more."""
        return cls.scores(outputs) is not None

    @classmethod
    def scores(cls, outputs: Outputs) -> str | None:
        """The name of the output that holds them; None where none does."""
        return scores(outputs, 2, _NAMES)

    def update(self, sample: Sample) -> None:
        """Counts the rows that agree."""
        name = self.scores(sample.reference)
        if name is None:
            return
        reference, found = sample.reference[name].double(), sample.found[name].double()
        wanted = reference.argmax(1, keepdim=True)
        won = found.argmax(1, keepdim=True)
        five = found.topk(min(5, found.shape[1]), 1).indices
        self._rows += reference.shape[0]
        self._first += int((wanted == won).sum())
        self._five += int((five == wanted).any(1).sum())
        flipped = (wanted != won).squeeze(1)
        if bool(flipped.any()):
            margins = (reference.gather(1, wanted) - reference.gather(1, won)).squeeze(1)
            spread = reference.amax(1) - reference.amin(1)
            relative = (margins / spread.clamp_min(torch.finfo(torch.float64).tiny))[flipped]
            self._margin = max(self._margin, float(relative.max()))

    def results(self) -> dict[str, float]:
        """Rates over all rows; the flips as a count."""
        if not self._rows:
            return {}
        return {
            "top1": self._first / self._rows,
            "top5": self._five / self._rows,
            "margin_flips": float(self._rows - self._first),
            "flip_margin": self._margin,
        }
