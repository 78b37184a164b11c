"""The tables of whole models, and docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from armopt.emulation.folder import PreparedFolder
from armopt.targets.emulated import core_named
from benchmarks.arm64 import build_qemu, estimates, measuring, tables
from benchmarks.arm64.contenders import ABLATED, ARMOPT, BASELINE, CONTENDERS, LOADS

Row = Mapping[str, Any]  # of one model: contender -> classes or error
Rows = list[list[str]]


def render(results: Mapping[str, Row], floors: Mapping[str, int]) -> str:
    """All tables that there are results for; `floors` are the models' multiply-adds."""
    counted = {name: results[name] for name in floors if name in results}
    used = [name for name in CONTENDERS if any(name in row for row in results.values())]
    sections: tuple[tuple[str, Sequence[str], Sequence[Sequence[Any]]], ...] = (
        (
            "Millions of retired instructions of one call:",
            ["model", "floor", *used, "fast math / armopt", "best other / armopt"],
            [_totals(name, floors[name], row, used) for name, row in counted.items()],
        ),
        (
            "By class, in thousands:",
            ["model", "", *tables.SHORT_CLASSES, "total"],
            [cells for name, row in counted.items() for cells in _by_class(name, row)],
        ),
        (
            "Millions of instructions without one of armopt's passes, and what that adds:",
            ["without", *ABLATED],
            _ablation(results),
        ),
        (_ON_MEMORY, _MEMORY, _memory(results)),
        (_ON_LOADING, ["model", *LOADS, "first / exported", "later / exported"], _loading(results)),
    )
    return "\n".join(f"{title}\n\n{tables.table(rows, columns)}\n" for title, columns, rows in sections if rows)


def _totals(workload: str, macs: int, row: Row, used: Sequence[str]) -> list[str]:
    """One model by total: all contenders, and how armopt compares with the baseline and with the best other."""
    totals = {name: _total(row[name]) for name in used if name in row}
    base, mine = totals.get(BASELINE), totals.get(ARMOPT)
    others = [total for name, total in totals.items() if total and not name.startswith(ARMOPT)]
    return [
        workload,
        f"{macs / 32e6:.2f}",
        *(_millions(totals[name]) if name in totals else "" for name in used),
        f"{base / mine:.2f}x" if base and mine else "",
        f"{min(others) / mine:.2f}x" if others and mine else "",
    ]


def _by_class(workload: str, row: Row) -> list[list[Any]]:
    """The baseline and armopt on one model."""
    compared = [name for name in (BASELINE, ARMOPT) if _total(row.get(name, {}))]
    return [[workload, name, *tables.class_row(row[name]["classes"])] for name in compared]


def _ablation(results: Mapping[str, Row]) -> Rows:
    passes = dict.fromkeys(name for names in ABLATED.values() for name in names)
    rows = [[name, *(_without(name, results.get(workload, {})) for workload in ABLATED)] for name in passes]
    return [row for row in rows if any(row[1:])]


def _without(name: str, row: Mapping[str, Any]) -> str:
    """Millions of instructions without a pass, and what that adds."""
    without, whole = _total(row.get(f"without {name}", {})), _total(row.get(ARMOPT, {}))
    return f"{without / 1e6:.2f} ({(without - whole) / 1e6:+.2f})" if without and whole else ""


def _memory(results: Mapping[str, Row]) -> Rows:
    rows = []
    for workload, row in results.items():
        if found := row.get("in memory"):
            sizes = [f"{found[name] / 1e6:.1f}" for name in ("fp32_bytes", "bytes", "loaded", "resident", "peak")]
            ratios = [f"{found['loaded'] / found['fp32_bytes']:.2f}", f"{found['peak'] / found['bytes']:.2f}"]
            rows.append([workload, *sizes, *ratios])
    return rows


def _loading(results: Mapping[str, Row]) -> Rows:
    rows = []
    for workload, row in results.items():
        exported, *loads = (_total(row.get(name, {})) for name in LOADS.values())
        if exported and all(loads):
            ratios = [f"{load / exported:.2f}" for load in loads]
            rows.append([workload, *map(_millions, (exported, *loads)), *ratios])
    return rows


def _total(entry: Mapping[str, Any]) -> int:
    return sum(entry.get("classes", {}).values())


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}" if count else "failed"


_ON_MEMORY = """Megabytes that armopt.load takes, as the page tables have them, without the emulator's own. `loaded` is
what a second copy in the same process adds: weights and graphs. `resident` and `peak` are those of the first load on a
host, which probes every kernel: all of the process's data, oneDNN's objects and work space and the mapped file of
weights included. Allocators return at once what is freed; the peak is the most of what a thread sees as it looks on."""
_MEMORY = [
    *("model", "weights in FP32", "in the bundle", "loaded", "resident", "peak"),
    *("loaded / FP32", "peak / bundle"),
]
_ON_LOADING = """Millions of retired instructions of loading the same model: armopt's bundle, hashes checked and ready
to run, and PyTorch's exported program, as it is. The first load on a host proves every kernel, a later one, in a new
process, finds that remembered."""


def page(body: str, cpu: str, torch_version: str) -> str:
    """docs/benchmarks.md."""
    qemu = build_qemu.require(PreparedFolder.default()).version()
    return f"""# Benchmarks: retired instructions

Written by `make bench-arm64` (`python -m benchmarks.arm64.models --write`); do not edit.

Exact counts of the instructions that one call retires, one thread, after a warm-up: PyTorch {torch_version}, the real
aarch64 wheel, on an emulated {core_named(cpu).name} ({cpu}, {qemu}, own plugin: benchmarks/arm64/counter.c).
A count is not a time: it knows nothing of caches, memory bandwidth and how many instructions a cycle takes.
This emulator multiplies BF16 with its host's arithmetic (benchmarks/arm64/build_qemu.py): other last bits, same counts.
`floor` is the arithmetic alone: multiply-adds of Linear and convolution / 32, as SVE BFMMLA of 256 bits has them.
`mlp` is the tutorial's 4096-4096-11008-10, `mlp/4` the same with each width divided by 4. Weights are random in
bundles and constant elsewhere: no kernel's work depends on them. Mask R-CNN's are the same everywhere, seeded.
gpt2 is GPT-2 small with its cache of keys and values, whole; mask r-cnn has ResNet-50 and FPN, and 50 proposals.
Every contender runs with LRU_CACHE_CAPACITY=1024 and OMP_NUM_THREADS=1; fast math is DNNL_DEFAULT_FPMATH_MODE=BF16,
"OpenBLAS below 64" adds the tutorial's TORCH_MKLDNN_MATMUL_MIN_DIM=64,
"huge pages" THP_MEM_ALLOC_ENABLE=1, "tcmalloc" LD_PRELOAD of libtcmalloc_minimal.so.4, as `armopt run` sets it.
"Inductor's calls" are those that it emits with freezing: packed weights, batch norms folded, no post-op fused.
armopt's calls include its checks of the inputs. Cells without a number were not counted.
ONNX Runtime runs armopt's exports; its BF16 flag is mlas.enable_gemm_fastmath_arm64_bfloat16 (docs/onnx.md).
Milliseconds on Graviton3 are estimated [below](#estimated-time).

{body}
{estimates.section(measuring.read())}
"""
