"""Exact counts of retired instructions by class, on an emulated Arm core with the real aarch64 PyTorch. One thread.

    python -m benchmarks.arm64.counts linear --m 1,8,32,256 --k 1024 --n 1024 [--torch 2.13.0] [--cpu graviton3]
    python -m benchmarks.arm64.counts bundle BUNDLE [--nodes] [--profile] [--inputs FILE]

A count is not a time: it knows nothing of caches, memory and how many instructions a cycle takes. It is exact and
repeatable, so it shows what a change of the software does to the work.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from armopt.emulation.folder import DEFAULT_TORCH
from armopt.errors import ArmoptError
from benchmarks.arm64 import counting, tables
from benchmarks.arm64.counting import FAST_MATH, Counts
from benchmarks.arm64.emulated_jobs import Job

_ONNX = "ONNX Runtime "
#: Names as in jobs.CONTENDERS, and forms of ONNX Runtime; spelled out because importing those imports torch.
CONTENDERS = (
    *("F.linear", "F.linear bf16", "BLAS f32 (addmm on [K, N])", "BLAS bf16 (mkldnn off)"),
    *("_linear_pointwise, packed", "conv1x1_bf16 with casts"),
    # as in onnxruntime_jobs.LINEAR_FORMS
    *(f"{_ONNX}{form}{flag}" for form in ("Gemm", "MatMul+Add", "MatMul+Sub") for flag in ("", ", BF16 flag")),
)


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


def linear(options: argparse.Namespace) -> tuple[list[Counts], str]:
    """Counts every way to call one Linear; also as a table, one way a row."""
    from armopt.ir.records import Op
    from armopt.kernels import table

    ms = [int(m) for m in options.m.split(",")]
    mine = [f"kernel {kernel.name}" for kernel in table.kernels(Op.LINEAR)]
    wanted = options.only.split(";") if options.only else [*CONTENDERS, *mine]
    by_default = [name for name in wanted if name == "F.linear"]
    found: list[Counts] = []
    rows = []
    for suffix, env, names in (
        ("", FAST_MATH, wanted),
        (", default settings", {"OMP_NUM_THREADS": "1"}, by_default),
    ):
        if not names:
            continue
        results = counting.count(
            linear_jobs(ms, options.k, options.n, names),
            cpu=options.cpu,
            torch_version=options.torch,
            env=env,
            profile=options.profile,
            report=_say,
        )
        found += results
        for i, name in enumerate(names):
            rows.append([name + suffix, *map(_cell, results[i * len(ms) : (i + 1) * len(ms)])])
    floor = ["floor: M*N*K/32", *(f"{m * options.k * options.n / 32e6:.3f}" for m in ms)]
    text = tables.table([*rows, floor], ["millions of instructions", *(f"M={m}" for m in ms)])
    if options.profile:
        text += "\n\n" + "\n\n".join(tables.details(counted) for counted in found if not counted.error)
    return found, text


def _cell(counted: Counts) -> str:
    """Millions of instructions; of a failed call the reason goes to stderr."""
    if counted.error:
        _say(f"{counted.name}: {counted.error.splitlines()[-1]}")
        return "failed"
    return f"{counted.total / 1e6:.3f}"


def bundle(options: argparse.Namespace) -> tuple[list[Counts], str]:
    """Counts one call of a bundle."""
    path = Path(options.bundle).absolute()
    arguments = {"path": str(path)}
    if options.inputs:
        arguments["inputs"] = str(Path(options.inputs).absolute())
    job = Job(path.name, "benchmarks.arm64.jobs:bundle", arguments, warm_ups=options.warm_ups, by_node=options.nodes)
    (found,) = counting.count([job], cpu=options.cpu, torch_version=options.torch, profile=options.profile, report=_say)
    return [found], found.error or tables.details(found)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm64.counts", description=__doc__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--torch", default=DEFAULT_TORCH)
    shared.add_argument("--cpu", default="graviton3")
    shared.add_argument("--json", action="store_true", help="all counts as JSON")
    shared.add_argument("--profile", action="store_true", help="by library and function")
    commands = parser.add_subparsers(required=True)
    one_linear = commands.add_parser("linear", parents=[shared], help="every way to call one Linear")
    one_linear.set_defaults(count=linear)
    one_linear.add_argument("--m", default="1,8,32,256")
    one_linear.add_argument("--k", type=int, default=1024)
    one_linear.add_argument("--n", type=int, default=1024)
    one_linear.add_argument("--only", help="names separated by ; such as 'F.linear;kernel conv1x1_bf16'")
    one_bundle = commands.add_parser("bundle", parents=[shared], help="one call of a bundle")
    one_bundle.set_defaults(count=bundle)
    one_bundle.add_argument("bundle")
    one_bundle.add_argument("--inputs", default="", help="file of torch.save((args, kwargs)); zeros by default")
    one_bundle.add_argument("--nodes", action="store_true", help="each node alone, added up by target")
    one_bundle.add_argument("--warm-ups", type=int, default=2)
    options = parser.parse_args(arguments)
    try:
        found, text = options.count(options)
    except ArmoptError as error:
        _say(f"error: {error}")
        return error.exit_code
    print(json.dumps([asdict(counted) for counted in found]) if options.json else text)
    return 1 if any(counted.error for counted in found) else 0


if __name__ == "__main__":
    sys.exit(main())
