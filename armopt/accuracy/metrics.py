"""How one output agrees with FP32: figures computed in FP64, and what each is called.

Numbers are judged by their errors, indices and flags by how many of them are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from armopt.accuracy import columns
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
        Metric("column", True, "cosine similarity of the worst column or channel, less its mean"),
        Metric("equal", True, "share of equal values, of integers and booleans"),
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
        cosine: Cosine similarity; 1 for two zero tensors, None for integers and booleans.
        sqnr_db: Signal to quantization noise ratio, in dB; None where there is no noise, or no signal.
        max_abs: Largest absolute error.
        mean_abs: Mean absolute error.
        max_rel: Largest absolute error over the largest reference value.
        finite: Whether infinities and NaNs stand where they do in FP32, and nowhere else.
        mean_rel: Mean absolute error over the mean absolute reference value.
        nan: Values that are NaN and are not in FP32.
        inf: Values that are infinite and are not so in FP32.
        left_out: Values that are NaN or infinite alike on both sides, and in no other figure.
        rmse_ratio: Root mean square error against FP64 over FP32's own; None without an anchor, or where FP32 is exact.
        column: The least of any column's or channel's cosine similarity once its own mean is taken away, which a large
            common value hides from `cosine`; None where nothing varies.
        column_at: That column: ``[..., 2]``, ``[:, 5]``; empty where it is the whole output.
        equal: Share of equal values, of integers and booleans; None for all else.
        sizes: How its shape differs from FP32's, in words; nothing agrees then. Empty where it does not.
    """

    output: str
    cosine: float | None
    sqnr_db: float | None
    max_abs: float
    mean_abs: float
    max_rel: float
    finite: bool
    mean_rel: float = 0.0
    nan: int = 0
    inf: int = 0
    left_out: int = 0
    rmse_ratio: float | None = None
    column: float | None = None
    column_at: str = ""
    equal: float | None = None
    sizes: str = ""

    @property
    def discrete(self) -> bool:
        """Whether it holds integers or booleans: indices, classes, flags."""
        return self.equal is not None

    @property
    def similarity(self) -> float:
        """The cosine, or of integers and booleans the share of equal values."""
        figure = self.equal if self.cosine is None else self.cosine
        return 1.0 if figure is None else figure

    def value(self, metric: str) -> float | None:
        """The figure that gates call `metric`; None where there is none."""
        lost = math.inf if self.max_abs else 0.0  # an error where FP32 has nothing but zeros
        match metric:
            case "sqnr" if self.sqnr_db is None:
                return math.inf if not self.max_abs else -math.inf
            case "sqnr":
                return self.sqnr_db
            case "max_rel" | "mean_rel":
                return float(getattr(self, metric)) or lost
        found: float | None = getattr(self, metric)
        return found


def compare(output: str, reference: torch.Tensor, found: torch.Tensor, anchor: torch.Tensor | None = None) -> Accuracy:
    """Metrics of one output, computed in FP64.

    Args:
        output: Its name.
        reference: What the original gives in FP32, of any shape. Complex numbers count as pairs of real ones.
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
    shaped = real_values(reference), real_values(found)
    a, b = (side.flatten() for side in shaped)
    both = torch.isfinite(a) & torch.isfinite(b)
    alike = both | (a == b) | (a.isnan() & b.isnan())
    exact = None if anchor is None or anchor.shape != reference.shape else real_values(anchor).flatten()
    own, against_exact = 0.0, 0.0
    if exact is not None:
        known = both & torch.isfinite(exact)
        own, against_exact = (float((side - exact)[known].norm()) for side in (a, b))
    entry = replace(
        _of_numbers(output, a[both], b[both]),
        finite=bool(alike.all()),
        nan=int((b.isnan() & ~a.isnan()).sum()),
        inf=int((b.isinf() & (a != b)).sum()),
        left_out=int((alike & ~both).sum()),
        rmse_ratio=against_exact / own if own else None,
    )
    if is_discrete(reference):
        equal = float((reference == found).double().mean()) if reference.numel() else 1.0
        return replace(entry, cosine=None, equal=equal)
    worst = columns.worst(*shaped)
    return entry if worst is None else replace(entry, column=worst.cosine, column_at=worst.place)


def of_other_sizes(
    output: str, reference: torch.Tensor, found: torch.Tensor, anchor: torch.Tensor | None = None
) -> Accuracy:
    """Metrics of an output whose sizes depend on data, as in ``x[x > 0]``, and differ by rounding: those of zeros."""
    sizes = f"{output} has the sizes {list(found.shape)}, in FP32 {list(reference.shape)}"
    entry = replace(compare(output, reference, torch.zeros_like(reference)), sizes=sizes)
    return replace(entry, equal=0.0) if entry.discrete else replace(entry, cosine=0.0)


def is_discrete(tensor: torch.Tensor) -> bool:
    """Whether it holds integers or booleans, of which one is right or wrong and not nearly right."""
    return not tensor.is_floating_point() and not tensor.is_complex()


def real_values(tensor: torch.Tensor) -> torch.Tensor:
    """In FP64; of complex numbers [..., n] the real and the imaginary parts beside each other, [..., 2 n]."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(torch.atleast_1d(tensor.resolve_conj()))  # type: ignore[no-untyped-call]
        return tensor.flatten(-2).double()
    return tensor.double()


def _of_numbers(output: str, a: torch.Tensor, b: torch.Tensor) -> Accuracy:
    """The figures of finite values, flat, in FP64."""
    if a.numel() == 0:
        return Accuracy(output, 1.0, None, 0.0, 0.0, 0.0, finite=True)
    noise = (a - b).abs()
    power, signal = float(noise.square().sum()), float(a.square().sum())
    peak, mean = float(a.abs().max()), float(a.abs().mean())
    worst, typical = float(noise.max()), float(noise.mean())
    return Accuracy(
        output=output,
        cosine=_cosine(a, b),
        sqnr_db=10 * math.log10(signal / power) if power and signal else None,
        max_abs=worst,
        mean_abs=typical,
        max_rel=worst / peak if peak else 0.0,
        finite=True,
        mean_rel=typical / mean if mean else 0.0,
    )


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine similarity; of two single numbers, which have none, what their relative error leaves among many."""
    norms = float(a.norm()), float(b.norm())
    if not all(norms):
        return float(norms[0] == norms[1])
    if a.numel() == 1:
        return max(-1.0, 1 - (float((a - b).abs()) / norms[0]) ** 2 / 2)
    return max(-1.0, min(1.0, float((a / norms[0]) @ (b / norms[1]))))


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
    a, b = real_values(reference).flatten(), real_values(found).flatten()
    both = torch.isfinite(a) & torch.isfinite(b)
    noise, signal = float((a - b)[both].norm()), float(a[both].norm())
    return noise / signal if signal else (math.inf if noise else 0.0)
