"""Compares what a bundle computes with the original in FP32."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from armopt.errors import InputError
from armopt.kernels import aten
from armopt.kernels.ops import CONV, LINEAR

#: TorchBench's bound for BF16.
MIN_COSINE = 0.99


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
        finite: Whether every value that is finite in FP32 is so here.
    """

    output: str
    cosine: float
    sqnr_db: float | None
    max_abs: float
    mean_abs: float
    max_rel: float
    finite: bool


def compare(output: str, reference: torch.Tensor, found: torch.Tensor) -> Accuracy:
    """Metrics of one output, computed in FP64.

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
    finite = bool(torch.equal(torch.isfinite(a), torch.isfinite(b)))
    both = torch.isfinite(a) & torch.isfinite(b)
    a, b = a[both], b[both]
    if a.numel() == 0:
        return Accuracy(output, 1.0, None, 0.0, 0.0, 0.0, finite)
    noise = a - b
    norms = float(a.norm() * b.norm())
    cosine = float(a @ b) / norms if norms else float(float(a.norm()) == float(b.norm()))
    power = float(noise.square().sum())
    signal = float(a.square().sum())
    peak = float(a.abs().max())
    worst = float(noise.abs().max())
    return Accuracy(
        output=output,
        cosine=min(1.0, cosine),
        sqnr_db=10 * math.log10(signal / power) if power and signal else None,
        max_abs=worst,
        mean_abs=float(noise.abs().mean()),
        max_rel=worst / peak if peak else 0.0,
        finite=finite,
    )


def compare_all(names: Sequence[str], reference: Sequence[Any], found: Sequence[Any]) -> list[Accuracy]:
    """Metrics of every tensor among the outputs, in order."""
    return [
        compare(name, a, b)
        for name, a, b in zip(names, reference, found, strict=True)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    ]


def summary(found: Mapping[str, Sequence[Accuracy]], *, min_cosine: float, reference: str) -> dict[str, Any]:
    """The report: worst cosine over all buckets and outputs, the gate, and every figure.

    Args:
        found: Accuracies by bucket.
        min_cosine: The gate.
        reference: What was compared with, in words.
    """
    every = [accuracy for entries in found.values() for accuracy in entries]
    floats = every or [Accuracy("none", 1.0, None, 0.0, 0.0, 0.0, True)]
    cosine = min(accuracy.cosine for accuracy in floats)
    finite = all(accuracy.finite for accuracy in floats)
    return {
        "cosine": cosine,
        "max_abs": max(accuracy.max_abs for accuracy in floats),
        "finite": finite,
        "min_cosine": min_cosine,
        "passed": bool(cosine >= min_cosine and finite),
        "reference": reference,
        "outputs": {bucket: [asdict(accuracy) for accuracy in entries] for bucket, entries in found.items()},
    }


class InFp32(fx.Interpreter):
    """Runs a lowered program without its roundings of activations: weights as they are stored, all else in FP32."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sends each layer to plain ATen, and drops casts to BF16."""
        if target is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            return args[0]
        if target in (LINEAR, CONV):
            plain = aten.LINEAR if target is LINEAR else aten.CONV
            args = (*args[:-1], plain.name)
        return super().call_function(target, args, kwargs)
