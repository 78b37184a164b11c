"""What a call of each kernel costs: instructions retired by one thread, per core and torch build.

Tables are data in this folder, one JSON for each core and build, with their provenance. Between the measured shapes a
kernel's cost is a sum of what its call does: a fixed part, arithmetic on padded tiles, packing of the activations,
stores of the result, and reads of the weight. A core without a table plans by threshold, or by its own times.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from armopt.errors import InputError
from armopt.ir import Site, Target
from armopt.kernels import post_ops
from armopt.kernels.base import Kernel

#: Names of the terms, in the order of the coefficients.
TERMS = ("calls", "arithmetic", "packing", "merging", "input", "output", "weight")
#: A core that a table stands for where it has none of its own.
_STANDS_FOR = {"neoverse-v2": "neoverse-n2", "neoverse-v3": "neoverse-n2", "ampere-1": "neoverse-n2"}


@dataclass(frozen=True, slots=True)
class Regime:
    """Coefficients of one kernel up to a number of rows; instructions for one unit of each of :data:`TERMS`."""

    most_rows: int | None
    coefficients: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class CostTable:
    """The costs of one core and torch build.

    Attributes:
        core: E.g. ``neoverse-v1``.
        torch: Version of the aarch64 wheel.
        kernels: Regimes by kernel, fewest rows first.
        per_element: Instructions for one element of casts (``cast``) and post-ops (``bf16:relu``, ``fp32:gelu``…).
        provenance: How it was measured, and its error on shapes left out of the fit.
    """

    core: str
    torch: str
    kernels: Mapping[str, Sequence[Regime]]
    per_element: Mapping[str, float]
    provenance: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The core and build that it stands for."""
        return f"{self.core}, torch {self.torch}"

    def estimate(self, kernel: Kernel, site: Site, vector_bits: int) -> float | None:
        """Instructions of one call with its post-op; None where the table doesn't know the kernel."""
        for regime in self.kernels.get(kernel.name, ()):
            if regime.most_rows is None or site.m <= regime.most_rows:
                values = terms(site, vector_bits)
                call = sum(c * v for c, v in zip(regime.coefficients, values, strict=True))
                return call + self._post_op(kernel, site)
        return None

    def element(self, name: str) -> float:
        """Instructions for one element of a pointwise operation; a middling one where it was not measured."""
        return self.per_element.get(name, 1.0)

    def _post_op(self, kernel: Kernel, site: Site) -> float:
        """Nothing where the post-op is fused."""
        if site.post_op == post_ops.NONE or site.post_op in kernel.fuses:
            return 0.0
        dtype = "bf16" if kernel.activations == torch.bfloat16 else "fp32"
        parts = ("add", "relu") if site.post_op == post_ops.ADD_RELU else (site.post_op,)
        return site.m * site.n * sum(self.element(f"{dtype}:{part}") for part in parts)


def terms(site: Site, vector_bits: int) -> tuple[float, ...]:
    """What a call does, in units of :data:`TERMS`: tiles of 8 rows by 3 vectors by 4 terms, as the library pads."""
    columns = 3 * vector_bits // 32
    rows, width, depth = _up(site.m, 8), _up(site.n, columns), _up(site.k, 4)
    blocks = -(-depth // (16384 // (2 * columns)))
    return (
        1.0,
        float(rows * width * depth),
        float(rows * depth),
        float(site.m * width * blocks),
        float(math.prod(site.shape)),
        float(site.m * site.n),
        float(math.prod(site.weight)),
    )


def find(target: Target, torch_version: str = "2.10") -> CostTable:
    """The table for a target and a torch release.

    Raises:
        InputError: There is none for this core.
    """
    found = find_any(target, torch_version)
    if found is None:
        raise InputError(
            f"no cost table for {target.core}", hint="Use --policy threshold, or --tuning FILE from armopt tune"
        )
    return found


def find_any(target: Target, torch_version: str = "2.10") -> CostTable | None:
    """The same, or None."""
    core = _STANDS_FOR.get(target.core, target.core)
    tables = [table for table in _all() if table.core == core]
    exact = [table for table in tables if table.torch.startswith(torch_version)]
    return next(iter(exact or tables), None)


@functools.cache
def _all() -> tuple[CostTable, ...]:
    folder = resources.files(__name__)
    return tuple(
        parse(json.loads(entry.read_text()))
        for entry in sorted(folder.iterdir(), key=lambda item: item.name)
        if entry.name.endswith(".json")
    )


def parse(data: Mapping[str, Any]) -> CostTable:
    """A table from its JSON."""
    kernels = {
        name: tuple(Regime(regime["most_rows"], tuple(regime["coefficients"])) for regime in regimes)
        for name, regimes in data["kernels"].items()
    }
    return CostTable(data["core"], data["torch"], kernels, data["per_element"], data["provenance"])


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
