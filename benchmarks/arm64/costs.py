"""Makes the cost tables in armopt/plan/costs: counts every kernel on a grid of shapes, then fits what a call costs.

    python -m benchmarks.arm64.costs measure --cpu graviton3 --torch 2.10.0     # adds what is missing to the samples
    python -m benchmarks.arm64.costs fit                                        # writes armopt/plan/costs/*.json

Samples are kept in benchmarks/arm64/samples, one file for each core and torch release: instructions by class for each
kernel and shape, and the floor M * N * K / 32, the BFMMLA instructions of 256 bits that the product needs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from packaging.version import Version
from scipy.optimize import nnls

from armopt.emulation.folder import DEFAULT_TORCH
from armopt.ir.records import Site
from armopt.kernels import table as kernel_table
from armopt.plan import costs
from armopt.plan.costs import TERMS, Variant
from armopt.targets.emulated import core_named
from benchmarks.arm64 import counts
from benchmarks.arm64.counts import Counts, Job

SAMPLES = Path(__file__).with_name("samples")
_ROWS = (1, 2, 4, 8, 10, 16, 32, 64, 128, 256, 512)
#: (K, N): square, tall, wide, odd, and few outputs.
_PRODUCTS = (
    *((32, 32), (64, 64), (128, 128), (256, 256), (512, 512), (768, 768), (1024, 1024)),
    *((768, 2304), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (2048, 1000), (64, 1024), (1024, 64)),
    *((513, 257), (100, 10), (1000, 100), (300, 33), (4096, 10), (1024, 2), (512, 1)),
)
#: Beyond this many multiplications a sample says nothing new, and the emulator needs minutes.
_MOST = 1.5e8
_LINEAR = ("conv1x1_bf16", "conv1x1_fastmath", "linear_fastmath", "blas_fp32_w16")
_LINEAR_FP32 = ("conv1x1_fp32", "blas_fp32")
_CONV = ("conv_bf16", "conv_fastmath")
_CONV_FP32 = ("conv_fp32",)
#: What a sample has beyond what was asked for.
_FOUND = ("counts", "floor")
ATTENTION = "attention"
#: Images or windows, heads, tokens, size of a head: of BERT, ViT and Swin.
_ATTENTION = (
    *((1, 12, 64, 64), (1, 12, 128, 64), (1, 12, 197, 64), (1, 16, 32, 64), (8, 8, 16, 64)),
    *((16, 6, 49, 32), (4, 12, 49, 32), (1, 8, 100, 32)),
)
#: Pointwise operations behind a kernel that doesn't fuse them, and casts.
_POINTWISE = ("relu", "gelu", "gelu_tanh", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "relu6", "add")


def linear_shapes() -> Iterator[dict[str, int]]:
    """The grid of Linear layers."""
    for k, n in _PRODUCTS:
        for m in _ROWS:
            if m * k * n <= _MOST:
                yield {"m": m, "k": k, "n": n}


def conv_shapes() -> list[dict[str, Any]]:
    """The distinct convolutions of ResNet-50, MobileNet v2 and v3, and Mask R-CNN on a small image."""
    found: dict[str, dict[str, Any]] = {}
    for shape in (*_of_model("resnet50", 224), *_of_model("mobilenet_v2", 224), *_of_model("mobilenet_v3_large", 224)):
        found[json.dumps(shape)] = shape
    for shape in _of_model("resnet50", 320):
        found[json.dumps(shape)] = shape
    for size, channels in ((80, 256), (40, 512), (20, 1024), (10, 2048)):
        for shape in (_conv((1, channels, size, size), 256, 1), _conv((1, 256, size, size), 256, 3)):
            found[json.dumps(shape)] = shape
    for size in (80, 20, 5):
        for out in (3, 12):
            found[f"rpn {size} {out}"] = _conv((1, 256, size, size), out, 1)
    for batch in (2, 8):
        for size, out, filters in ((14, 256, 3), (28, 91, 1)):
            found[f"mask {batch} {size}"] = _conv((batch, 256, size, size), out, filters)
    return [shape for shape in found.values() if _multiplications(shape) <= _MOST]


def _multiplications(shape: Mapping[str, Any]) -> float:
    batch, _, height, width = shape["shape"]
    out, channels, *filters = shape["weight"]
    return batch * height * width / shape["stride"] ** 2 * out * channels * filters[0] * filters[1]


def _conv(shape: Sequence[int], out: int, filters: int) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "weight": [out, shape[1], filters, filters],
        "stride": 1,
        "padding": filters // 2,
        "groups": 1,
    }


def _of_model(name: str, size: int) -> list[dict[str, Any]]:
    import torch
    from torch import nn

    from armopt.models import references

    model = references.resolve(f"torchvision:{name}")().eval()
    found: list[dict[str, Any]] = []

    def note(module: nn.Conv2d, args: Any, output: Any) -> None:
        found.append(
            {
                "shape": list(args[0].shape),
                "weight": list(module.weight.shape),
                "stride": module.stride[0],
                "padding": module.padding[0],
                "groups": module.groups,
            }
        )

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)  # type: ignore[arg-type]
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return found


def jobs(half: bool) -> Iterator[Job]:
    """Every kernel on every shape that it takes; only kernels in FP32 for a core without BF16."""
    pointwise = ["fp32", "bf16"] if half else ["fp32"]
    for dtype in pointwise:
        for name in _POINTWISE:
            for elements in (2048, 65536):
                arguments: dict[str, Any] = {"operation": name, "dtype": dtype, "elements": elements}
                yield Job("pointwise", "benchmarks.arm64.jobs:pointwise", arguments)
    for dtype in pointwise if half else ():
        for elements in (2048, 65536):
            yield Job(
                "pointwise",
                "benchmarks.arm64.jobs:pointwise",
                {"operation": "cast", "dtype": dtype, "elements": elements},
            )
    for dtype in pointwise if half else ():
        for batch, heads, tokens, size in _ATTENTION:
            sizes = {"batch": batch, "heads": heads, "tokens": tokens, "size": size}
            yield Job(ATTENTION, "benchmarks.arm64.jobs:attention", {"dtype": dtype, **sizes}, warm_ups=1)
    for shape in linear_shapes():
        for kernel in _LINEAR if half else _LINEAR_FP32:
            if shape["n"] > 1 or kernel.startswith("blas"):
                yield _linear_job(kernel, shape)
    for shape in conv_shapes():
        if shape["groups"] == 1:
            for kernel in _CONV if half else _CONV_FP32:
                yield Job(kernel, "benchmarks.arm64.jobs:conv_kernel", {"kernel": kernel, **shape}, warm_ups=2)
        elif shape["weight"][1] == 1:
            yield Job("conv_fp32", "benchmarks.arm64.jobs:conv_kernel", {"kernel": "conv_fp32", **shape}, warm_ups=2)


def measure(cpu: str, torch_version: str, only: str) -> None:
    """Counts what the samples don't hold yet; what is counted is kept as it comes."""
    from armopt import targets

    core = core_named(cpu)
    path = SAMPLES / f"{core.name}-torch-{torch_version}.json"
    held = read(path) if path.exists() else []
    known = {_key(entry) for entry in held}
    every = [job for job in jobs(targets.load(cpu).bf16) if only in job.name]
    missing = [job for job in every if _key({"name": job.name, **job.arguments}) not in known]
    SAMPLES.mkdir(exist_ok=True)

    def keep(index: int, found: Counts) -> None:
        if found.error:
            print(missing[index].name, missing[index].arguments, found.error.splitlines()[-1], file=sys.stderr)
        else:
            held.append({"name": found.name, **missing[index].arguments, "counts": list(found.classes.values())})
        if index % 20 == 0:
            write(path, held)

    counts.count(missing, cpu=cpu, torch_version=torch_version, env=counts.AS_RUN, finished=keep, timeout=4 * 3600)
    write(path, held)
    print(f"{path}: {len(held)} samples")


def _linear_job(kernel: str, shape: Mapping[str, int]) -> Job:
    large = shape["m"] * shape["k"] * shape["n"] > 2e7
    arguments = {"kernel": kernel, **shape}
    return Job(kernel, "benchmarks.arm64.jobs:linear_kernel", arguments, warm_ups=1 if large else 2)


def _key(entry: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in entry.items() if name not in _FOUND}, sort_keys=True)


def _floor(sample: Mapping[str, Any]) -> dict[str, int]:
    if sample["name"] in ("pointwise", ATTENTION):
        return {}
    site = _site(sample)
    return {"floor": site.m * site.k * site.n // 32}


def read(path: Path) -> list[dict[str, Any]]:
    """The samples of a file."""
    return json.loads(path.read_text())["samples"]  # type: ignore[no-any-return]


def write(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """One sample a line; products with their floor, the BFMMLA instructions of 256 bits that they need."""
    whole = [{**sample, **_floor(sample)} for sample in samples]
    lines = ",\n".join(json.dumps(sample) for sample in sorted(whole, key=_key))
    path.write_text('{"classes": ' + json.dumps(counts.CLASSES) + ', "samples": [\n' + lines + "\n]}\n")


# --- the model of cost ----------------------------------------------------------------------------

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
#: NVPL, in PyPI's wheels from 2.11, computes twelve rows at a time.
_NVPL = [
    *_ONE,
    Variant("few rows", 12, 8, _NONE, sweep=12, most_rows=12),
    Variant("large", 12, 8, _NONE, sweep=12),
]
_FP32_VARIANTS = [Variant("few rows", 1, 4, _NONE, most_rows=4), Variant("large", 4, 8, _NONE)]


def search_sve_cycles(samples: Sequence[Mapping[str, Any]], vector_bits: int) -> tuple[float, float, float]:
    """The figures with which the library's estimates choose what the samples show to have answered."""
    seen = [(_site(sample), answered(sample, vector_bits)) for sample in samples]
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
    site = _site(sample)
    fitting = {
        variant.name
        for variant in fast_math_variants(vector_bits, (1.0, 1.0, 1.0))
        if variant.name.startswith(kind) and costs.terms(variant, site)[1] == multiplications
    }
    return fitting or {f"{kind} hybrid"}


def _site(sample: Mapping[str, Any]) -> Site:
    from benchmarks.arm64 import jobs

    arguments = {name: value for name, value in sample.items() if name not in ("name", "kernel", *_FOUND)}
    return jobs.conv_site(**arguments) if "shape" in sample else jobs.linear_site(**arguments)


def fit_variants(
    variants: Sequence[Variant], samples: Sequence[tuple[Site, float]]
) -> tuple[list[Variant], list[float]]:
    """Coefficients by least squares of the relative error, none below zero; and the errors of a fifth left out."""
    chosen: dict[str, list[tuple[Site, float]]] = defaultdict(list)
    for site, total in samples:
        chosen[costs.answering(variants, site).name].append((site, total))
    errors: list[float] = []
    fitted = []
    for variant in variants:
        held = chosen[variant.name]
        if not held:
            continue
        for part in range(5):
            rest = [entry for i, entry in enumerate(held) if i % 5 != part]
            if rest:
                trial = replace(variant, coefficients=_solve(variant, rest))
                errors += [_predict(trial, s) / total - 1 for i, (s, total) in enumerate(held) if i % 5 == part]
        fitted.append(replace(variant, coefficients=_solve(variant, held)))
    return fitted, errors


def _solve(variant: Variant, samples: Sequence[tuple[Site, float]]) -> tuple[float, ...]:
    rows = np.array([costs.terms(variant, site) for site, _ in samples])
    totals = np.array([total for _, total in samples])
    scaled = rows / totals[:, None]
    size = np.maximum(scaled.max(axis=0), 1e-30)
    found, _ = nnls(scaled / size, np.ones(len(samples)))
    return tuple(float(f"{value:.5g}") for value in found / size)


def _predict(variant: Variant, site: Site) -> float:
    return sum(c * v for c, v in zip(variant.coefficients, costs.terms(variant, site), strict=True))


def fit(path: Path) -> None:
    """Writes the cost table of one file of samples."""
    from armopt import targets

    core, _, version = path.stem.partition("-torch-")
    samples = read(path)
    target = next(t for t in map(targets.load, targets.names()) if t.core == core)
    bits = target.vector_bits if "sve" in target.isa_features else 0
    by_kernel: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        if sample["name"] not in ("pointwise", ATTENTION):
            by_kernel[sample["kernel"]].append(sample)
    fast = [s for name in ("linear_fastmath", "conv1x1_fastmath") for s in by_kernel.get(name, [])]
    fast = [s for s in fast if sum(s["counts"][:2])]
    sve_cycles = search_sve_cycles(fast, bits) if fast and bits else (1.0, 1.0, 1.0)
    kernels, errors = {}, {}
    left_out = []
    for name, held in sorted(by_kernel.items()):
        multiplied = any(sum(s["counts"][:2]) for s in held)
        if kernel_table.get(name).precision == "bf16" and not multiplied:
            left_out.append(name)  # a reference kernel in FP32 answers
            continue
        if name.startswith("blas"):
            variants = _OPENBLAS if Version(version) < Version("2.11") else _NVPL
        elif not multiplied:
            variants = _FP32_VARIANTS
        else:
            variants = bf16_variants(bits) if name.endswith("bf16") else fast_math_variants(bits, sve_cycles)
        fitted, wrong = fit_variants(variants, [(_site(s), float(sum(s["counts"]))) for s in held])
        kernels[name] = [_to_json(variant) for variant in fitted]
        sizes = sorted(abs(error) for error in wrong)
        errors[name] = {
            "samples": len(held),
            "median": round(statistics.median(sizes), 4),
            "p90": round(sizes[int(0.9 * (len(sizes) - 1))], 4),
            "most": round(sizes[-1], 4),
        }
        print(name, errors[name])
    table = {
        "core": core,
        "torch": version,
        "provenance": {
            "unit": "instructions retired by one thread, with tcmalloc, DNNL_DEFAULT_FPMATH_MODE=BF16 and "
            "LRU_CACHE_CAPACITY=1024",
            "samples": f"benchmarks/arm64/samples/{path.name}",
            "command": f"python -m benchmarks.arm64.costs measure --cpu {target.name} --torch {version}",
            "left out, because no BFMMLA answers": left_out,
            "error of samples left out of the fit": errors,
        },
        "kernels": kernels,
        "pointwise": _pointwise([s for s in samples if s["name"] == "pointwise"]),
        "attention": _attention([s for s in samples if s["name"] == ATTENTION]),
    }
    place = Path(costs.__file__).parent / path.name
    place.write_text(json.dumps(table, indent=1) + "\n")
    print(place)


def _to_json(variant: Variant) -> dict[str, Any]:
    return {name: value for name, value in asdict(variant).items() if value is not None}


def _attention(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """By dtype what a head, a score and a multiply-add take: all errors weigh alike, as shares of what was counted."""
    found = {}
    for dtype in sorted({sample["dtype"] for sample in samples}):
        held = [sample for sample in samples if sample["dtype"] == dtype]
        heads = np.array([s["batch"] * s["heads"] for s in held], dtype=float)
        scores = heads * [s["tokens"] ** 2 for s in held]
        products = scores * [2 * s["size"] for s in held]
        totals = np.array([sum(s["counts"]) for s in held], dtype=float)
        size = np.array([1e4, 10.0, 0.1])  # of the right order: nnls wants like columns
        terms = np.stack([heads, scores, products], axis=1) / totals[:, None] * size
        solution, _ = nnls(terms, np.ones(len(held)))
        found[dtype] = [float(f"{value:.4g}") for value in solution * size]
        print(ATTENTION, dtype, found[dtype], "worst error", round(float(np.abs(terms @ solution - 1).max()), 3))
    return found


def _pointwise(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """A line through the two sizes that were counted."""
    by_name: dict[str, dict[int, int]] = defaultdict(dict)
    for sample in samples:
        by_name[f"{sample['dtype']}:{sample['operation']}"][sample["elements"]] = sum(sample["counts"])
    lines = {}
    for name, totals in sorted(by_name.items()):
        (few, least), (many, most) = sorted(totals.items())
        slope = (most - least) / (many - few)
        lines[name] = [round(max(0.0, least - slope * few)), round(slope, 3)]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm64.costs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--cpu", default="graviton3")
    measuring.add_argument("--torch", default=DEFAULT_TORCH)
    measuring.add_argument("--only", default="", help="kernels whose name holds this")
    commands.add_parser("fit")
    options = parser.parse_args(arguments)
    if options.command == "measure":
        measure(options.cpu, options.torch, options.only)
        return 0
    for path in sorted(SAMPLES.glob("*.json")):
        fit(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
