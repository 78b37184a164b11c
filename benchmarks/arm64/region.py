"""The emulated side: counted regions, and the process that runs jobs in them."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import operator
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPTION, OPEN, CLOSE = 0x41524D4F, 1, 2  # as in counter.c
LINES_VARIABLE = "ARMOPT_COUNTS"

_prctl = ctypes.CDLL(None).prctl
_prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]


def count(call: Callable[[], Any], label: int = 0) -> Any:
    """Runs one call in a counted region; returns what it returned. Outside a counting process it only runs it."""
    _prctl(OPTION, OPEN, 0, 0, 0)
    result = call()
    _prctl(OPTION, CLOSE, label, 0, 0)
    return result


def _nothing() -> None:
    pass


class Lines:
    """The plugin's output as it grows."""

    def __init__(self) -> None:
        self._file = Path(os.environ[LINES_VARIABLE]).open()  # noqa: SIM115  open as long as the process lives

    def read(self) -> list[dict[str, Any]]:
        """What was written since the last read."""
        return [json.loads(line) for line in self._file]


def run(job: dict[str, Any], lines: Lines) -> dict[str, Any]:
    """Prepares one job, warms it up, counts one call of it."""
    import torch

    from benchmarks.arm64 import profile

    call = resolve(job["make"])(**job["arguments"])
    gc.collect()
    gc.disable()
    with torch.no_grad():
        for _ in range(job["warm_ups"]):
            call()
        lines.read()
        for _ in range(3):
            count(_nothing)
        empty = min(lines.read(), key=lambda line: line["total"])
        for _ in range(job["repeats"]):
            count(call)
        whole = lines.read()
        found: dict[str, Any] = {"empty": _counts(empty), "runs": [_counts(line) for line in whole]}
        if "blocks" in empty:
            found["profile"] = profile.by_symbol(whole[-1]["blocks"])
        if job["by_node"]:
            found["nodes"] = nodes(call, lines)
    gc.enable()
    return found


def nodes(call: Any, lines: Lines) -> list[dict[str, Any]]:
    """Counts every node of a graph alone. The call has `graph_module` and `inputs`."""
    import torch
    from torch import fx

    described: list[dict[str, Any]] = []

    class Counting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op not in ("call_function", "call_method", "call_module"):
                return super().run_node(n)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            function: Any = n.target if n.op == "call_function" else getattr(self, n.op)
            label = len(described)
            if n.op == "call_function":
                _prctl(OPTION, OPEN, 0, 0, 0)
                result = function(*args, **kwargs)
                _prctl(OPTION, CLOSE, label, 0, 0)
            else:
                result = count(lambda: function(n.target, args, kwargs), label)
            shapes = [_shape(a) for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor)]
            described.append({"node": n.name, "target": str(n.target), "inputs": shapes, "output": _shape(result)})
            return result

    interpreter = Counting(call.graph_module)
    interpreter.run(*call.inputs)
    described.clear()
    lines.read()
    interpreter.run(*call.inputs)
    return [entry | _counts(line) for entry, line in zip(described, lines.read(), strict=True)]


def _shape(value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    dtype = str(value.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
    shape = "x".join(str(size) for size in value.shape)
    if value.layout != torch.strided:
        return f"{dtype} {shape} packed"
    return f"{dtype} {shape}" + ("" if value.is_contiguous() else f" strides {list(value.stride())}")


def _counts(line: dict[str, Any]) -> dict[str, int]:
    return {name: value for name, value in line.items() if name not in ("label", "blocks")}


def resolve(name: str) -> Callable[..., Any]:
    """A function by ``module:name``."""
    module, _, attribute = name.partition(":")
    return operator.attrgetter(attribute)(importlib.import_module(module))  # type: ignore[no-any-return]


def main(jobs_file: str, results_file: str) -> None:
    """Runs the jobs of a file, one after another; a failure costs that job only."""
    import torch

    torch.set_num_threads(1)
    lines = Lines()
    for job in pickle.loads(Path(jobs_file).read_bytes()):
        started = time.monotonic()
        try:
            result = run(job, lines)
        except Exception:
            result = {"error": traceback.format_exc()}
        with open(results_file, "a") as results:
            results.write(json.dumps(result) + "\n")
        print(f"{job['name']}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    os._exit(0)  # PyTorch's own end takes seconds under emulation


if __name__ == "__main__":
    main(*sys.argv[1:])
