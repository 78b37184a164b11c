"""Counts what docs/onnx.md says of ONNX Runtime on an emulated core: one call, one thread, millions of instructions.

    python -m benchmarks.arm64.onnx_page                   # prints the tables
    python -m benchmarks.arm64.onnx_page options --write   # one of them, and puts it into docs/onnx.md

Models are exported here, on this machine, and run on the emulated one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from armopt.emulation.folder import DEFAULT_TORCH
from benchmarks.arm64 import counting, tables
from benchmarks.arm64.bundles import make_onnx
from benchmarks.arm64.emulated_jobs import Job

PAGE = Path(__file__).resolve().parents[2] / "docs" / "onnx.md"
CPU = "graviton3"
JOBS = "benchmarks.arm64.onnxruntime_jobs"
#: The header of a table, and its rows: what each is, and its jobs.
Table = tuple[Sequence[str], list[tuple[str, list[Job]]]]

_LINEAR = (("Gemm", False), ("Gemm", True), ("MatMul+Add", True), ("MatMul+Sub", False), ("MatMul+Sub", True))
_ROWS = (1, 8, 32, 256)
_REPEATS = 3  # the least counts: now and then a call has up to half a million more
#: Channels in and out, and the side of the image.
_PIXELS = ((64, 64, 56), (64, 256, 56), (1024, 256, 14), (512, 2048, 7), (16, 64, 56))
_FORMS = {
    "plain form": ("plain", False),
    "plain form, with the flag": ("plain", True),
    "form for the flag, without it": ("flag", False),
    "form for the flag, with the flag": ("flag", True),
}
_MODELS = ("bert block, 128 tokens", "mobilenet_v3_large 224")
#: What is changed of a session as the manifest wants it. ``a.b`` is a configuration entry, others are attributes.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "no other option": {},
    "`graph_optimization_level`: extended": {"graph_optimization_level": 2},
    "`graph_optimization_level`: basic": {"graph_optimization_level": 1},
    "`graph_optimization_level`: none": {"graph_optimization_level": 0},
    "`session.disable_prepacking`: 1": {"session.disable_prepacking": "1"},
    "`optimization.enable_gelu_approximation`: 1": {"optimization.enable_gelu_approximation": "1"},
    "`mlas.nchwc_depthwise_sliding`: 1": {"mlas.nchwc_depthwise_sliding": "1"},
    "`mlas.disable_kleidiai`: 1": {"mlas.disable_kleidiai": "1"},
    "`session.set_denormal_as_zero`: 1": {"session.set_denormal_as_zero": "1"},
    "`enable_cpu_mem_arena`: False": {"enable_cpu_mem_arena": False},
    "`enable_mem_pattern`: False": {"enable_mem_pattern": False},
}


def _linear() -> Table:
    rows = []
    for form, flag in _LINEAR:
        name = f"{form}{', with the flag' if flag else ''}"
        arguments = {"form": form, "fast_math": flag, "k": 1024, "n": 1024}
        jobs = [Job(f"{name} M={m}", f"{JOBS}:linear", {**arguments, "m": m}, repeats=_REPEATS) for m in _ROWS]
        rows.append((name, jobs))
    return ("Linear 1024 to 1024 with bias", "1 row", *map(str, _ROWS[1:])), rows


def _convolutions() -> Table:
    kinds = (("Conv", False), ("Conv", True), ("MatMul", False), ("MatMul", True))
    names = [f"{form}{', with the flag' if flag else ''}" for form, flag in kinds]
    rows = []
    for inside, outside, side in _PIXELS:
        row = f"{inside} to {outside} channels, {side}x{side}"
        geometry = {"shape": (1, inside, side, side), "weight": (outside, inside, 1, 1)}
        jobs = [
            Job(f"{row}: {name}", f"{JOBS}:conv", {"form": form, "fast_math": flag, **geometry}, repeats=_REPEATS)
            for name, (form, flag) in zip(names, kinds, strict=True)
        ]
        rows.append((row, jobs))
    return ("one pixel, with bias and relu", *names), rows


def _forms() -> Table:
    models = (*_MODELS, "resnet50 224")
    rows = [(model, [_model(model, form, flag) for form, flag in _FORMS.values()]) for model in models]
    return ("", *_FORMS), rows


def _options() -> Table:
    columns = {model: (model, "flag", True) for model in _MODELS}
    columns["the second in plain form, without the flag"] = (_MODELS[1], "plain", False)
    rows = [(name, [_model(*each, changed) for each in columns.values()]) for name, changed in OPTIONS.items()]
    return ("session", *columns), rows


def _model(model: str, form: str, flag: bool, options: Mapping[str, Any] | None = None) -> Job:
    path = str(make_onnx(model, CPU, DEFAULT_TORCH, form))
    arguments = {"path": path, "fast_math": flag, "options": options}
    return Job(f"{model}, {form}, {flag}, {options}", f"{JOBS}:model", arguments, 1)


TABLES: Mapping[str, Callable[[], Table]] = {
    "linear": _linear,
    "convolutions": _convolutions,
    "forms": _forms,
    "options": _options,
}


def count(table: Table) -> str:
    """The table, counted."""
    header, rows = table
    jobs = [job for _, row in rows for job in row]
    found = iter(counting.count(jobs, cpu=CPU, env=counting.ONE_THREAD, timeout=4 * 3600, report=_say))
    return tables.table([[name, *map(_cell, (next(found) for _ in row))] for name, row in rows], header)


def _cell(counted: counting.Counts) -> str:
    """Millions of instructions; of a failed call the reason goes to stderr."""
    if counted.error:
        _say(f"{counted.name}: {counted.error.splitlines()[-1]}")
        return "failed"
    least = min(counted.totals)
    return f"{least / 1e6:.{1 if least > 1e8 else 2}f}"


def page(text: str, name: str, table: str) -> str:
    """The page with one table anew."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = text.partition(begin)
    return before + begin + table + "\n" + end + rest.partition(end)[2]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--write", action="store_true", help="put them into docs/onnx.md")
    options = parser.parse_args(arguments)
    failed = False
    for name in options.tables or TABLES:
        table = count(TABLES[name]())
        print(f"{name}\n{table}\n", flush=True)
        failed |= "failed" in table
        if options.write:
            PAGE.write_text(page(PAGE.read_text(), name, table))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
