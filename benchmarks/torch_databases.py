"""Runs torch's own databases of modules and operations through armopt: docs/databases.md.

    python -m benchmarks.torch_databases                        # all, prints the summary
    python -m benchmarks.torch_databases --write                # all, and writes docs/databases.md
    python -m benchmarks.torch_databases --only nn.Conv2d take  # some
    python -m benchmarks.torch_databases --resume --write       # those that were run before are not run again

`module_db` and `op_db` are what PyTorch tests itself with. Each entry runs in FP32 on its first samples in three ways:
`torch.compile(backend="armopt")`, `armopt.compile`, and a bundle. The result is compared with the model's own in eager
mode: values, dtypes, shapes, and strides. An operation has no weights, so a layer stands in front of it that
gives the very values that it gets, in the layout in which a packed convolution answers.

The target is Graviton2, which works in FP32: what differs is wrong. Entries run in processes of their own with a
limit of work for each, so one that crashes fails its own row.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import itertools
import json
import logging
import os
import queue
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from benchmarks import process_time

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / ".cache" / "databases"  # one file for each entry, so that some can be run again
PAGE = ROOT / "docs" / "databases.md"
TARGET = "graviton2"
WAYS = ("backend", "compile", "bundle")
#: Samples of each entry.
MODULE_SAMPLES, OPERATION_SAMPLES = 4, 2
#: Seconds for one entry: of work, which a busy machine doesn't make more, and from the clock, for one that only waits.
LIMIT, WAITING = 120, 1200
#: Sums in another order: FP32 to five digits of the largest value.
TOLERANCE = 1e-4
#: Give what happened to lie in memory.
_UNINITIALISED = re.compile(r"(new_)?empty|resize_|as_strided_partial")


class Sample(NamedTuple):
    """A model and a call of it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Outcome(NamedTuple):
    """How one sample fared in one way: right, refused, torch (its own limit), wrong, crashed; and why."""

    entry: str
    sample: int
    way: str
    kind: str
    reason: str = ""


class _Operation(nn.Module):
    """A call of an operation behind a layer whose weights are the identity; takes the call's FP32 and other tensors."""

    def __init__(self, function: Callable[..., Any], call: Any) -> None:
        super().__init__()
        self._function = function
        leaves, self._spec = tree_flatten(call)
        self._leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self._layered = next((i for i in self._places if leaves[i].dtype == torch.float32 and leaves[i].dim() > 0), -1)
        self.layer = _identity(leaves[self._layered]) if self._layered >= 0 else None

    def forward(self, *tensors: torch.Tensor) -> Any:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        if self.layer is not None:
            x = leaves[self._layered]
            flat = x.dim() == 2
            y = self.layer(x.unsqueeze(0) if flat else x)
            leaves[self._layered] = y.squeeze(0) if flat else y
        first, args, kwargs = tree_unflatten(leaves, self._spec)
        return self._function(first, *args, **kwargs)


def _identity(x: torch.Tensor) -> nn.Module | None:
    """A layer that gives its input: a convolution on two to five dimensions, else a Linear."""
    if not x.numel():
        return None
    if not 2 <= x.dim() <= 5:
        linear = nn.Linear(x.shape[-1], x.shape[-1], bias=False)
        linear.weight.data = torch.eye(x.shape[-1])
        return linear
    kind = {2: nn.Conv1d, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[x.dim()]
    channels = x.shape[0] if x.dim() == 2 else x.shape[1]
    convolution = kind(channels, channels, 1, bias=False)
    convolution.weight.data = torch.eye(channels).reshape(convolution.weight.shape)
    return convolution


def entries() -> list[str]:
    """Every entry of both databases that has samples in FP32."""
    modules, operations = _databases()
    return [*modules, *operations]


@functools.cache
def _databases() -> tuple[dict[str, Any], dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_methods_invocations, common_modules

    modules = {info.name: info for info in common_modules.module_db}
    operations = {}
    for info in common_methods_invocations.op_db:
        name = f"{info.name} ({info.variant_test_name})" if info.variant_test_name else info.name
        if torch.float32 in info.supported_dtypes("cpu") and not _UNINITIALISED.match(name):
            operations[name] = info
    return modules, operations


def samples(entry: str) -> Iterator[Sample]:
    """The first samples of an entry."""
    modules, operations = _databases()
    if entry in modules:
        info = modules[entry]
        torch.manual_seed(0)
        inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=False)
        for each in inputs[:MODULE_SAMPLES]:
            torch.manual_seed(0)
            made = info.module_cls(*each.constructor_input.args, **each.constructor_input.kwargs)
            yield Sample(made.float().eval(), each.forward_input.args, each.forward_input.kwargs)
        return
    info = operations[entry]
    torch.manual_seed(0)
    for count, each in enumerate(info.sample_inputs("cpu", torch.float32)):
        if count == OPERATION_SAMPLES:
            return
        call = (each.input, each.args, each.kwargs)
        tensors = tuple(leaf for leaf in tree_flatten(call)[0] if isinstance(leaf, torch.Tensor))
        yield Sample(_Operation(info.op, call).eval(), tensors, {})


def run(entry: str, most: int = MODULE_SAMPLES) -> list[Outcome]:
    """Runs the samples of an entry, `most` of them, in each way in this process."""
    found = []
    for number, sample in enumerate(itertools.islice(samples(entry), most)):
        try:
            expected = _called(sample.model, sample)
        except Exception as error:
            found.append(Outcome(entry, number, "eager", "torch", _said(error)))
            continue
        for way in WAYS:
            torch._dynamo.reset()
            found.append(Outcome(entry, number, way, *_judged(way, sample, expected)))
    return found


def _judged(way: str, sample: Sample, expected: Any) -> tuple[str, str]:
    from armopt.errors import ArmoptError

    try:
        with _quietly():
            result = _RUN[way](sample)
    except ArmoptError as error:
        return "refused", _said(error.what)
    except Exception as error:
        if way != "bundle" and _fails_in_torch(sample):
            return "torch", _said(error)
        return "crashed", f"{type(error).__name__}: {_said(error)}"
    difference = compare(expected, result)
    return ("wrong", difference) if difference else ("right", "")


def _backend(sample: Sample) -> Any:
    return _called(torch.compile(sample.model, backend="armopt", options={"target": TARGET}), sample)


def _compile(sample: Sample) -> Any:
    import armopt

    return _called(armopt.compile(sample.model, target=TARGET), sample)


def _bundle(sample: Sample) -> Any:
    import armopt

    args, kwargs = _fresh(sample)
    with tempfile.TemporaryDirectory(prefix="armopt-databases-") as folder:
        place = Path(folder) / "bundle"
        given: Any = args
        if kwargs:
            given = dict(zip(inspect.signature(sample.model.forward).parameters, args, strict=False)) | kwargs
        armopt.optimize(sample.model, given, output=place, target=TARGET, checks=armopt.Checks(min_cosine=-1.0))
        loaded = armopt.load(place)
        return _called(loaded, sample)


_RUN: dict[str, Callable[[Sample], Any]] = {"backend": _backend, "compile": _compile, "bundle": _bundle}


def _fails_in_torch(sample: Sample) -> bool:
    """Whether torch.compile fails too with a backend that does nothing."""
    torch._dynamo.reset()
    try:
        with _quietly():
            _called(torch.compile(sample.model, backend="aot_eager"), sample)
    except Exception:
        return True
    return False


def _called(function: Any, sample: Sample) -> Any:
    args, kwargs = _fresh(sample)
    torch.manual_seed(1)
    with torch.no_grad():
        return function(*args, **kwargs)


def _fresh(sample: Sample) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of the inputs, which the model may write to, in their own layout."""

    def copied(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(copied, sample.args), tree_map(copied, sample.kwargs)


def compare(expected: Any, found: Any) -> str:
    """In what two results differ; empty where they don't."""
    wanted, got = tree_flatten(expected)[0], tree_flatten(found)[0]
    if len(wanted) != len(got):
        return f"{len(got)} values, not {len(wanted)}"
    for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if difference := _difference(a, b):
                return f"output {i}: {difference}"
        elif isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return f"output {i} is a {type(b).__name__}, not a {type(a).__name__}"
    return ""


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    if (a.shape, a.dtype, a.layout) != (b.shape, b.dtype, b.layout):
        return f"{b.dtype} {tuple(b.shape)} {b.layout}, not {a.dtype} {tuple(a.shape)} {a.layout}"
    if a.layout is not torch.strided:
        return _difference(a.to_dense(), b.to_dense())
    seen = [d for d in range(a.dim()) if a.shape[d] > 1] if a.numel() else []
    if [a.stride(d) for d in seen] != [b.stride(d) for d in seen]:
        return f"strides {b.stride()}, not {a.stride()} of {tuple(a.shape)}"
    if not (a.is_floating_point() or a.is_complex()):
        return "" if torch.equal(a, b) else "other values"
    finite = a[torch.isfinite(a)].abs()
    bound = TOLERANCE * float(finite.max()) if finite.numel() else 0.0
    return "" if torch.allclose(a, b, rtol=TOLERANCE, atol=bound, equal_nan=True) else "other values"


def _said(error: BaseException | str) -> str:
    """A message's first line without what differs between runs."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    first = re.sub(r"/tmp/\S+|0x[0-9a-f]+", "…", first)
    return first if len(first) <= 300 else first[: first.rfind(". ", 0, 300) + 1] or first


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def work() -> None:
    """A process's part: names of entries come in, a line of outcomes goes out for each."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        try:
            found = run(line.strip())
        except Exception as error:
            found = [Outcome(line.strip(), 0, "all", "crashed", f"{type(error).__name__}: {_said(error)}")]
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def run_all(names: Sequence[str], jobs: int) -> None:
    """Runs entries in `jobs` processes, and keeps each one's outcomes."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    threads = [threading.Thread(target=_drive, args=(waiting,)) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _drive(waiting: queue.SimpleQueue[str]) -> None:
    """Keeps one process busy; one that dies, or takes too long, fails its entry, and another takes its place."""
    process: subprocess.Popen[str] | None = None
    while not waiting.empty():
        with contextlib.suppress(queue.Empty):
            name = waiting.get_nowait()
            process = process or _process()
            assert process.stdin is not None
            process.stdin.write(name + "\n")
            process.stdin.flush()
            line, late = answer(process)
            if line:
                found = [Outcome(*each) for each in json.loads(line)]
            else:
                why = late or f"the process ended with {process.wait()}"
                found = [Outcome(name, 0, "all", "crashed", why)]
                process = None
            _file(name).write_text(json.dumps(found))
            bad = [each for each in found if each.kind in ("wrong", "crashed")]
            print(name, *(f"\n    {each.sample} {each.way}: {each.kind}: {each.reason}" for each in bad), flush=True)
    if process is not None and process.stdin is not None:
        process.stdin.close()
        process.wait()


def answer(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process answers, or else why it was ended before it did."""
    assert process.stdout is not None
    began, before = time.monotonic(), process_time.worked(process.pid)
    # One line is answered for each that is asked, so no part of it waits in a buffer.
    while not select.select([process.stdout], [], [], 0.2)[0]:
        worked, waited = process_time.worked(process.pid) - before, time.monotonic() - began
        if worked > LIMIT or waited > WAITING:
            process.kill()
            process.wait()
            return "", f"took more than {LIMIT} s of work" if worked > LIMIT else f"took more than {WAITING} s"
    return process.stdout.readline(), ""


def _process() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.torch_databases", "--work"]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def _file(name: str) -> Path:
    return RESULTS / f"{re.sub(r'[^A-Za-z0-9_.]', '_', name)}.json"


def stored(names: Sequence[str]) -> list[Outcome]:
    """What is known of entries."""
    return [Outcome(*each) for n in names if _file(n).exists() for each in json.loads(_file(n).read_text())]


def page(found: Sequence[Outcome]) -> str:
    """docs/databases.md."""
    modules, _ = _databases()
    lines = [
        "# Torch's own databases\n",
        "`python -m benchmarks.torch_databases --write` writes this page. It runs all of `module_db` and `op_db`,",
        'with which PyTorch tests itself, in FP32 through `torch.compile(backend="armopt")`, `armopt.compile` and a',
        "bundle for graviton2. Values, dtypes, shapes and strides are compared with the model's own in eager mode. In",
        "front of an operation stands a layer that gives what it gets, in the layout of a packed convolution.\n",
        f"torch {torch.__version__}; {MODULE_SAMPLES} samples of a module, {OPERATION_SAMPLES} of an operation.\n",
        "| database | way | right | refused | torch's own limit | wrong | crashed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title, chosen in (("module_db", True), ("op_db", False)):
        for way in WAYS:
            rows = [each for each in found if (each.entry in modules) == chosen]
            kinds = Counter(each.kind for each in rows if each.way in (way, "all"))
            counts = (kinds[kind] for kind in ("right", "refused", "torch", "wrong", "crashed"))
            lines.append(f"| {title} | {way} | {' | '.join(map(str, counts))} |")
    headings = {
        "refused": "What armopt refuses, and why",
        "torch": "What torch.compile can't take, whatever the backend, or eager mode itself",
        "wrong": "What is wrong",
        "crashed": "What crashes",
    }
    for kind, heading in headings.items():
        reasons: dict[tuple[str, str], set[str]] = defaultdict(set)
        for each in found:
            if each.kind == kind:
                reasons[each.way, each.reason].add(each.entry)
        if reasons:
            lines += [f"\n## {heading}\n", "| way | reason | entries |", "| --- | --- | --- |"]
            said = sorted(reasons.items(), key=lambda row: (WAYS.index(row[0][0]) if row[0][0] in WAYS else -1, row[0]))
            lines += [f"| {way} | {_cell(why)} | {', '.join(sorted(names))} |" for (way, why), names in said]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="ENTRY", help="run these entries")
    parser.add_argument("--part", default="1/1", help="the i-th of n parts of the entries, as 1/2")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--resume", action="store_true", help="run only what was not run before")
    parser.add_argument("--write", action="store_true", help="write docs/databases.md")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    known = entries()
    part, parts = map(int, options.part.split("/"))
    chosen = options.only or known[part - 1 :: parts]
    run_all([name for name in chosen if not (options.resume and _file(name).exists())], options.jobs)
    found = stored(known)
    if options.write:
        PAGE.write_text(page(found))
    print(Counter((each.way, each.kind) for each in found))
    sys.exit(any(each.kind in ("wrong", "crashed") for each in found))


if __name__ == "__main__":
    main()
