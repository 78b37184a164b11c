"""Language: is the same token next?"""

from __future__ import annotations

import contextlib
import math
from typing import ClassVar

import torch

from armopt.accuracy.metrics import Metric
from armopt.accuracy.tasks.base import Outputs, Sample, Task, last, tokens
from armopt.errors import InputError

_NAMES = ("logits", "prediction_logits", "lm_logits", "output")
#: Greedy steps to look for a divergence.
_STEPS = 16


class Language(Task):
    """Next tokens, on logits [batch, length, vocabulary] over tokens [batch, length].

    Generation is greedy, from the first half of the tokens, for up to sixteen steps; it is compared where the model is
    causal, that is where a later token does not change earlier logits. Source of the divergence point: until the two
    sides differ their sequences are the same, so one call of the bundle on FP32's sequence finds it.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("next_token", True, "positions whose likeliest token is FP32's"),
        Metric("kl", False, "mean Kullback-Leibler divergence of the next token from FP32, in nats"),
        Metric("perplexity_drift", False, "relative change of the perplexity of the tokens given, without its sign"),
        Metric("greedy_tokens", True, "share of greedily generated tokens before the first that differs from FP32"),
    )
    needs: ClassVar[str] = "an output [batch, length, vocabulary] and integer tokens [batch, length]"

    def __init__(self) -> None:
        self._positions = self._alike = self._scored = 0
        self._kl = self._drift = 0.0
        self._generated: float | None = None
        self._asked = False

    @classmethod
    def fits(cls, inputs: Outputs, outputs: Outputs, *, asked: bool) -> bool:
        """Whether there are logits for each of some tokens; unasked, under a name that says so."""
        found = cls._logits(inputs, outputs)
        return found is not None and (asked or last(found[0]) in _NAMES)

    @classmethod
    def _logits(cls, inputs: Outputs, outputs: Outputs) -> tuple[str, str] | None:
        """The names of the logits and of their tokens."""
        pairs = [
            (name, given)
            for name, y in outputs.items()
            for given, x in tokens(inputs).items()
            if y.dim() == 3
            and y.is_floating_point()
            and y.shape[:2] == x.shape
            and x.numel()
            and y.shape[2] > int(x.max())
        ]
        named = [pair for pair in pairs if last(pair[0]) in _NAMES]
        return next(iter(named or pairs), None)

    def update(self, sample: Sample) -> None:
        """Compares the distributions at every position; on the first sample generation too."""
        names = self._logits(sample.inputs, sample.reference)
        if names is None:
            return
        logits, given = names
        a, b = (side[logits].double().log_softmax(-1) for side in (sample.reference, sample.found))
        self._alike += int((a.argmax(-1) == b.argmax(-1)).sum())
        self._positions += a.shape[0] * a.shape[1]
        terms = a.exp() * (a - b)
        self._kl += float(terms.nan_to_num(0.0).sum())  # a masked token: 0 * (-inf + inf)
        following = sample.inputs[given][:, 1:].long().unsqueeze(-1)
        drift = a[:, :-1].gather(-1, following) - b[:, :-1].gather(-1, following)
        self._drift += float(drift.nan_to_num(0.0).sum())
        self._scored += drift.numel()
        if not self._asked:
            self._asked = True
            self._generated = _generate(sample, logits, given)

    def results(self) -> dict[str, float]:
        """Means over all positions."""
        if not self._positions:
            return {}
        results = {"next_token": self._alike / self._positions, "kl": max(0.0, self._kl / self._positions)}
        if self._scored:
            results["perplexity_drift"] = abs(math.expm1(self._drift / self._scored))
        if self._generated is not None:
            results["greedy_tokens"] = self._generated
        return results


def _generate(sample: Sample, logits: str, given: str) -> float | None:
    """The share of greedy tokens before the first that differs; None where the model is not causal, or takes other
    tokens than it gives."""
    if "generated" not in sample.memo:
        sample.memo["generated"] = None
        with contextlib.suppress(InputError):
            sample.memo["generated"] = _generate_reference(sample, logits, given)
    wanted: torch.Tensor | None = sample.memo["generated"]
    if wanted is None:
        return None
    ids = sample.inputs[given].clone()
    start, steps = max(1, ids.shape[1] // 2), wanted.shape[1]
    ids[:, start : start + steps] = wanted
    found = sample.run_found({**sample.inputs, given: ids})[logits][:, start - 1 : start - 1 + steps].argmax(-1)
    return float((found == wanted).long().cumprod(1).double().mean())


def _generate_reference(sample: Sample, logits: str, given: str) -> torch.Tensor | None:
    """What the original generates greedily, [batch, steps]; None where it is not causal, or there is no room."""
    ids = sample.inputs[given].clone()
    length = ids.shape[1]
    start = max(1, length // 2)
    steps = min(_STEPS, length - start)
    if steps < 1:
        return None
    changed = ids.clone()
    changed[:, start:] = (changed[:, start:] + 1) % sample.reference[logits].shape[-1]
    again = sample.run_reference({**sample.inputs, given: changed})[logits][:, :start]
    before = sample.reference[logits][:, :start]
    scale = float(before[before.isfinite()].abs().max())
    if not torch.allclose(again, before, rtol=1e-4, atol=1e-4 * scale):
        return None
    for step in range(start, start + steps):
        scores = sample.reference[logits]
        if step > start:
            scores = sample.run_reference({**sample.inputs, given: ids})[logits]
        ids[:, step] = scores[:, step - 1].argmax(-1)
    return ids[:, start : start + steps].long()
