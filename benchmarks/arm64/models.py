"""Counts whole models, armopt against what users could run today: docs/benchmarks.md.

    python -m benchmarks.arm64.models                          # what takes minutes, prints the tables
    python -m benchmarks.arm64.models --write                  # and writes docs/benchmarks.md
    python -m benchmarks.arm64.models --only "resnet50 224"    # one model, also a slow one; results are kept
    python -m benchmarks.arm64.models --contenders armopt      # count this contender again, and no other
    python -m benchmarks.arm64.models --all --missing          # go on where a run has ended
    python -m benchmarks.arm64.models --nodes                  # armopt's calls node by node
    python -m benchmarks.arm64.models --ablation               # armopt without one pass at a time
    python -m benchmarks.arm64.models --memory                 # bytes that loading takes
    python -m benchmarks.arm64.models --loading                # instructions that loading takes

Bundles are made here, on this machine, and run on the emulated one. One process for each environment.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armopt.emulation.folder import DEFAULT_TORCH, PreparedFolder
from armopt.errors import ArmoptError
from armopt.targets.emulated import core_named
from benchmarks.arm64 import build_qemu, counts
from benchmarks.arm64.counts import AS_RUN, FAST_MATH, ONE_THREAD, Counts, Job

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "arm64"
PAGE = ROOT / "docs" / "benchmarks.md"
ARMOPT = "armopt"
WITHOUTAS_RUN = "armopt, glibc's malloc"
BASELINE = "eager fast math"
INDUCTOR = "Inductor's calls"
#: Passes that can be left out, with the models that show what each brings.
ABLATED = {
    "resnet50 224": ("FoldBatchNorm", "FusePointwise", "MergeShortcut", "FoldStride", "PropagateBf16"),
    "mobilenet_v3_large 224": ("FoldBatchNorm", "FusePointwise", "ConvertPixelConv", "PropagateBf16"),
    "gpt2 block, 64 tokens": ("FusePointwise", "MergeProjections", "PropagateBf16"),
    "swin_t 224": ("FoldConstants", "FuseAttention", "FusePointwise", "PropagateBf16"),
    "mask r-cnn 128": ("ConvertTransposedConv",),
}
#: Allocators return what is freed to the system, so that what is counted is in use.
FREED_AT_ONCE = {"MIMALLOC_PURGE_DELAY": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
#: What loads a model, by what is counted.
LOADS = {
    "torch.export.load": "load, exported",
    "armopt.load, first on a host": "load, first",
    "armopt.load, later": "load, later",
}
LOADED = ("resnet50 224", "gpt2 block, 64 tokens")
WEIGHED = ("resnet50 224", "gpt2, prefill of 64", "bert base, 128 tokens")


@dataclass(frozen=True)
class Contender:
    """A way to run a model: the process's settings, and how the model is prepared."""

    env: Mapping[str, str]
    arguments: Mapping[str, Any]
    only: str = ""  # models whose name holds one of these words
    onnx: str = ""  # the form of its ONNX model: plain, or for the BF16 flag


_BLAS = {**FAST_MATH, "TORCH_MKLDNN_MATMUL_MIN_DIM": "64"}
_HUGE_PAGES = {**FAST_MATH, "THP_MEM_ALLOC_ENABLE": "1"}
_CONVOLUTIONAL = "resnet mobilenet efficientnet convnext mask"
_DENSE = "mlp block gpt2 bert"
_EXPORTED = "mlp block resnet mobilenet efficientnet convnext vit"
CONTENDERS = {
    "eager FP32": Contender(ONE_THREAD, {}),
    BASELINE: Contender(FAST_MATH, {}),
    "fast math, channels_last": Contender(FAST_MATH, {"channels_last": True}, _CONVOLUTIONAL),
    "fast math, OpenBLAS below 64": Contender(_BLAS, {}, _DENSE),
    "fast math, huge pages": Contender(_HUGE_PAGES, {}, "mlp resnet50"),
    "fast math, tcmalloc": Contender(AS_RUN, {}),
    "model.bfloat16()": Contender(FAST_MATH, {"dtype": "bfloat16"}),
    INDUCTOR: Contender(FAST_MATH, {}, "mlp block resnet mobilenet efficientnet convnext gpt2 bert"),
    "ONNX Runtime": Contender(ONE_THREAD, {"fast_math": False}, _EXPORTED, onnx="plain"),
    "ONNX Runtime, BF16 flag": Contender(ONE_THREAD, {"fast_math": True}, _EXPORTED, onnx="plain"),
    "ONNX Runtime, BF16 flag, armopt's form": Contender(ONE_THREAD, {"fast_math": True}, _EXPORTED, onnx="flag"),
    WITHOUTAS_RUN: Contender(FAST_MATH, {}),
    ARMOPT: Contender(AS_RUN, {}),
}


@functools.cache
def make_bundle(workload: str, cpu: str, torch_version: str, without: str = "") -> Path:
    """Optimizes a model on this machine, planned for a torch release; random weights, so no accuracy gate.

    `without` names a pass to leave out.
    """
    import armopt
    from armopt import targets
    from armopt.compiler.optimize import carry_out
    from armopt.compiler.recipe import Recipe
    from armopt.compiler.source import capture_model
    from armopt.plan import cost_policy
    from benchmarks.arm64.workloads import WORKLOADS

    model, inputs = WORKLOADS[workload].build()
    place = CACHE / "bundles" / _file_name(f"{workload} {without}")
    place.parent.mkdir(parents=True, exist_ok=True)
    whole = WORKLOADS[workload].whole
    target = targets.load(cpu)
    recipe = Recipe(target, cost_policy.default(target, torch_version.rpartition(".")[0]))
    recipe = recipe.without(without) if without else recipe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # images of other brightness too: how many proposals there are is not known beforehand
        example = inputs if whole else [inputs, *(([image * share for image in inputs[0]],) for share in (0.3, 0.6))]
        opened = functools.partial(capture_model, model, example, kind="graph" if whole else "module")
        carry_out(opened, recipe, armopt.Checks(min_cosine=-1.0), armopt.Output(place, force=True))
    return place


def make_onnx(workload: str, cpu: str, torch_version: str, form: str) -> Path:
    """The bundle as an ONNX model, with weights in FP32."""
    from armopt.onnx_export import export
    from armopt.onnx_export.options import OnnxOptions

    bundle = make_bundle(workload, cpu, torch_version)
    place = bundle.with_name(f"{bundle.name}-{form}.onnx")
    export.export(bundle, place, OnnxOptions(fast_math=form != "plain"), force=True)
    return place


def measure(
    workloads: Sequence[str],
    contenders: Sequence[str],
    *,
    cpu: str,
    torch_version: str,
    nodes: bool,
    profile: bool,
    missing: bool,
) -> None:
    """Counts what is asked for and keeps it, environment by environment; `missing` leaves out what is kept already."""
    kept = load(cpu, torch_version) if missing else {}
    groups: dict[tuple[tuple[str, str], ...], list[tuple[str, str, Job]]] = {}
    for contender in contenders:
        kind = CONTENDERS[contender]
        for workload in workloads:
            if kind.only and not any(word in workload for word in kind.only.split()):
                continue
            if "classes" in kept.get(workload, {}).get(contender, {}):
                continue
            name = f"{workload}: {contender}"
            if contender in (ARMOPT, WITHOUTAS_RUN):
                job = armopt_job(name, workload, make_bundle(workload, cpu, torch_version), nodes)
            elif contender == INDUCTOR:
                job = Job(name, "benchmarks.arm64.workloads:inductor", {"workload": workload}, 1)
            elif kind.onnx:
                path = make_onnx(workload, cpu, torch_version, kind.onnx)
                arguments: dict[str, Any] = {"path": str(path), **kind.arguments}
                job = Job(name, "benchmarks.arm64.onnxruntime_jobs:model", arguments, 1)
            else:
                arguments = {"workload": workload, **kind.arguments}
                job = Job(name, "benchmarks.arm64.workloads:eager", arguments, 1)
            groups.setdefault(tuple(sorted(kind.env.items())), []).append((workload, contender, job))
    for env, group in groups.items():

        def keep(index: int, counted: Counts, group: Sequence[tuple[str, str, Job]] = group) -> None:
            workload, contender, _ = group[index]
            keep_result(workload, contender, counted, cpu, torch_version)

        counts.count(
            [job for _, _, job in group],
            cpu=cpu,
            torch_version=torch_version,
            env=dict(env),
            profile=profile,
            timeout=4 * 3600,
            report=_say,
            finished=keep,
        )


def armopt_job(name: str, workload: str, bundle: Path, nodes: bool = False) -> Job:
    """One call of a bundle."""
    from benchmarks.arm64.workloads import WORKLOADS

    if WORKLOADS[workload].whole:
        return Job(name, "benchmarks.arm64.jobs:bundle", {"path": str(bundle)}, 1, 1, nodes)
    return Job(name, "benchmarks.arm64.jobs:module_bundle", {"path": str(bundle), "workload": workload}, 1)


def keep_result(workload: str, contender: str, counted: Counts, cpu: str, torch_version: str) -> None:
    """Adds one count to the kept results."""
    with _alone(cpu, torch_version):
        results = load(cpu, torch_version)
        results.setdefault(workload, {})[contender] = _entry(counted)
        _save(results, cpu, torch_version)
    if counted.error:
        _say(f"{workload}, {contender}: {counted.error}")
    elif counted.nodes or counted.profile:
        print(counts.details(counted), flush=True)


def ablate(workloads: Sequence[str], *, cpu: str, torch_version: str) -> None:
    """Counts armopt without one pass at a time."""
    wanted = [(workload, name) for workload in workloads for name in ABLATED[workload]]
    jobs = [
        armopt_job(f"{workload}: without {name}", workload, make_bundle(workload, cpu, torch_version, name))
        for workload, name in wanted
    ]

    def keep(index: int, counted: Counts) -> None:
        workload, name = wanted[index]
        keep_result(workload, f"without {name}", counted, cpu, torch_version)

    counts.count(jobs, cpu=cpu, torch_version=torch_version, env=AS_RUN, timeout=4 * 3600, report=_say, finished=keep)


def weigh(workloads: Sequence[str], *, cpu: str, torch_version: str) -> None:
    """Bytes that loading each bundle takes, in one emulated process."""
    from armopt.emulation.worker import EmulatedWorker

    first = str(make_bundle("mlp/4 batch 32", cpu, torch_version))
    bundles = {workload: str(make_bundle(workload, cpu, torch_version)) for workload in workloads}
    with tempfile.TemporaryDirectory(prefix="armopt-verdicts-") as cache:
        worker = EmulatedWorker(
            core_named(cpu).name, torch_version, {**FAST_MATH, **FREED_AT_ONCE, "ARMOPT_CACHE": cache}
        )
        for workload, path in bundles.items():
            taken = worker.call("benchmarks.arm64.jobs:memory", path=path, first=first, timeout=3600).value
            results = load(cpu, torch_version)
            results.setdefault(workload, {})["in memory"] = taken
            _save(results, cpu, torch_version)


def count_loading(workloads: Sequence[str], *, cpu: str, torch_version: str, profile: bool) -> None:
    """Instructions that loading takes, in processes that have loaded a small model before.

    Two processes load the bundles: the first probes their kernels, the second finds the verdicts.
    """
    small = "mlp/4 batch 10"
    bundles = {workload: str(make_bundle(workload, cpu, torch_version)) for workload in (small, *workloads)}
    exported = [Job(w, "benchmarks.arm64.jobs:load_exported", {"workload": w}, warm_ups=0) for w in bundles]
    loaded = [Job(w, "benchmarks.arm64.jobs:load_bundle", {"path": path}, warm_ups=0) for w, path in bundles.items()]
    with tempfile.TemporaryDirectory(prefix="armopt-verdicts-") as cache:
        env = {**FAST_MATH, "ARMOPT_CACHE": cache}
        for name, jobs in zip(LOADS.values(), (exported, loaded, loaded), strict=True):

            def keep(index: int, counted: Counts, name: str = name, jobs: Sequence[Job] = jobs) -> None:
                if jobs[index].name != small:
                    keep_result(jobs[index].name, name, counted, cpu, torch_version)

            counts.count(
                jobs,
                cpu=cpu,
                torch_version=torch_version,
                env=env,
                profile=profile,
                timeout=4 * 3600,
                report=_say,
                finished=keep,
            )


def _entry(counted: Counts) -> dict[str, Any]:
    if counted.error:
        return {"error": counted.error.strip().splitlines()[-1]}
    return {"classes": dict(counted.classes)}


def load(cpu: str, torch_version: str) -> dict[str, dict[str, Any]]:
    """What was counted until now: workload -> contender -> classes or error."""
    try:
        return json.loads(_results(cpu, torch_version).read_text())  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {}


def _save(results: Mapping[str, Any], cpu: str, torch_version: str) -> None:
    file = _results(cpu, torch_version)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(results, indent=1, sort_keys=True))
    partial.replace(file)


@contextlib.contextmanager
def _alone(cpu: str, torch_version: str) -> Iterator[None]:
    """Keeps another run from writing results at the same time: two fit a machine of two cores."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with _results(cpu, torch_version).with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _results(cpu: str, torch_version: str) -> Path:
    return CACHE / f"models-{cpu}-{torch_version}.json"


def render(results: Mapping[str, Mapping[str, Any]], floors: Mapping[str, int]) -> str:
    """Two tables: all contenders by total, and armopt and the baseline by class."""
    used = [name for name in CONTENDERS if any(name in row for row in results.values())]
    totals, classes = [], []
    for workload in [name for name in floors if name in results]:
        row = {name: _total(entry) for name, entry in results[workload].items()}
        base, mine = row.get(BASELINE), row.get(ARMOPT)
        ratio = f"{base / mine:.2f}x" if base and mine else ""
        others = [value for name, value in row.items() if name in used and not name.startswith(ARMOPT) and value]
        best = f"{min(others) / mine:.2f}x" if others and mine else ""
        cells = [_millions(row[name]) if name in row else "" for name in used]
        totals.append([workload, f"{floors[workload] / 32e6:.2f}", *cells, ratio, best])
        compared = [name for name in (BASELINE, ARMOPT) if row.get(name)]
        classes += [[workload, name, *counts.class_row(results[workload][name]["classes"])] for name in compared]
    ablation = [
        [name, *(_without(name, results.get(workload, {})) for workload in ABLATED)]
        for name in dict.fromkeys(name for names in ABLATED.values() for name in names)
    ]
    ablation = [row for row in ablation if any(row[1:])]
    memory = []
    for workload, each in results.items():
        if found := each.get("in memory"):
            sizes = [f"{found[name] / 1e6:.1f}" for name in ("fp32_bytes", "bytes", "loaded", "resident", "peak")]
            ratios = [f"{found['loaded'] / found['fp32_bytes']:.2f}", f"{found['peak'] / found['bytes']:.2f}"]
            memory.append([workload, *sizes, *ratios])
    loading = []
    for workload, each in results.items():
        exported, *loads = (_total(each.get(name, {})) for name in LOADS.values())
        if exported and all(loads):
            ratios = [f"{load / exported:.2f}" for load in loads]
            loading.append([workload, *(_millions(load) for load in (exported, *loads)), *ratios])
    header = ["model", "floor", *used, "fast math / armopt", "best other / armopt"]
    by_class = ["model", "", *counts.SHORT_CLASSES, "total"]
    sections = [
        ("Millions of retired instructions of one call:", header, totals),
        ("By class, in thousands:", by_class, classes),
        (
            "Millions of instructions without one of armopt's passes, and what that adds:",
            ["without", *ABLATED],
            ablation,
        ),
        (_ON_MEMORY, _MEMORY, memory),
        (_ON_LOADING, ["model", *LOADS, "first / exported", "later / exported"], loading),
    ]
    return "\n".join(f"{title}\n\n{counts.table(rows, columns)}\n" for title, columns, rows in sections if rows)


def _without(name: str, row: Mapping[str, Any]) -> str:
    """Millions of instructions without a pass, and what that adds."""
    without, whole = _total(row.get(f"without {name}", {})), _total(row.get(ARMOPT, {}))
    return f"{without / 1e6:.2f} ({(without - whole) / 1e6:+.2f})" if without and whole else ""


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

{body}"""


def _total(entry: Mapping[str, Any]) -> int:
    return sum(entry.get("classes", {}).values())


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}" if count else "failed"


def _file_name(workload: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in workload)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.arm64.models", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="models by name")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--torch", default=DEFAULT_TORCH)
    parser.add_argument("--cpu", default="graviton3")
    parser.add_argument("--nodes", action="store_true", help="armopt's calls node by node")
    parser.add_argument("--profile", action="store_true", help="by library and function")
    parser.add_argument("--all", action="store_true", help="the slow models too")
    parser.add_argument("--missing", action="store_true", help="only what has no kept count")
    parser.add_argument("--show", action="store_true", help="count nothing: the kept results only")
    parser.add_argument("--ablation", action="store_true", help="armopt without one pass at a time, nothing else")
    parser.add_argument("--memory", action="store_true", help="bytes that loading takes, nothing else")
    parser.add_argument("--loading", action="store_true", help="instructions that loading takes, nothing else")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    options = parser.parse_args(arguments)
    from benchmarks.arm64.workloads import WORKLOADS

    unknown = set(options.only or []) - set(WORKLOADS)
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(WORKLOADS)}")
    chosen = options.only or [name for name, each in WORKLOADS.items() if options.all or not each.slow]
    try:
        if options.ablation:
            ablate(options.only or ABLATED, cpu=options.cpu, torch_version=options.torch)
        elif options.loading:
            count_loading(options.only or LOADED, cpu=options.cpu, torch_version=options.torch, profile=options.profile)
        elif options.memory:
            weigh(options.only or WEIGHED, cpu=options.cpu, torch_version=options.torch)
        elif not options.show:
            measure(
                chosen,
                options.contenders,
                cpu=options.cpu,
                torch_version=options.torch,
                nodes=options.nodes,
                profile=options.profile,
                missing=options.missing,
            )
        results = load(options.cpu, options.torch)
        body = render(results, {name: each.macs for name, each in WORKLOADS.items()})
        print(body)
        if options.write:
            PAGE.write_text(page(body, options.cpu, options.torch))
    except ArmoptError as error:
        _say(f"error: {error}")
        return error.exit_code
    wanted: list[Mapping[str, Any]] = [results.get(name, {}) for name in chosen]
    return 1 if any("error" in entry for row in wanted for entry in row.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
