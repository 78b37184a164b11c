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
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from armopt.emulation.folder import DEFAULT_TORCH
from armopt.errors import ArmoptError
from armopt.targets.emulated import core_named
from benchmarks.arm64 import counting, page, tables
from benchmarks.arm64.bundles import bundle_job, make_bundle, make_onnx
from benchmarks.arm64.contenders import ABLATED, ARMOPT, CONTENDERS, INDUCTOR, LOADS, WITH_GLIBC
from benchmarks.arm64.counting import AS_RUN, FAST_MATH, Counts
from benchmarks.arm64.emulated_jobs import Job
from benchmarks.arm64.kept import Kept

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
#: Allocators return what is freed to the system, so that what is counted is in use.
FREED_AT_ONCE = {"MIMALLOC_PURGE_DELAY": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
LOADED = ("resnet50 224", "gpt2 block, 64 tokens")
WEIGHED = ("resnet50 224", "gpt2, prefill of 64", "bert base, 128 tokens")


def measure(
    workloads: Sequence[str], contenders: Sequence[str], kept: Kept, *, nodes: bool, profile: bool, missing: bool
) -> None:
    """Counts what is asked for and keeps it, environment by environment; `missing` leaves out what is kept already."""
    held = kept.load() if missing else {}
    groups: dict[tuple[tuple[str, str], ...], dict[tuple[str, str], Job]] = {}
    for contender in contenders:
        kind = CONTENDERS[contender]
        for workload in workloads:
            if kind.takes(workload) and "classes" not in held.get(workload, {}).get(contender, {}):
                group = groups.setdefault(tuple(sorted(kind.env.items())), {})
                group[workload, contender] = _job(workload, contender, kept, nodes)
    for env, group in groups.items():
        _count(group, kept, dict(env), profile=profile)


def _job(workload: str, contender: str, kept: Kept, nodes: bool) -> Job:
    """One call of a model as a contender makes it."""
    name, kind = f"{workload}: {contender}", CONTENDERS[contender]
    if contender in (ARMOPT, WITH_GLIBC):
        return bundle_job(name, workload, make_bundle(workload, kept.cpu, kept.torch_version), nodes)
    if contender == INDUCTOR:
        return Job(name, "benchmarks.arm64.workloads:inductor", {"workload": workload}, 1)
    if kind.onnx:
        path = make_onnx(workload, kept.cpu, kept.torch_version, kind.onnx)
        return Job(name, "benchmarks.arm64.onnxruntime_jobs:model", {"path": str(path), **kind.arguments}, 1)
    return Job(name, "benchmarks.arm64.workloads:eager", {"workload": workload, **kind.arguments}, 1)


def _count(jobs: Mapping[tuple[str, str], Job], kept: Kept, env: Mapping[str, str], *, profile: bool = False) -> None:
    """Counts jobs, by workload and contender, in one process; keeps each result as it comes, if it has a contender."""
    names = list(jobs)

    def keep(index: int, counted: Counts) -> None:
        workload, contender = names[index]
        if not contender:
            return
        if counted.error:
            kept.add(workload, contender, {"error": counted.error.strip().splitlines()[-1]})
            _say(f"{workload}, {contender}: {counted.error}")
            return
        kept.add(workload, contender, {"classes": dict(counted.classes)})
        if counted.nodes or counted.profile:
            print(tables.details(counted), flush=True)

    counting.count(
        list(jobs.values()),
        cpu=kept.cpu,
        torch_version=kept.torch_version,
        env=env,
        profile=profile,
        timeout=4 * 3600,
        report=_say,
        finished=keep,
    )


def ablate(workloads: Sequence[str], kept: Kept) -> None:
    """Counts armopt without one pass at a time."""
    jobs = {}
    for workload in workloads:
        for left_out in ABLATED[workload]:
            bundle = make_bundle(workload, kept.cpu, kept.torch_version, left_out)
            name = f"without {left_out}"
            jobs[workload, name] = bundle_job(f"{workload}: {name}", workload, bundle)
    _count(jobs, kept, AS_RUN)


def weigh(workloads: Sequence[str], kept: Kept) -> None:
    """Bytes that loading each bundle takes, in one emulated process."""
    from armopt.emulation.worker import EmulatedWorker

    first, *paths = (str(make_bundle(name, kept.cpu, kept.torch_version)) for name in ("mlp/4 batch 32", *workloads))
    with tempfile.TemporaryDirectory(prefix="armopt-verdicts-") as cache:
        worker = EmulatedWorker(
            core_named(kept.cpu).name, kept.torch_version, {**FAST_MATH, **FREED_AT_ONCE, "ARMOPT_CACHE": cache}
        )
        for workload, path in zip(workloads, paths, strict=True):
            taken = worker.call("benchmarks.arm64.jobs:memory", path=path, first=first, timeout=3600).value
            kept.add(workload, "in memory", taken)


def count_loading(workloads: Sequence[str], kept: Kept, *, profile: bool) -> None:
    """Instructions that loading takes, in processes that have loaded a small model before.

    Two processes load the bundles: the first probes their kernels, the second finds what it found.
    """
    small = "mlp/4 batch 10"
    bundles = {workload: make_bundle(workload, kept.cpu, kept.torch_version) for workload in (small, *workloads)}
    exported = {w: Job(w, "benchmarks.arm64.jobs:load_exported", {"workload": w}, 0) for w in bundles}
    loaded = {w: Job(w, "benchmarks.arm64.jobs:load_bundle", {"path": str(path)}, 0) for w, path in bundles.items()}
    with tempfile.TemporaryDirectory(prefix="armopt-verdicts-") as cache:
        env = {**FAST_MATH, "ARMOPT_CACHE": cache}
        for name, jobs in zip(LOADS.values(), (exported, loaded, loaded), strict=True):
            named = {(workload, "" if workload == small else name): job for workload, job in jobs.items()}
            _count(named, kept, env, profile=profile)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
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
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    from benchmarks.arm64.workloads import WORKLOADS

    unknown = set(options.only or []) - set(WORKLOADS)
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(WORKLOADS)}")
    chosen = options.only or [name for name, each in WORKLOADS.items() if options.all or not each.slow]
    kept = Kept(options.cpu, options.torch)
    try:
        _carry_out(options, chosen, kept)
        results = kept.load()
        body = page.render(results, {name: each.macs for name, each in WORKLOADS.items()})
        print(body)
        if options.write:
            PAGE.write_text(page.page(body, options.cpu, options.torch))
    except ArmoptError as error:
        _say(f"error: {error}")
        return error.exit_code
    return 1 if any("error" in entry for name in chosen for entry in results.get(name, {}).values()) else 0


def _carry_out(options: argparse.Namespace, chosen: Sequence[str], kept: Kept) -> None:
    """Counts or weighs what the options ask for."""
    if options.ablation:
        ablate(options.only or list(ABLATED), kept)
    elif options.loading:
        count_loading(options.only or LOADED, kept, profile=options.profile)
    elif options.memory:
        weigh(options.only or WEIGHED, kept)
    elif not options.show:
        measure(
            chosen,
            options.contenders,
            kept,
            nodes=options.nodes,
            profile=options.profile,
            missing=options.missing,
        )


if __name__ == "__main__":
    sys.exit(main())
