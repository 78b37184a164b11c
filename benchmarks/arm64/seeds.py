"""The tutorial and the talk that armopt grew from: what they published, and what the clock says of it today.

python -m benchmarks.arm64.measuring --seeds     # adds what is missing to measures.json
python -m benchmarks.arm64.seeds                 # writes docs/seeds.md from it
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from armopt.emulation.folder import DEFAULT_TORCH
from benchmarks.arm64 import clock, measuring, published, tables
from benchmarks.arm64.measuring import LINE, Measure
from benchmarks.arm64.published import Case, Row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "seeds.md"
_TCMALLOC = {"LD_PRELOAD": "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4"}
_FAST = {"DNNL_DEFAULT_FPMATH_MODE": "BF16"}
_BATCHES = (256, 32, 10)
#: What users install, and this project develops on.
_TODAY = "2.13.0"
#: Multiply-adds of the talk's product.
_PRODUCT = 2000


def today(row: Row) -> Case | None:
    """The same call and settings with today's PyTorch; None where nothing reproduces the row."""
    if not isinstance(row.case, Case):
        return None
    case = row.case
    return Case(case.make, case.arguments, _TODAY, case.target, case.threads, case.env, parts=case.parts)


def armopts(batch: int) -> Case:
    """The tutorial's model as a bundle, as `armopt run` starts a process."""
    env = {**_FAST, **_TCMALLOC}
    return Case("bundle", {"workload": f"mlp batch {batch}"}, _TODAY, "graviton3", 4, env)


def product(dtype: str) -> Case:
    """The talk's product of two square matrices by OpenBLAS on one core of the Yitian 710."""
    sizes = dict.fromkeys("mkn", _PRODUCT)
    return Case("blas_matmul", {**sizes, "dtype": dtype}, DEFAULT_TORCH, "yitian710", 1, cpu="yitian710", warm_ups=1)


def tutorial() -> list[Row]:
    """The rows of the tutorial that are of its whole model."""
    return [row for row in published.rows() if "tutorial" in row.where and row.columns["op"].startswith("MLP")]


def cases() -> Iterable[Case]:
    """All that is measured for the page, beside what judges the clock."""
    yield from (case for row in tutorial() if (case := today(row)))
    yield from map(armopts, _BATCHES)
    yield from map(product, ("float32", "bfloat16"))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _tutorial(held: Mapping[str, Measure]) -> str:
    rows = []
    for row in tutorial():
        batch = int(row.columns["shape"].removeprefix("B="))
        same = clock.estimate(row.case if isinstance(row.case, Case) else None, held)
        ours = clock.estimate(armopts(batch), held)
        published_time = row.milliseconds
        setting = row.columns["dtype_or_setting"]
        now = clock.estimate(today(row), held)
        cells = [str(batch), setting, _cell(published_time), *map(_cell, (same, now, ours))]
        rows.append([*cells, f"{now / ours:.1f}x" if now and ours else ""])
    versions = f"torch {_TODAY}"
    headers = [
        "batch",
        "setting",
        "published",
        "estimated: torch 2.2.0",
        f"{versions}, same setting",
        f"{versions}, armopt",
    ]
    return tables.table(rows, [*headers, "today / armopt"])


def _moved(held: Mapping[str, Measure]) -> str:
    """Why the times at batch 10 are what they are: page faults, and megabytes into the cores' caches and out."""
    rows = []
    for row in tutorial():
        if row.columns["shape"] == "B=10" and isinstance(row.case, Case):
            setting = row.columns["dtype_or_setting"]
            rows += [(f"torch {case.torch}, {setting}", case) for case in (row.case, today(row)) if case]
    rows.append((f"torch {_TODAY}, armopt", armopts(10)))
    found = [(name, held[measuring.key(case)]) for name, case in rows if measuring.key(case) in held]
    cells = [[name, str(m.faults), *(f"{n * LINE / 1e6:.0f}" for n in m.lines_of_all[1])] for name, m in found]
    return tables.table(cells, ["batch 10", "page faults", "MB in", "MB out"])


def _products(held: Mapping[str, Measure]) -> str:
    rows = []
    flops = 2 * _PRODUCT**3
    for dtype in ("float32", "bfloat16"):
        case = product(dtype)
        measure, time = held.get(measuring.key(case)), clock.estimate(case, held)
        if measure is not None and time is not None:
            rows.append([dtype, f"{measure.instructions / 1e6:.0f}", f"{time:.0f}", f"{flops / time / 1e6:.0f}"])
    return tables.table(rows, ["dtype", "million instructions", "estimated ms", "estimated GFLOPS"])


def main() -> int:
    """Writes the tables of the page; returns the exit code."""
    held = measuring.read()
    text = PAGE.read_text()
    for name, made in (("tutorial", _tutorial(held)), ("moved", _moved(held)), ("products", _products(held))):
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(marks[0]) + ".*?" + re.escape(marks[1]), re.DOTALL)
        text = pattern.sub(lambda _, made=made, marks=marks: f"{marks[0]}\n\n{made}\n\n{marks[1]}", text)
    PAGE.write_text(text)
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
