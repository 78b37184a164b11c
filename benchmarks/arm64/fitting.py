"""What a call costs, fitted to samples: one table for each core and torch release."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from armopt import targets
from armopt.ir.records import Site
from armopt.kernels import table
from armopt.plan import costs
from armopt.plan.costs import TERMS, Variant
from benchmarks.arm64 import sampling
from benchmarks.arm64.sampling import ATTENTION, POINTWISE, site_of

Samples = Sequence[Mapping[str, Any]]

#: Multiplications, packed bytes and merged bytes in a cycle, of the Compute Library's estimates (arm_gemm, fixed-format
#: kernels): NEON's for all cores. SVE's interleaved kernel on FP32 has its own on each core and release: searched for.
_BF16_CYCLES = {"sve": (39.90, 8.55, 4.42), "neon": (31.62, 9.07, 3.23)}
_FP32_CYCLES = {
    "neon": (38.10, 5.23, 3.15),
    "sve hybrid": (32.35, 0.0, 0.0),
    "neon hybrid": (28.48, 0.0, 0.0),
    "neon narrow": (20.5, 0.0, 0.0),
}
_NONE = (0.0,) * len(TERMS)


def _interleaved(name: str, columns: int, cycles: tuple[float, float, float] | None) -> Variant:
    """A GEMM that packs eight rows at a time; half of a 32 KiB L1 cache holds one block of the wider operand."""
    return Variant(name, 8, columns, _NONE, block=16384 // (2 * max(columns, 8)) // 4 * 4, cycles=cycles)


def bf16_variants(vector_bits: int) -> list[Variant]:
    """What answers on BF16 activations."""
    columns = 3 * vector_bits // 32
    sve = [_interleaved("sve interleaved", columns, _BF16_CYCLES["sve"])] if vector_bits else []
    return [*sve, _interleaved("neon interleaved", 12, _BF16_CYCLES["neon"])]


def fast_math_variants(vector_bits: int, sve_cycles: tuple[float, float, float]) -> list[Variant]:
    """What answers on FP32 activations and BF16 weights."""
    columns = 3 * vector_bits // 32
    return [
        Variant("sve hybrid", 2, 2 * columns, _NONE, sweep=4, cycles=_FP32_CYCLES["sve hybrid"]),
        Variant("neon hybrid", 2, 24, _NONE, sweep=4, cycles=_FP32_CYCLES["neon hybrid"]),
        Variant("neon hybrid, narrow", 2, 16, _NONE, sweep=6, cycles=_FP32_CYCLES["neon narrow"]),
        _interleaved("sve interleaved", columns, sve_cycles),
        _interleaved("neon interleaved", 12, _FP32_CYCLES["neon"]),
    ]


_ONE = [
    Variant("one column", 1, 1, _NONE, most_columns=1),
    Variant("one row", 1, 8, _NONE, most_rows=1),
]
#: OpenBLAS has routines for small products.
_OPENBLAS = [
    *_ONE,
    Variant("two rows, small product", 1, 8, _NONE, most_rows=2, most_product=1e6),
    Variant("small product", 2, 8, _NONE, sweep=4, most_product=1e6),
    Variant("large", 1, 8, _NONE, sweep=8),
]
#: NVPL computes twelve rows at a time.
_NVPL = [
    *_ONE,
    Variant("few rows", 12, 8, _NONE, sweep=12, most_rows=12),
    Variant("large", 12, 8, _NONE, sweep=12),
]
_FP32_VARIANTS = [Variant("few rows", 1, 4, _NONE, most_rows=4), Variant("large", 4, 8, _NONE)]
#: Which pads no input channels.
_DIRECT_VARIANTS = [Variant("brgconv", 1, 8, _NONE, channels=1)]


def blas_variants(samples: Samples) -> list[Variant]:
    """What answers in the BLAS that was counted: NVPL's does the work of twelve rows for two as for eight."""
    counts = {(s["k"], s["n"], s["m"]): sum(s["counts"]) for s in samples}
    growth = [counts[k, n, 8] / count for (k, n, m), count in counts.items() if m == 2 and (k, n, 8) in counts]
    return _NVPL if statistics.median(growth) < 1.2 else _OPENBLAS  # 1.01 and 1.9 as a rule


def own_variant(samples: Samples) -> list[Variant]:
    """oneDNN's own code, which answers without BFMMLA where input channels and outputs are few, from torch 2.14 on."""
    channels = [(math.prod(site_of(sample).weight[:2]), bool(_bfmmla(sample))) for sample in samples]
    own = [count for count, multiplied in channels if not multiplied]
    if not own or max(own) >= min(count for count, multiplied in channels if multiplied):
        return []
    pairs = any(sample["counts"][2] for sample in samples)  # BFDOT multiplies two terms at once
    return [Variant("oneDNN's own", 1, 8, _NONE, most_channels=max(own), channels=2 if pairs else 1)]


def search_sve_cycles(samples: Samples, vector_bits: int) -> tuple[float, float, float]:
    """The figures with which the library's estimates choose what the samples show to have answered."""
    seen = [(site_of(sample), answered(sample, vector_bits)) for sample in samples]
    rng = random.Random(0)
    best, fewest = (0.0, 0.0, 0.0), len(seen) + 1
    for _ in range(1000):
        figures = (rng.uniform(25, 65), rng.uniform(1.5, 9), rng.uniform(1.5, 9))
        variants = fast_math_variants(vector_bits, figures)
        wrong = sum(costs.answering(variants, site).name not in names for site, names in seen)
        if wrong < fewest:
            best, fewest = figures, wrong
    print(f"SVE's figures {best}: {fewest} of {len(seen)} samples chosen otherwise")
    return best


def answered(sample: Mapping[str, Any], vector_bits: int) -> set[str]:
    """Which implementations of fast math the BFMMLA count of a sample fits."""
    sve, neon = sample["counts"][:2]
    kind = "sve" if sve > neon else "neon"
    multiplications = sve * vector_bits // 8 if sve > neon else neon * 16
    site = site_of(sample)
    fitting = {
        variant.name
        for variant in fast_math_variants(vector_bits, (1.0, 1.0, 1.0))
        if variant.name.startswith(kind) and costs.terms(variant, site)[1] == multiplications
    }
    return fitting or {f"{kind} hybrid"}


@dataclass
class Errors:
    """Of samples that were left out of the fit, relative."""

    instructions: list[float] = field(default_factory=list)
    cycles: list[float] = field(default_factory=list)


def fit_variants(variants: Sequence[Variant], samples: Samples) -> tuple[list[Variant], Errors]:
    """Coefficients by least squares of the relative error, none below zero; and the errors of a fifth left out."""
    chosen: dict[str, list[tuple[Site, Mapping[str, Any]]]] = defaultdict(list)
    for sample in samples:
        site = site_of(sample)
        chosen[costs.answering(variants, site).name].append((site, sample))
    errors = Errors()
    fitted = []
    for variant in variants:
        if not (held := chosen[variant.name]):
            continue
        counted = [(site, float(sum(sample["counts"]))) for site, sample in held]
        coefficients = _fit(variant, counted, errors.instructions)
        clocked = [(site, float(sample["cycles"])) for site, sample in held if "cycles" in sample]
        if len(clocked) < len(held):
            fitted.append(replace(variant, coefficients=coefficients))
            continue
        cycles = _fit(variant, clocked, errors.cycles)
        blocks = statistics.median(sample["blocks"] for _, sample in held)
        fitted.append(replace(variant, coefficients=coefficients, clocked=cycles, blocks=blocks))
    return fitted, errors


def _fit(variant: Variant, samples: Sequence[tuple[Site, float]], errors: list[float]) -> tuple[float, ...]:
    """The coefficients of one variant; adds the errors of five fits without a fifth."""
    for part in range(5):
        rest = [entry for i, entry in enumerate(samples) if i % 5 != part]
        if rest:
            trial = _solve(variant, rest)
            errors += [_predict(variant, trial, s) / total - 1 for i, (s, total) in enumerate(samples) if i % 5 == part]
    return _solve(variant, samples)


def _solve(variant: Variant, samples: Sequence[tuple[Site, float]]) -> tuple[float, ...]:
    rows = np.array([costs.terms(variant, site) for site, _ in samples])
    totals = np.array([total for _, total in samples])
    scaled = rows / totals[:, None]
    size = np.maximum(scaled.max(axis=0), 1e-30)
    found = _least_squares(scaled / size)
    return tuple(float(f"{value:.5g}") for value in found / size)


def _least_squares(terms: Any) -> Any:
    """What to multiply columns by that each row comes to about 1; nothing below zero."""
    from scipy.optimize import nnls  # which nothing else here needs

    return nnls(terms, np.ones(len(terms)))[0]


def _predict(variant: Variant, coefficients: Sequence[float], site: Site) -> float:
    return sum(c * v for c, v in zip(coefficients, costs.terms(variant, site), strict=True))


def fit(path: Path) -> None:
    """Writes the cost table of one file of samples."""
    core, _, version = path.stem.partition("-torch-")
    samples = sampling.read(path)
    target = next(t for t in map(targets.load, targets.names()) if t.core == core)
    counted = next((name for name, like in sampling.LIKE.items() if core in like), core)
    product = next(t for t in map(targets.load, targets.names()) if t.core == counted)
    bits = target.vector_bits if "sve" in target.isa_features else 0
    by_kernel = _by_kernel(samples)
    in_fast_math = fast_math_variants(bits, _sve_cycles(by_kernel, bits))
    kernels, errors = {}, {}
    left_out = []
    for name, held in sorted(by_kernel.items()):
        multiplied = any(map(_bfmmla, held))
        if table.get(name).precision == "bf16" and not multiplied:
            left_out.append(name)  # a reference kernel in FP32 answers
            continue
        if name.startswith("blas"):
            variants = blas_variants(held)
        elif not multiplied:
            variants = _DIRECT_VARIANTS if name == "conv_direct_fp32" else _FP32_VARIANTS
        else:
            variants = [*own_variant(held), *(bf16_variants(bits) if name.endswith("bf16") else in_fast_math)]
        fitted, wrong = fit_variants(variants, held)
        kernels[name] = [_to_json(variant) for variant in fitted]
        errors[name] = {"samples": len(held), **_summary(wrong.instructions)}
        if wrong.cycles:
            errors[name]["cycles"] = _summary(wrong.cycles)
        print(name, errors[name])
    found = {
        "core": core,
        "torch": version,
        "provenance": {
            "unit": "instructions retired by one thread, with tcmalloc, DNNL_DEFAULT_FPMATH_MODE=BF16 and "
            "LRU_CACHE_CAPACITY=1024",
            "samples": f"benchmarks/arm64/samples/{path.name}",
            "command": f"python -m benchmarks.arm64.costs measure --cpu {product.name} --torch {version}",
            "left out, because no BFMMLA answers": left_out,
            "error of samples left out of the fit": errors,
        },
        "kernels": kernels,
        "pointwise": {name: line[:2] for name, line in _pointwise(samples, _instructions).items()},
        "attention": _attention(samples, _instructions),
    }
    if all("cycles" in sample for sample in samples):
        found |= {"pointwise_cycles": _pointwise(samples, _cycles), "attention_cycles": _attention(samples, _cycles)}
    place = Path(costs.__file__).parent / path.name
    place.write_text(json.dumps(found, indent=1) + "\n")
    print(place)


def _instructions(sample: Mapping[str, Any]) -> float:
    return float(sum(sample["counts"]))


def _cycles(sample: Mapping[str, Any]) -> float:
    return float(sample["cycles"])


def _by_kernel(samples: Samples) -> dict[str, list[Mapping[str, Any]]]:
    """The samples of kernels, by the kernel's name."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        if sample["name"] not in (POINTWISE, ATTENTION):
            found[sample["kernel"]].append(sample)
    return found


def _bfmmla(sample: Mapping[str, Any]) -> int:
    """The BFMMLA instructions of a sample, of both kinds."""
    return sum(sample["counts"][:2])


def _sve_cycles(by_kernel: Mapping[str, Samples], vector_bits: int) -> tuple[float, float, float]:
    """SVE's figures, where fast math has samples and the core has SVE."""
    names = ("linear_fastmath", "conv1x1_fastmath")
    fast = [sample for name in names for sample in by_kernel.get(name, ()) if _bfmmla(sample)]
    return search_sve_cycles(fast, vector_bits) if fast and vector_bits else (1.0, 1.0, 1.0)


def _summary(errors: Sequence[float]) -> dict[str, float]:
    sizes = sorted(map(abs, errors))
    figures = {"median": statistics.median(sizes), "p90": sizes[int(0.9 * (len(sizes) - 1))], "most": sizes[-1]}
    return {name: round(figure, 4) for name, figure in figures.items()}


def _to_json(variant: Variant) -> dict[str, Any]:
    values = {name: value for name, value in asdict(variant).items() if value is not None}
    return values if variant.clocked else {n: v for n, v in values.items() if n not in ("clocked", "blocks")}


def _attention(samples: Samples, of: Callable[[Mapping[str, Any]], float]) -> dict[str, list[float]]:
    """By dtype what a head, a score and a multiply-add take: all errors weigh alike, as shares of what was counted."""
    by_dtype: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        if sample["name"] == ATTENTION:
            by_dtype[sample["dtype"]].append(sample)
    found = {}
    for dtype, held in sorted(by_dtype.items()):
        heads = np.array([s["batch"] * s["heads"] for s in held], dtype=float)
        scores = heads * [s["tokens"] ** 2 for s in held]
        products = scores * [2 * s["size"] for s in held]
        totals = np.array([of(s) for s in held], dtype=float)
        size = np.array([1e4, 10.0, 0.1])  # of the right order: least squares want like columns
        terms = np.stack([heads, scores, products], axis=1) / totals[:, None] * size
        solution = _least_squares(terms)
        found[dtype] = [float(f"{value:.4g}") for value in solution * size]
        print(ATTENTION, dtype, found[dtype], "worst error", round(float(np.abs(terms @ solution - 1).max()), 3))
    return found


def _pointwise(samples: Samples, of: Callable[[Mapping[str, Any]], float]) -> dict[str, list[float]]:
    """A line through the two sizes that were measured: of a call, of an element; and the blocks of a call."""
    by_name: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        if sample["name"] == POINTWISE:
            by_name[f"{sample['dtype']}:{sample['operation']}"].append(sample)
    lines = {}
    for name, held in sorted(by_name.items()):
        few, many = sorted(held, key=lambda sample: sample["elements"])
        slope = (of(many) - of(few)) / (many["elements"] - few["elements"])
        lines[name] = [round(max(0.0, of(few) - slope * few["elements"])), round(slope, 3), few.get("blocks", 0)]
    return lines
