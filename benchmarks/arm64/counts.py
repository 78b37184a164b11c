"""Exact counts of retired instructions by class, on an emulated Arm core with the real aarch64 PyTorch. One thread.

    python -m benchmarks.arm64.counts linear --m 1,8,32,256 --k 1024 --n 1024 [--torch 2.13.0] [--cpu graviton3]
    python -m benchmarks.arm64.counts bundle BUNDLE [--nodes] [--profile] [--inputs FILE]

A count is not a time: it knows nothing of caches, memory and how many instructions a cycle takes. It is exact and
repeatable, so it shows what a change of the software does to the work.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from armopt.emulation import emulated_command
from armopt.emulation.folder import DEFAULT_TORCH, PreparedFolder
from armopt.errors import ArmoptError, HostError
from armopt.targets.emulated import core_named
from benchmarks.arm64 import build_qemu
from benchmarks.arm64.opcodes import CLASSES
from benchmarks.arm64.region import COUNTS_VARIABLE

#: What every counted process gets; the caller's own settings are not inherited.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "LRU_CACHE_CAPACITY": "1024"}
FAST_MATH = {**ONE_THREAD, "DNNL_DEFAULT_FPMATH_MODE": "BF16"}
#: As `armopt run` starts a process where tcmalloc is installed.
AS_RUN = {**FAST_MATH, "LD_PRELOAD": "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4"}


@dataclass(frozen=True)
class Job:
    """One call to count.

    Attributes:
        name: For people.
        make: ``module:function`` that prepares the call on the emulated side and returns it (see jobs.py).
        arguments: Its keyword arguments.
        warm_ups: Uncounted calls before the counted ones: they fill caches and generate code.
        repeats: Counted calls; the last one is reported, and they differ little.
        by_node: Whether to count each node of the call's `graph_module` alone as well.
    """

    name: str
    make: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    warm_ups: int = 3
    repeats: int = 1
    by_node: bool = False


@dataclass(frozen=True)
class Counts:
    """Retired instructions of one call, without what opening and closing the region costs.

    Attributes:
        name: The job's.
        classes: By class (see opcodes.def).
        totals: Of each counted call.
        nodes: With `by_node`: node, target, inputs, output and the counts of each, in order.
        profile: With `profile`: (library, mangled symbol, instructions), the most first.
        error: The traceback, if the job failed; then there are no counts.
    """

    name: str
    classes: Mapping[str, int] = field(default_factory=dict)
    totals: tuple[int, ...] = ()
    nodes: tuple[Mapping[str, Any], ...] = ()
    profile: tuple[tuple[str, str, int], ...] = ()
    error: str = ""

    @property
    def total(self) -> int:
        """All instructions."""
        return sum(self.classes.values())

    def by_target(self) -> list[dict[str, Any]]:
        """The nodes added up by target, the most instructions first; then what is outside of all nodes."""
        found: dict[str, dict[str, Any]] = {}
        for node in self.nodes:
            entry = found.setdefault(
                node["target"], {"target": node["target"], "nodes": 0, **dict.fromkeys(CLASSES, 0), "total": 0}
            )
            entry["nodes"] += 1
            for name in (*CLASSES, "total"):
                entry[name] += node[name]
        rows = sorted(found.values(), key=lambda entry: -entry["total"])
        inside = {name: sum(row[name] for row in rows) for name in CLASSES}
        rest = {name: self.classes[name] - inside[name] for name in CLASSES}
        return [*rows, {"target": "(outside of nodes)", "nodes": 0, **rest, "total": sum(rest.values())}]


def count(
    jobs: Sequence[Job],
    *,
    cpu: str = "graviton3",
    torch_version: str = DEFAULT_TORCH,
    env: Mapping[str, str] = FAST_MATH,
    profile: bool = False,
    timeout: float = 3600.0,
    report: Callable[[str], None] = lambda line: None,
    finished: Callable[[int, Counts], None] = lambda index, counts: None,
) -> list[Counts]:
    """Runs all jobs in one emulated Python and counts them.

    Args:
        jobs: What to call; each fails alone.
        cpu: A product or a core that QEMU models.
        torch_version: The aarch64 PyTorch.
        env: All settings of the process that matter; nothing else is inherited.
        profile: Whether to find out by function where the instructions were retired.
        timeout: Seconds for all of them; a run costs about a minute to start.
        report: Gets what the process writes: a line as each job ends.
        finished: Gets each job's index and counts as it ends.

    Raises:
        HostError: QEMU with plugins or the emulated machine is not prepared; or the process died.
    """
    prepared = PreparedFolder.default()
    qemu = build_qemu.require(prepared)
    core = core_named(cpu)
    with tempfile.TemporaryDirectory(prefix="armopt-counts-") as name:
        folder = Path(name)
        (folder / "jobs").write_bytes(pickle.dumps([asdict(job) for job in jobs]))
        lines, results, log = folder / "lines", folder / "results", folder / "log"
        lines.touch()
        clean = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        _, environment = emulated_command(
            core.name, ["python"], torch_version=torch_version, env={**clean, **env, COUNTS_VARIABLE: str(lines)}
        )
        command = [
            *(str(qemu.binary), "-0", str(prepared.wrappers / "python"), "-cpu", core.name),
            *("-L", str(prepared.sysroot(core))),
            *("-plugin", f"file={qemu.plugin},out={lines},profile={'on' if profile else 'off'}"),
            str(prepared.sysroot(core) / "usr" / "bin" / "python3.11"),
            *("-m", "benchmarks.arm64.region", str(folder / "jobs"), str(results)),
        ]
        root = Path(__file__).resolve().parents[2]
        with log.open("w+") as errors:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # oneDNN's log too: this process's own stdout is for results
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=_end_with_parent,
            )
            assert process.stdout
            watchdog = _kill_after(process, timeout)
            seen = 0
            try:
                for line in process.stdout:
                    errors.write(line)
                    report(line.rstrip())
                    for result in _read(results)[seen:]:
                        finished(seen, _one(jobs[seen], result))
                        seen += 1
                code = process.wait()
            finally:
                watchdog.cancel()
                process.kill()
        found = _read(results)
        if code and len(found) < len(jobs):
            tail = "\n".join(log.read_text().splitlines()[-15:])
            died = Counts(jobs[len(found)].name, error=f"the emulated process ended with {code}\n{tail}")
            if not found:
                raise HostError(died.error, where=died.name)
            finished(len(found), died)
            return [*_all_counts(jobs, found), died]
        return _all_counts(jobs, found)


def _end_with_parent() -> None:
    """Asks the kernel to kill the emulated process when this one dies, however it does."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _kill_after(process: subprocess.Popen[str], seconds: float) -> Any:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def _read(results: Path) -> list[dict[str, Any]]:
    return json.loads(results.read_text()) if results.exists() else []


def _all_counts(jobs: Sequence[Job], found: Sequence[Mapping[str, Any]]) -> list[Counts]:
    return [_one(job, result) for job, result in zip(jobs, found, strict=False)]


def _one(job: Job, result: Mapping[str, Any]) -> Counts:
    if "error" in result:
        return Counts(job.name, error=result["error"])
    empty = result["empty"]

    def net(counted: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value - empty[name] if name in empty else value for name, value in counted.items()}

    runs = [net(run) for run in result["runs"]]
    last = {name: runs[-1][name] for name in CLASSES}
    return Counts(
        name=job.name,
        classes=last,
        totals=tuple(run["total"] for run in runs),
        nodes=tuple(net(node) for node in result.get("nodes", [])),
        profile=tuple((library, symbol, number) for library, symbol, number in result.get("profile", [])),
    )


# --- tables ---------------------------------------------------------------------------------------

SHORT_CLASSES = ("sve bfmmla", "neon bfmmla", "bfdot", "fmla", "vload", "vstore", "vother", "other")


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A Markdown table, aligned for terminals; numbers to the right."""
    texts = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *texts]) for i in range(len(header))]
    right = [all(isinstance(row[i], (int, float)) for row in rows) and bool(rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in texts)])


def class_row(counts: Mapping[str, Any]) -> list[int]:
    """The counts by class in thousands, then the total."""
    return [round(counts[name] / 1000) for name in CLASSES] + [round(sum(counts[n] for n in CLASSES) / 1000)]


def details(counts: Counts, *, nodes: int = 25, symbols: int = 40) -> str:
    """All that is known of one call, in thousands of instructions."""
    parts = [f"{counts.name}: thousands of instructions", table([class_row(counts.classes)], [*SHORT_CLASSES, "total"])]
    if counts.nodes:
        rows = [[row["target"], row["nodes"], *class_row(row)] for row in counts.by_target()]
        parts += ["", "by target", table(rows, ["target", "nodes", *SHORT_CLASSES, "total"])]
        most = sorted(counts.nodes, key=lambda node: -node["total"])[:nodes]
        shown = [[n["node"], n["target"], " ; ".join(n["inputs"]), *class_row(n)] for n in most]
        parts += [
            "",
            f"the {len(most)} largest nodes",
            table(shown, ["node", "target", "inputs", *SHORT_CLASSES, "total"]),
        ]
    if counts.profile:
        libraries: defaultdict[str, int] = defaultdict(int)
        for library, _, number in counts.profile:
            libraries[library] += number
        by_library = sorted(libraries.items(), key=lambda item: -item[1])
        parts += [
            "",
            "by library (instructions)",
            table([list(row) for row in by_library], ["library", "instructions"]),
        ]
        named = [[n, library, demangle(symbol)[:150]] for library, symbol, n in counts.profile[:symbols]]
        parts += ["", "by function (instructions)", table(named, ["instructions", "library", "function"])]
    return "\n".join(parts)


def demangle(symbol: str) -> str:
    """A C++ name as people write it, where the host has c++filt."""
    try:
        done = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return symbol
    return done.stdout.strip() or symbol


# --- command line ---------------------------------------------------------------------------------


_ONNX = "ONNX Runtime "


def linear_jobs(ms: Sequence[int], k: int, n: int, names: Sequence[str]) -> list[Job]:
    """Every kernel and contender on every M; names are the kernels' or the contenders'."""
    jobs = []
    for name in names:
        for m in ms:
            shape = {"m": m, "k": k, "n": n}
            if name.startswith("kernel "):
                arguments = {"kernel": name.removeprefix("kernel "), **shape}
                jobs.append(Job(f"{name} M={m}", "benchmarks.arm64.jobs:linear_kernel", arguments))
            elif name.startswith(_ONNX):
                form, _, flag = name.removeprefix(_ONNX).partition(", ")
                arguments = {"form": form, "fast_math": bool(flag), **shape}
                jobs.append(Job(f"{name} M={m}", "benchmarks.arm64.onnxruntime_jobs:linear", arguments))
            else:
                jobs.append(Job(f"{name} M={m}", "benchmarks.arm64.jobs:linear_contender", {"how": name, **shape}))
    return jobs


#: Names as in jobs.CONTENDERS, and forms of ONNX Runtime; spelled out because importing those imports torch.
CONTENDERS = (
    *("F.linear", "F.linear bf16", "BLAS f32 (addmm on [K, N])", "BLAS bf16 (mkldnn off)"),
    *("_linear_pointwise, packed", "conv1x1_bf16 with casts"),
    # as in onnxruntime_jobs.LINEAR_FORMS
    *(f"{_ONNX}{form}{flag}" for form in ("Gemm", "MatMul+Add", "MatMul+Sub") for flag in ("", ", BF16 flag")),
)


def _linear_table(options: argparse.Namespace, report: Callable[[str], None]) -> tuple[list[Counts], str]:
    from armopt.ir.records import Op
    from armopt.kernels import table as kernels

    ms = [int(m) for m in options.m.split(",")]
    mine = [f"kernel {kernel.name}" for kernel in kernels.kernels(Op.LINEAR)]
    wanted = options.only.split(";") if options.only else [*CONTENDERS, *mine]
    found: list[Counts] = []
    rows = []
    settings: tuple[tuple[str, Mapping[str, str], Sequence[str]], ...] = (
        ("", FAST_MATH, wanted),
        (", default settings", {"OMP_NUM_THREADS": "1"}, [name for name in wanted if name == "F.linear"]),
    )
    for suffix, env, names in settings:
        if not names:
            continue
        results = count(
            linear_jobs(ms, options.k, options.n, names),
            cpu=options.cpu,
            torch_version=options.torch,
            env=env,
            profile=options.profile,
            report=report,
        )
        found += results
        for i, name in enumerate(names):
            row = results[i * len(ms) : (i + 1) * len(ms)]
            rows.append([name + suffix, *(f"{c.total / 1e6:.3f}" if not c.error else "failed" for c in row)])
            for c in row:
                if c.error:
                    report(f"{c.name}: {c.error.splitlines()[-1]}")
    floor = ["floor: M*N*K/32", *(f"{m * options.k * options.n / 32e6:.3f}" for m in ms)]
    text = table([*rows, floor], ["millions of instructions", *(f"M={m}" for m in ms)])
    if options.profile:
        text += "\n\n" + "\n\n".join(details(c) for c in found if not c.error)
    return found, text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm64.counts", description=__doc__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--torch", default=DEFAULT_TORCH)
    shared.add_argument("--cpu", default="graviton3")
    shared.add_argument("--json", action="store_true", help="all counts as JSON")
    shared.add_argument("--profile", action="store_true", help="by library and function")
    commands = parser.add_subparsers(dest="command", required=True)
    linear = commands.add_parser("linear", parents=[shared], help="every way to call one Linear")
    linear.add_argument("--m", default="1,8,32,256")
    linear.add_argument("--k", type=int, default=1024)
    linear.add_argument("--n", type=int, default=1024)
    linear.add_argument("--only", help="names separated by ; such as 'F.linear;kernel conv1x1_bf16'")
    of_bundle = commands.add_parser("bundle", parents=[shared], help="one call of a bundle")
    of_bundle.add_argument("bundle")
    of_bundle.add_argument("--inputs", default="", help="file of torch.save((args, kwargs)); zeros by default")
    of_bundle.add_argument("--nodes", action="store_true", help="each node alone, added up by target")
    of_bundle.add_argument("--warm-ups", type=int, default=2)
    options = parser.parse_args(arguments)

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        if options.command == "linear":
            found, text = _linear_table(options, report)
        else:
            places = {"path": str(Path(options.bundle).absolute())}
            if options.inputs:
                places["inputs"] = str(Path(options.inputs).absolute())
            job = Job(
                Path(options.bundle).name,
                "benchmarks.arm64.jobs:bundle",
                places,
                warm_ups=options.warm_ups,
                by_node=options.nodes,
            )
            found = count([job], cpu=options.cpu, torch_version=options.torch, profile=options.profile, report=report)
            text = found[0].error or details(found[0])
    except ArmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps([asdict(c) for c in found]) if options.json else text)
    return 1 if any(c.error for c in found) else 0


if __name__ == "__main__":
    sys.exit(main())
