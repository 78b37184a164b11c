"""What a call of each kernel costs: instructions retired by one thread and their cycles, per core and torch build.

Tables are data in this folder, one JSON for each core and build, made by ``python -m benchmarks.arm64.costs`` from
counts on the emulated core. A kernel's library has several implementations and picks one by shape; the table has a
variant for each, with what decides, and what one unit of each of its :data:`TERMS` costs. A core without a table plans
by threshold, or by its own times.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import torch
from packaging.version import Version

from armopt.ir.records import Op, Site, Target
from armopt.kernels import post_ops
from armopt.kernels.base import Kernel

#: What a call does, in the order of a variant's coefficients: see :func:`terms`.
TERMS = (
    *("calls", "arithmetic", "pairs", "sweeps", "packing", "gathers", "merging", "tiles"),
    *("input", "output", "weight"),
)
#: Of a pointwise operation that was not measured: instructions of a call and of each element.
_MIDDLING = (8000.0, 2.0)


@dataclass(frozen=True, slots=True)
class Variant:
    """One implementation behind a kernel.

    Attributes:
        name: For people.
        rows: It computes multiples of so many rows.
        columns: It computes multiples of so many columns.
        sweep: Rows for which it reads the weight once.
        block: Terms that it sums before it goes over the result again; 0 where it does all at once.
        most_rows: It is taken up to so many rows; None where there is no bound.
        most_columns: It is taken up to so many columns; None where there is no bound.
        most_product: It is taken up to so many rows x terms x columns; None where there is no bound.
        most_channels: It is taken up to so many input channels x outputs; None where there is no bound.
        channels: It multiplies input channels of a filter by so many.
        cycles: Where the library estimates cycles and takes the least: multiplications in a cycle, bytes of activations
            packed and bytes of results merged in a cycle (0: it does neither).
        coefficients: Instructions for one unit of each of :data:`TERMS`.
        clocked: Cycles for one unit of each, with all data at hand; empty where they were not measured.
        blocks: Different blocks of instructions that a call runs.
    """

    name: str
    rows: int
    columns: int
    coefficients: tuple[float, ...]
    sweep: int = 8
    block: int = 0
    most_rows: int | None = None
    most_columns: int | None = None
    most_product: float | None = None
    most_channels: int | None = None
    channels: int = 4
    cycles: tuple[float, float, float] | None = None
    clocked: tuple[float, ...] = ()
    blocks: float = 0.0

    def fits(self, site: Site) -> bool:
        """Whether a site is within its bounds."""
        bounds = (
            (self.most_rows, site.m),
            (self.most_columns, site.n),
            (self.most_product, site.m * site.k * site.n),
            (self.most_channels, math.prod(site.weight[:2])),
        )
        return all(most is None or found <= most for most, found in bounds)


@dataclass(frozen=True, slots=True)
class CostTable:
    """The costs of one core and torch build.

    Attributes:
        core: E.g. ``neoverse-v1``.
        torch: Version of the aarch64 wheel.
        kernels: Variants by kernel, in the order of preference.
        pointwise_costs: Instructions of a call and of each element, for casts from a dtype to the other
            (``fp32:cast``) and post-ops (``bf16:relu``, ``fp32:gelu``…).
        attention_costs: Instructions of attention in ``bf16`` and ``fp32``: of each head, score and multiply-add;
            empty where none was measured.
        pointwise_cycles: As `pointwise_costs`, in cycles, and the blocks of a call; empty where they were not measured.
        attention_cycles: As `attention_costs`, in cycles.
        provenance: How it was measured, and its error on shapes left out of the fit.
    """

    core: str
    torch: str
    kernels: Mapping[str, Sequence[Variant]]
    pointwise_costs: Mapping[str, tuple[float, float]]
    provenance: Mapping[str, Any]
    attention_costs: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    pointwise_cycles: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    attention_cycles: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The core and build that it stands for."""
        return f"{self.core}, torch {self.torch}"

    @property
    def has_cycles(self) -> bool:
        """Whether a clock can make times of it."""
        return any(variant.clocked for variants in self.kernels.values() for variant in variants)

    def describe(self, cost: float) -> str:
        """A cost with its unit."""
        return f"{cost / 1e6:.3g} M instructions"

    def estimate(self, kernel: Kernel, site: Site) -> float | None:
        """Instructions of one call with its post-op; None where the table doesn't know the kernel."""
        variants = self.kernels.get(kernel.name)
        if not variants:
            return None
        variant = answering(variants, site)
        call = sum(c * v for c, v in zip(variant.coefficients, terms(variant, site), strict=True))
        return call + sum(self.pointwise(name, site.m * site.n) for name in unfused(kernel, site))

    def pointwise(self, name: str, elements: int) -> float:
        """Instructions of one pointwise operation; a middling one where it was not measured."""
        call, element = self.pointwise_costs.get(name, _MIDDLING)
        return call + element * elements

    def attention(self, dtype: str, heads: int, scores: int, products: int) -> float:
        """Instructions of attention; zero where it was not measured."""
        head, score, product = self.attention_costs.get(dtype, (0.0, 0.0, 0.0))
        return head * heads + score * scores + product * products

    def of(self, sites: Sequence[Site]) -> CostTable:
        """The same, whatever the graph."""
        return self


def unfused(kernel: Kernel, site: Site) -> list[str]:
    """The pointwise operations behind a kernel, as :attr:`CostTable.pointwise_costs` has them.

    A fused relu costs next to nothing; a fused sigmoid saves a pass over memory, but little of the work.
    """
    if site.post_op == post_ops.NONE or (site.post_op == "relu" and kernel.fuses(site)):
        return []
    dtype = "bf16" if kernel.activations == torch.bfloat16 else "fp32"
    parts = ("add", "relu") if site.post_op == post_ops.ADD_RELU else (site.post_op,)
    return [f"{dtype}:{part}" for part in parts]


def answering(variants: Sequence[Variant], site: Site) -> Variant:
    """The variant that the library takes for a site: of those in bounds the one of least cycles, or the first."""
    fitting = [variant for variant in variants if variant.fits(site)] or [variants[-1]]
    return min(fitting, key=lambda variant: _cycles(variant, site))


def _cycles(variant: Variant, site: Site) -> float:
    """The Compute Library's estimate for one thread: its GEMMs' estimate_cycles. Zero where it makes none."""
    if variant.cycles is None:
        return 0.0
    batch, rows, depth = _problem(site, variant.channels)
    multiplications, packed, merged = variant.cycles
    width = _up(site.n, variant.columns)
    if not packed:
        cycles = batch * rows * width * depth / multiplications
        narrow = site.n < variant.columns or variant.columns < site.n < 2 * variant.columns
        return cycles * 1.15 if narrow else cycles
    high = _up(rows, variant.rows)
    cycles = batch * high * width * depth / multiplications
    cycles += batch * high * depth * 2 / packed
    cycles += batch * rows * width * _blocks(variant, depth) * 4 / merged
    return cycles / min(1.0, 0.9 * batch * high / variant.rows)


def _problem(site: Site, channels: int) -> tuple[int, int, int]:
    """Products in a batch, rows of each, and their terms, with input channels of a filter by so many."""
    batch = max(1, site.shape[0]) if site.op == Op.CONV else 1
    taps = math.prod(site.weight[2:])
    return batch, site.m // batch, _up(site.k // max(1, taps), channels) * taps


def _blocks(variant: Variant, depth: int) -> int:
    return -(-depth // variant.block) if variant.block else 1


def terms(variant: Variant, site: Site) -> tuple[float, ...]:
    """What a call does, in units of :data:`TERMS`."""
    batch, rows, depth = _problem(site, variant.channels)
    high, width = batch * _up(rows, variant.rows), _up(site.n, variant.columns)
    taps = math.prod(site.weight[2:])
    merged = batch * rows * width * _blocks(variant, depth)
    values = {
        "calls": 1,
        "arithmetic": high * width * depth,
        "pairs": high * _up(site.n, 2 * variant.columns) * depth,
        "sweeps": batch * -(-rows // variant.sweep) * width * depth,
        "packing": high * depth,
        "gathers": batch * rows * taps if taps > 1 else 0,
        "merging": merged,
        "tiles": -(-merged // (variant.rows * variant.columns)),
        "input": math.prod(site.shape),
        "output": site.m * site.n,
        "weight": math.prod(site.weight),
    }
    return tuple(float(values[name]) for name in TERMS)


def find(target: Target, release: str = "") -> CostTable | None:
    """The table for a target and a torch release, by default this machine's; the nearest release where it has none.

    Of two that are as near it is the newer one: 2.14 has the Compute Library and the oneDNN of 2.15, not of 2.13.
    None where there is no table for the core or one that it is like.
    """
    core = target.cost_table or target.core
    wanted = Version(release or torch.__version__).release[:2]
    tables = [table for table in _all() if table.core == core]
    return min(tables, key=lambda table: _distance(Version(table.torch).release[:2], wanted), default=None)


def _distance(release: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, bool]:
    steps = sum(abs(a - b) * weight for a, b, weight in zip(release, wanted, (100, 1), strict=False))
    return steps, release < wanted


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
    kernels = {name: tuple(_variant(entry) for entry in variants) for name, variants in data["kernels"].items()}
    figures = {"pointwise_costs": "pointwise", "attention_costs": "attention"}
    figures |= {name: name for name in ("pointwise_cycles", "attention_cycles")}
    fitted: dict[str, Any] = {
        field: {name: tuple(map(float, values)) for name, values in data.get(key, {}).items()}
        for field, key in figures.items()
    }
    return CostTable(data["core"], data["torch"], kernels, provenance=data["provenance"], **fitted)


def _variant(data: Mapping[str, Any]) -> Variant:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
    return Variant(**values)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
