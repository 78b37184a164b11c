"""How one output agrees with FP32: figures computed in FP64, and what each is called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from armopt.errors import InputError

#: TorchBench's bound for BF16.
MIN_COSINE = 0.99


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that a gate can bound: its name, whether more is better, and what it is in one line."""

    name: str
    higher: bool
    meaning: str


#: Of every output. Those of tasks are in :mod:`armopt.accuracy.tasks`.
METRICS = {
    metric.name: metric
    for metric in (
        Metric("cosine", True, "cosine similarity to FP32"),
        Metric("sqnr", True, "signal to quantization noise ratio, in dB"),
        Metric("max_abs", False, "largest absolute error"),
        Metric("mean_abs", False, "mean absolute error"),
        Metric("max_rel", False, "largest absolute error over the largest FP32 value"),
        Metric("mean_rel", False, "mean absolute error over the mean absolute FP32 value"),
        Metric("rmse_ratio", False, "error against FP64 over FP32's own error against FP64"),
        Metric("nan", False, "values that are NaN and are not in FP32"),
        Metric("inf", False, "values that are infinite and are not in FP32"),
    )
}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How one output agrees with FP32.

    Attributes:
        output: Its name.
        cosine: Cosine similarity; 1 for two zero tensors.
        sqnr_db: Signal to quantization noise ratio, in dB; None where there is no noise.
        max_abs: Largest absolute error.
        mean_abs: Mean absolute error.
        max_rel: Largest absolute error over the largest reference value.
        finite: Whether infinities and NaNs stand where they do in FP32, and nowhere else.
        mean_rel: Mean absolute error over the mean absolute reference value.
        nan: Values that are NaN and are not in FP32.
        inf: Values that are infinite and are not so in FP32.
        rmse_ratio: Root mean square error against FP64 over FP32's own; None without an anchor, or where FP32 is exact.
    """

    output: str
    cosine: float
    sqnr_db: float | None
    max_abs: float
    mean_abs: float
    max_rel: float
    finite: bool
    mean_rel: float = 0.0
    nan: int = 0
    inf: int = 0
    rmse_ratio: float | None = None

    def value(self, metric: str) -> float | None:
        """The figure that gates call `metric`; None where there is none."""
        if metric == "sqnr":
            return math.inf if self.sqnr_db is None else self.sqnr_db
        found: float | None = getattr(self, metric)
        return found


def compare(output: str, reference: torch.Tensor, found: torch.Tensor, anchor: torch.Tensor | None = None) -> Accuracy:
    """Metrics of one output, computed in FP64.

    Args:
        output: Its name.
        reference: What the original gives in FP32, of any shape.
        found: What is compared with it, of the same shape.
        anchor: What the original gives in FP64.

    Raises:
        InputError: The shapes differ.
    """
    if reference.shape != found.shape:
        raise InputError(
            f"shape {tuple(found.shape)}, the original gives {tuple(reference.shape)}",
            where=f"output {output}",
            hint="Is the bundle made from this model?",
        )
    a, b = reference.detach().double().flatten(), found.detach().double().flatten()
    both = torch.isfinite(a) & torch.isfinite(b)
    alike = both | (a == b) | (a.isnan() & b.isnan())
    finite = bool(alike.all())
    nan = int((b.isnan() & ~a.isnan()).sum())
    inf = int((b.isinf() & (a != b)).sum())
    exact = None if anchor is None else anchor.detach().double().flatten()
    if exact is not None:
        both &= torch.isfinite(exact)
        exact = exact[both]
    a, b = a[both], b[both]
    if a.numel() == 0:
        return Accuracy(output, 1.0, None, 0.0, 0.0, 0.0, finite, nan=nan, inf=inf)
    noise = a - b
    norms = float(a.norm()) * float(b.norm())
    cosine = float(a @ b) / norms if norms else float(float(a.norm()) == float(b.norm()))
    power = float(noise.square().sum())
    signal = float(a.square().sum())
    peak, mean = float(a.abs().max()), float(a.abs().mean())
    worst, typical = float(noise.abs().max()), float(noise.abs().mean())
    own = 0.0 if exact is None else float((a - exact).norm())
    return Accuracy(
        output=output,
        cosine=min(1.0, cosine),
        sqnr_db=10 * math.log10(signal / power) if power and signal else None,
        max_abs=worst,
        mean_abs=typical,
        max_rel=worst / peak if peak else 0.0,
        finite=finite,
        mean_rel=typical / mean if mean else 0.0,
        nan=nan,
        inf=inf,
        rmse_ratio=float((b - exact).norm()) / own if exact is not None and own else None,
    )


def compare_all(
    names: Sequence[str], reference: Sequence[Any], found: Sequence[Any], anchor: Sequence[Any] | None = None
) -> list[Accuracy]:
    """Metrics of every tensor among the outputs, in order."""
    exact = [None] * len(names) if anchor is None else anchor
    return [
        compare(name, a, b, c)
        for name, a, b, c in zip(names, reference, found, exact, strict=True)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    ]


def relative_error(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, where both are finite; in FP64.

    Zero where nothing differs; infinite where a zero reference does.
    """
    a, b = reference.detach().double().flatten(), found.detach().double().flatten()
    both = torch.isfinite(a) & torch.isfinite(b)
    noise, signal = float((a - b)[both].norm()), float(a[both].norm())
    return noise / signal if signal else (math.inf if noise else 0.0)
