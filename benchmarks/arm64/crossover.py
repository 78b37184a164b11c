"""Is the plan's choice the best one? Where do packed weights begin to win? Writes docs/costs.md and docs/crossover.png.

    python -m benchmarks.arm64.crossover            # counts twenty shapes that no table holds, then writes both
    python -m benchmarks.arm64.crossover --redraw   # writes both from the counts of the last time

Each shape is one layer alone, FP32 in and out: a kernel on BF16 activations pays for its two casts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from armopt import targets
from armopt.emulation.folder import DEFAULT_TORCH
from armopt.ir.records import Site, Target
from armopt.kernels import table
from armopt.plan import cost_policy, costs
from benchmarks.arm64 import counting, jobs, sampling
from benchmarks.arm64.emulated_jobs import Job

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = Path(__file__).with_name("crossover.json")
_RELEASES = (DEFAULT_TORCH, "2.13.0")
#: Rows, terms, columns: drawn once, log-uniformly.
LINEAR = (
    *((3, 200, 60), (5, 96, 400), (1, 1500, 1500), (6, 640, 640), (12, 700, 180), (20, 320, 1280), (7, 2048, 512)),
    *(
        (48, 144, 144),
        (24, 900, 1100),
        (100, 384, 1536),
        (77, 640, 640),
        (200, 50, 120),
        (1, 300, 5000),
        (300, 256, 500),
    ),
)
CONV: tuple[dict[str, Any], ...] = (
    {"shape": [1, 48, 28, 28], "weight": [96, 48, 3, 3], "stride": 1, "padding": 1},
    {"shape": [1, 320, 14, 14], "weight": [128, 320, 1, 1], "stride": 1, "padding": 0},
    {"shape": [4, 64, 28, 28], "weight": [64, 64, 3, 3], "stride": 1, "padding": 1},
    {"shape": [1, 200, 7, 7], "weight": [400, 200, 1, 1], "stride": 1, "padding": 0},
    {"shape": [1, 80, 40, 40], "weight": [40, 80, 1, 1], "stride": 1, "padding": 0},
    {"shape": [2, 96, 30, 30], "weight": [192, 96, 3, 3], "stride": 2, "padding": 1},
)
_CASTS = "casts"


@dataclass(frozen=True)
class Checked:
    """One shape: what was chosen and what was best, with their instructions, casts included."""

    shape: str
    chosen: str
    instructions: int
    best: str
    least: int

    @property
    def ratio(self) -> float:
        """The chosen kernel's instructions over the best one's."""
        return self.instructions / self.least


def sites() -> list[Site]:
    """The twenty shapes."""
    return [*(jobs.linear_site(*shape) for shape in LINEAR), *(jobs.conv_site(**shape) for shape in CONV)]


def check(target: Target, release: str) -> list[Checked]:
    """Counts every kernel on every shape, and asks the policy what it would take."""
    every: list[tuple[Site, str, Job]] = []
    arguments = [*({"m": m, "k": k, "n": n} for m, k, n in LINEAR), *CONV]
    for site, shape in zip(sites(), arguments, strict=True):
        for kernel in cost_policy.candidates(site, target):
            make = f"benchmarks.arm64.jobs:{site.op}_kernel"
            every.append((site, kernel.name, Job(kernel.name, make, {"kernel": kernel.name, **shape})))
        for dtype, elements in (("fp32", math.prod(site.shape)), ("bf16", site.m * site.n)):
            cast = {"operation": "cast", "dtype": dtype, "elements": elements}
            every.append((site, _CASTS, Job(_CASTS, "benchmarks.arm64.jobs:pointwise", cast)))
    wanted = [job for _, _, job in every]
    found = counting.count(wanted, cpu=target.name, torch_version=release, env=counting.AS_RUN, report=_say)
    totals: dict[Site, dict[str, int]] = {site: {} for site, _, _ in every}
    for (site, name, job), counted in zip(every, found, strict=True):
        if counted.error:
            raise RuntimeError(f"{job.name} {job.arguments}: {counted.error}")
        totals[site][name] = totals[site].get(name, 0) + counted.total
    policy = cost_policy.default(target, release)
    checked = []
    for site, held in totals.items():
        casts = held.pop(_CASTS)
        whole = {name: total + (casts if name.endswith("_bf16") else 0) for name, total in held.items()}
        kernel = policy.choose([site], target)[0].kernel
        assert kernel is not None
        best = min(whole, key=lambda name: whole[name])
        checked.append(Checked(_name(site), kernel.name, whole[kernel.name], best, whole[best]))
    return checked


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _name(site: Site) -> str:
    if site.op == "linear":
        return f"{site.m} x {site.k} to {site.n}"
    filters = "x".join(map(str, site.weight[2:]))
    step = f", stride {site.stride[0]}" if site.stride[0] > 1 else ""
    return f"conv {'x'.join(map(str, site.shape))} to {site.n}, {filters}{step}"


def crossover(release: str, size: int, *, chain: bool) -> int | None:
    """The fewest rows from which a packed kernel beats BLAS on a square Linear; in a chain BF16 pays no casts."""
    target = targets.load("graviton3")
    found = costs.find(target, release)
    assert found is not None
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512):
        packed, blas = ratio(found, m, size, chain=chain)
        if packed < blas:
            return m
    return None


def ratio(found: costs.CostTable, m: int, size: int, *, chain: bool) -> tuple[float, float]:
    """Estimates for the best packed kernel and for BLAS."""
    site = jobs.linear_site(m, size, size)
    casts = 0.0 if chain else found.pointwise("fp32:cast", m * size) + found.pointwise("bf16:cast", m * size)
    packed = []
    for name in ("conv1x1_bf16", "conv1x1_fastmath", "linear_fastmath"):
        estimate = found.estimate(table.get(name), site)
        if estimate is not None:
            packed.append(estimate + (casts if name == "conv1x1_bf16" else 0.0))
    blas = found.estimate(table.get("blas_fp32_w16"), site)
    assert blas is not None
    return min(packed), blas


def draw(path: Path) -> None:
    """BLAS over the best packed kernel, by rows and by product; counted shapes as points, the model as lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    target = targets.load("graviton3")
    found = costs.find(target, DEFAULT_TORCH)
    assert found is not None
    held = _square(sampling.read(sampling.SAMPLES / f"{target.core}-torch-{DEFAULT_TORCH}.json"))
    figure, (by_rows, by_product) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    rows = [1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    for i, size in enumerate((64, 128, 256, 512, 1024)):
        colour = f"C{i}"
        estimates = [ratio(found, m, size, chain=False) for m in rows]
        lines = [blas / packed for packed, blas in estimates]
        by_rows.plot(rows, lines, color=colour, label=f"{size} x {size}")
        by_product.plot([m * size * size for m in rows], lines, color=colour, label=f"{size} x {size}")
        points = sorted((m, value) for (m, k), value in held.items() if k == size)
        by_rows.plot(*zip(*points, strict=True), "o", color=colour, markersize=4)
        by_product.plot([m * size * size for m, _ in points], [v for _, v in points], "o", color=colour, markersize=4)
    by_rows.axvline(64, color="black", linestyle="--", linewidth=1)
    by_rows.annotate("the tutorial's 64 rows", (64, 0.12), rotation=90, ha="right", va="bottom", fontsize=9)
    for axes, label in ((by_rows, "rows (M)"), (by_product, "product (M x K x N)")):
        axes.axhline(1, color="grey", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.set_yticks([0.2, 0.5, 1, 2, 4], ["0.2", "0.5", "1", "2", "4"])
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
    by_rows.set_ylabel("instructions of BLAS / of the best packed kernel")
    by_rows.legend(title="Linear, K x N")
    by_rows.set_title("above 1 packed weights win")
    by_product.set_title("the product decides more than the rows do")
    figure.suptitle(
        f"One Linear alone on Neoverse-V1, torch {DEFAULT_TORCH}: points counted, lines from the cost table"
    )
    figure.savefig(path, dpi=110)


def _square(held: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], float]:
    """BLAS over the best packed kernel on FP32 activations or with casts, for the square products counted."""
    table_here = costs.find(targets.load("graviton3"), DEFAULT_TORCH)
    assert table_here is not None
    totals: dict[tuple[int, int], dict[str, float]] = {}
    for sample in held:
        if "k" in sample and sample["k"] == sample["n"]:
            m, k = sample["m"], sample["k"]
            casts = table_here.pointwise("fp32:cast", m * k) + table_here.pointwise("bf16:cast", m * k)
            extra = casts if sample["kernel"] == "conv1x1_bf16" else 0.0
            totals.setdefault((m, k), {})[sample["kernel"]] = sum(sample["counts"]) + extra
    return {key: t["blas_fp32_w16"] / min(v for n, v in t.items() if n != "blas_fp32_w16") for key, t in totals.items()}


def page(checked: Mapping[str, Sequence[Checked]]) -> str:
    """docs/costs.md."""
    parts = [_head()]
    parts.append("| K = N | torch 2.10, alone | in a BF16 chain | torch 2.13, alone | in a BF16 chain |")
    parts.append("| ---: | ---: | ---: | ---: | ---: |")
    for size in (32, 64, 128, 256, 512, 768, 1024, 2048, 4096):
        cells = [crossover(r, size, chain=chain) for r in _RELEASES for chain in (False, True)]
        parts.append(f"| {size} | " + " | ".join(str(cell) if cell else "never" for cell in cells) + " |")
    parts.append(_ERRORS)
    parts.append("| table | kernel | samples | median error | 90th percentile |\n| --- | --- | ---: | ---: | ---: |")
    for path in sorted(Path(costs.__file__).parent.glob("*.json")):
        content = json.loads(path.read_text())
        for name, error in content["provenance"]["error of samples left out of the fit"].items():
            where = f"{content['core']}, torch {content['torch']}"
            figures = f"{error['samples']} | {error['median']:.1%} | {error['p90']:.1%}"
            parts.append(f"| {where} | {name} | {figures} |")
    for release, rows in checked.items():
        near = sum(row.ratio <= 1.05 for row in rows)
        worst = max(row.ratio for row in rows)
        parts.append(
            f"\n## Twenty shapes that are in no table: torch {release}\n\n"
            f"Within 5 % of the best kernel on {near} of {len(rows)}; the worst choice costs {worst:.2f}x.\n"
        )
        parts.append(
            "| layer | chosen | instructions | best | ratio | floor |\n| --- | --- | ---: | --- | ---: | ---: |"
        )
        for row, site in zip(rows, sites(), strict=True):
            floor = site.m * site.k * site.n / 32
            cells = (
                row.shape,
                row.chosen,
                f"{row.instructions:,}",
                row.best,
                f"{row.ratio:.3f}",
                f"{floor:,.0f}",
            )
            parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts) + "\n"


def _head() -> str:
    found = costs.find(targets.load("graviton3"), DEFAULT_TORCH)
    assert found is not None
    calls = costs.TERMS.index("calls")

    def fixed(kernel: str) -> float:
        return statistics.median(variant.coefficients[calls] for variant in found.kernels[kernel]) / 1000

    return _HEAD.format(
        near=round((cost_policy.CostPolicy(found).near - 1) * 100),
        packed=round(fixed("conv1x1_bf16")),
        blas=round(fixed("blas_fp32_w16")),
    )


_HEAD = """\
# What a call costs, and what follows

`--policy cost` estimates, for every layer and kernel, what one call costs, and takes the kernels of the least cost
over the whole graph. The estimates come from tables in `armopt/plan/costs`, fitted to counts on the emulated core with
the real aarch64 PyTorch, and with tcmalloc, as `armopt run` starts a process where there is one: instructions, and
cycles by LLVM's model of the core. Where a target has a clock ([clock.md](clock.md)) the cost is time, on as many
threads as `--threads` says; elsewhere it is instructions. This page is about instructions; it is written by
`python -m benchmarks.arm64.crossover`.

A count is not a time. It leaves out memory: where two kernels are within {near} % of one another, the one that reads
fewer bytes of weights is taken, because a layer with few rows is bound by them.

## Where packed weights begin to win

![BLAS against packed weights](crossover.png)

The Graviton tutorial advises BLAS below 64 rows, for the whole process, because PyTorch packs the weights on every
call. With weights packed once the border moves, and depends on the layer's size: a call of a packed convolution costs
about {packed} thousand instructions before any arithmetic (the tables' `calls`), a call of BLAS about {blas} thousand.
Small layers go to BLAS whatever their batch. Fewest rows from which a packed kernel wins on a square Linear:
"""
_ERRORS = """
## How well the tables know

The Compute Library has several implementations behind one call and takes the one for which it estimates the fewest
cycles. The table makes the same estimate, so that it knows which one answers; then a call costs a fixed part, the
arithmetic on padded tiles, packing of the activations, passes over the weight, and merging of the results. Errors on
samples that were left out of the fit, five-fold:
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts, then writes the page and the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm64.crossover", description=__doc__)
    parser.add_argument("--redraw", action="store_true", help="count nothing")
    if not parser.parse_args(arguments).redraw:
        target = targets.load("graviton3")
        counted = {release: [asdict(row) for row in check(target, release)] for release in _RELEASES}
        RESULTS.write_text(json.dumps(counted, indent=1) + "\n")
    held = json.loads(RESULTS.read_text())
    checked = {release: [Checked(**row) for row in rows] for release, rows in held.items()}
    draw(DOCS / "crossover.png")
    (DOCS / "costs.md").write_text(page(checked))
    for release, rows in checked.items():
        print(release, sum(row.ratio <= 1.05 for row in rows), "of", len(rows), max(row.ratio for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
