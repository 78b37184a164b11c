"""Embedding: do the same neighbours come first?"""

from __future__ import annotations

from typing import ClassVar

import torch

from armopt.accuracy.metrics import Metric
from armopt.accuracy.tasks.base import Outputs, Sample, Task, last

_NAMES = (
    *("embedding", "embeddings", "image_embeds", "text_embeds", "sentence_embedding", "pooler_output", "features"),
    "last_hidden_state",
)
_MOST_ROWS = 2048


class Embedding(Task):
    """Agreement of rankings by cosine similarity, on vectors [batch, features] or [batch, length, features].

    Each vector in turn is the query and all others are ranked, in FP32 and as found. The ranking needs three vectors.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("ranking", True, "pairs of other vectors that a query puts in FP32's order"),
        Metric("nearest", True, "vectors whose nearest neighbour is FP32's"),
        Metric("embedding_cosine", True, "least cosine similarity of a vector to its own in FP32"),
    )
    needs: ClassVar[str] = "an output [batch, features] or [batch, length, features]"

    def __init__(self) -> None:
        self._reference: list[torch.Tensor] = []
        self._found: list[torch.Tensor] = []
        self._rows = 0

    @classmethod
    def fits(cls, inputs: Outputs, outputs: Outputs, *, asked: bool) -> bool:
        """Whether there are vectors; unasked, under a name that says so."""
        name = cls._vectors(outputs)
        return name is not None and (asked or last(name) in _NAMES)

    @classmethod
    def _vectors(cls, outputs: Outputs) -> str | None:
        fitting = [
            name for name, y in outputs.items() if y.dim() in (2, 3) and y.shape[-1] >= 2 and y.is_floating_point()
        ]
        for wanted in _NAMES:
            for name in fitting:
                if last(name) == wanted:
                    return name
        return next(iter(fitting), None)

    def update(self, sample: Sample) -> None:
        """Keeps the vectors, up to two thousand."""
        name = self._vectors(sample.reference)
        if name is None or self._rows >= _MOST_ROWS:
            return
        room = _MOST_ROWS - self._rows
        a, b = (side[name].double().flatten(0, -2)[:room] for side in (sample.reference, sample.found))
        self._reference.append(a)
        self._found.append(b)
        self._rows += a.shape[0]

    def results(self) -> dict[str, float]:
        """Over all vectors seen."""
        if not self._rows:
            return {}
        a, b = (torch.nn.functional.normalize(torch.cat(side), dim=1) for side in (self._reference, self._found))
        results = {"embedding_cosine": float((a * b).sum(1).min())}
        if a.shape[0] < 3:
            return results
        wanted, found = a @ a.T, b @ b.T
        for similarity in (wanted, found):
            similarity.fill_diagonal_(-torch.inf)
        results["nearest"] = float((wanted.argmax(1) == found.argmax(1)).double().mean())
        results["ranking"] = _concordance(wanted, found)
        return results


def _concordance(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """The share of pairs (in each row, without its diagonal) that both order alike; ties in FP32 don't count."""
    alike = total = 0
    for i in range(wanted.shape[0]):
        keep = torch.arange(wanted.shape[0]) != i
        a, b = wanted[i][keep], found[i][keep]
        if a.numel() > 256:  # enough pairs for a share to three digits
            a, b = a[:256], b[:256]
        order, again = (a[:, None] - a[None, :]).sign(), (b[:, None] - b[None, :]).sign()
        counted = order > 0
        alike += int((again[counted] > 0).sum())
        total += int(counted.sum())
    return alike / total if total else 1.0
