"""Optimizes, loads and validates every known model for one target: docs/coverage.md.

    python benchmarks/coverage.py                        # all, prints the table
    python benchmarks/coverage.py --write                # all, and writes docs/coverage.md
    python benchmarks/coverage.py --only resnet18 bert   # some; with --write the others' rows stay as last measured
    python benchmarks/coverage.py --resume --write       # those that went through before are not measured again

Each model runs in a process of its own with a time limit: one model in memory at a time, and one that crashes fails
its own row. The bundle goes to a temporary folder and is removed.

Weights are torchvision's own random ones. Models without batch norm get random_weights.randomize on top, else errors
would be multiplied away: ViT's head starts at 0, ConvNeXt's layer scales at 1e-6. Models with batch norm do not: given
the statistics of their input, a deep net of random weights is chaotic (FCN-ResNet50 amplifies one rounding of its
input to a fifth of the output, and PyTorch's own BF16 autocast gets a cosine of 0.89), which no trained net is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from armopt.bundle.manifest import PartPlan

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / ".cache" / "coverage"  # one file for each model, so that some can be measured again
PAGE = ROOT / "docs" / "coverage.md"
TARGET = "graviton3"
MIN_COSINE = 0.99  # TorchBench's bound for BF16, as in armopt.accuracy
COLUMNS = (
    *("model", "input", "params (M)", "BF16", "FP32", "BLAS", "ATen"),
    *("weights", "cosine", "autocast", "max rel error", "notes"),
)


def torchvision_names() -> list[str]:
    """Every torchvision classification and segmentation model, in that order, each sorted by name."""
    from armopt.models import torchvision_ops

    torchvision_ops.ensure_torchvision()
    models = importlib.import_module("torchvision.models")
    modules = (models, importlib.import_module("torchvision.models.segmentation"))
    return [name for module in modules for name in models.list_models(module=module)]


def names() -> tuple[list[str], list[str]]:
    """Torchvision's classification and segmentation models, and the Hugging Face ones of the tests."""
    from tests import zoo_models

    return torchvision_names(), list(zoo_models.HUGGING_FACE)


def build(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A model with seeded random weights, and the smallest sensible inputs: module, args, kwargs."""
    import torch

    from armopt.models import references, torchvision_inputs
    from benchmarks import random_weights
    from tests import zoo_models

    if name in zoo_models.HUGGING_FACE:
        return zoo_models.HUGGING_FACE[name](), (), zoo_models.EXAMPLES[name]()
    entry = torchvision_inputs.entry(name, "smallest")
    torch.manual_seed(0)
    model = references.resolve(entry.reference)().eval()
    if not any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        random_weights.randomize(model)
    return model, torchvision_inputs.example_inputs(entry.reference, "smallest"), {}


def measure(name: str) -> dict[str, Any]:
    """Optimizes, loads and validates one model, in this process."""
    import torch

    import armopt

    torch.set_num_threads(1)
    model, args, kwargs = build(name)
    with tempfile.TemporaryDirectory(prefix="armopt-coverage-") as folder:
        bundle = Path(folder) / "bundle"
        # A gate that can't fail here: the row is to say how far off a model is.
        written = armopt.optimize(
            model, kwargs or args, output=bundle, target=TARGET, checks=armopt.Checks(min_cosine=-1.0)
        ).manifest
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the twins run: the page's header says so
            loaded = armopt.load(bundle)
        with torch.no_grad():
            expected = model.eval()(*args, **kwargs)
            with torch.autocast("cpu", torch.bfloat16):  # what PyTorch itself makes of the model in BF16
                rounded = model(*args, **kwargs)
        found = loaded(*args, **kwargs)
        # The command's own comparison, on random inputs, with the bundle's graph in FP32 as the reference.
        again = armopt.validate(bundle, min_cosine=-1.0)
    _check_alike(expected, found)
    compared, baseline = _compared(expected, found), _compared(expected, rounded)
    notes = sorted({skip.reason for skip in written.refused})
    if not all(entry.finite for entry in compared):
        notes.append("NOT FINITE")
    if again["cosine"] < MIN_COSINE:
        notes.append(f"armopt validate: cosine {again['cosine']:.6f}")
    return _layers(written.plan) | {
        "model": name,
        "input": ", ".join("x".join(map(str, spec.shape)) for spec in written.model.inputs),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": written.weights.bytes / written.weights.fp32_bytes,
        "cosine": min(entry.similarity for entry in compared),
        "autocast": min(entry.similarity for entry in baseline),
        "max_rel": max(entry.max_rel for entry in compared),
        "notes": notes,
        "torch": torch.__version__,
    }


def _check_alike(expected: Any, found: Any) -> None:
    """Raises TypeError where the bundle's result is built otherwise than the model's."""
    import torch

    if isinstance(expected, torch.Tensor) != isinstance(found, torch.Tensor):
        raise TypeError(f"the bundle returns a {type(found).__name__}, the model a {type(expected).__name__}")
    if not isinstance(expected, torch.Tensor) and [*expected] != [*found]:
        raise TypeError(f"the bundle returns {[*found]}, the model {[*expected]}")


def _compared(expected: Any, found: Any) -> list[Any]:
    from armopt import accuracy

    outputs = [f"output {i}" for i, _ in enumerate(_leaves(expected))]
    return accuracy.compare_all(outputs, _leaves(expected), _leaves(found))


def _layers(plans: Sequence[PartPlan]) -> dict[str, int]:
    """How many layers of the one plan run in which way."""
    from armopt.kernels import table

    (plan,) = plans
    counts = {"BF16": 0, "FP32": 0, "BLAS": 0, "ATen": 0}
    for node in plan.nodes:
        kernel = table.get(node.kernel)
        kind = {"blas": "BLAS", "aten": "ATen"}.get(kernel.backend)
        counts[kind or ("BF16" if kernel.precision == "bf16" else "FP32")] += 1
    return counts


def _leaves(tree: Any) -> list[Any]:
    """The tensors of a result, by position; a model output is a mapping."""
    import torch

    if isinstance(tree, torch.Tensor):
        return [tree]
    values = tree.values() if hasattr(tree, "values") else tree if isinstance(tree, (list, tuple)) else ()
    return [leaf for value in values for leaf in _leaves(value)]


def measure_apart(name: str, limit: float) -> dict[str, Any]:
    """The same in a process of its own; a failure becomes a row."""
    command = [sys.executable, __file__, "--worker", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            result = json.loads(lines[-1])
        else:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            result = {"model": name, "error": last, "trace": done.stderr[-8000:]}
    except subprocess.TimeoutExpired:
        result = {"model": name, "error": f"not done within {limit:.0f} s"}
    return result | {"seconds": round(time.monotonic() - start, 1)}


def row(result: dict[str, Any]) -> list[str]:
    """One model as cells."""
    if "error" in result:
        return [result["model"], *["-"] * (len(COLUMNS) - 2), f"FAILS: {_cell(result['error'])}"]
    return [
        result["model"],
        result["input"],
        f"{result['parameters'] / 1e6:.2f}",
        *(str(result[kind]) for kind in ("BF16", "FP32", "BLAS", "ATen")),
        f"{result['weights']:.3f}",
        f"{result['cosine']:.6f}",
        f"{result['autocast']:.6f}",
        f"{result['max_rel']:.1e}",
        _cell("; ".join(result["notes"])),
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def passed(result: dict[str, Any]) -> bool:
    """Whether a model went through with results that are good enough to serve."""
    return "error" not in result and result["cosine"] >= MIN_COSINE and "NOT FINITE" not in result["notes"]


def table(results: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row(result) for result in results)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page(torchvision: list[dict[str, Any]], hugging_face: list[dict[str, Any]]) -> str:
    """docs/coverage.md."""
    import armopt

    every = torchvision + hugging_face
    good = [result for result in every if passed(result)]
    versions = ", ".join(sorted({result["torch"] for result in every if "torch" in result}))
    worst = min(good, key=lambda result: result["cosine"])
    summary = (
        f"{len(good)} of {len(every)} pass the gate of cosine >= {MIN_COSINE}; "
        f"the lowest cosine is {worst['cosine']:.6f} ({worst['model']})."
    )
    return f"""# Coverage

Made by `python benchmarks/coverage.py --write` with armopt {armopt.__version__} and torch {versions}; do not edit.

Every torchvision classification and segmentation model, and the Hugging Face models of the tests (small random
configurations): optimized for {TARGET}, written, loaded and compared with the original module in FP32, each on its
smallest sensible input at batch 1. This was run on a host that is not the target, so the portable twins gave the
target's rounding. Weights are random, as torchvision initialises them; models without batch norm get
`benchmarks.random_weights.randomize` on top, else heads of zero and layer scales of 1e-6 would hide errors.

{summary}

- BF16, FP32, BLAS, ATen: how many layers (Linear and convolution) are packed once with products in BF16; packed in
  FP32; given to BLAS, in FP32 on weights stored in BF16 (fewer than 64 rows); left to plain ATen.
- weights: bytes of the bundle's weights over those of the FP32 model.
- cosine: similarity to FP32 of the worst output; autocast: the same for PyTorch's own BF16 autocast.
- max rel error: largest error over the largest value of an output.
- notes: why layers run as plain ATen.

## torchvision

{table(torchvision)}

## Hugging Face

{table(hugging_face)}
"""


def run(wanted: list[str], limit: float, resume: bool) -> None:
    """Measures each model and keeps its result."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(wanted, start=1):
        if resume and _stored(name).is_file() and passed(json.loads(_stored(name).read_text())):
            continue
        print(f"[{i}/{len(wanted)}] {name}: ", end="", flush=True, file=sys.stderr)
        result = measure_apart(name, limit)
        _stored(name).write_text(json.dumps(result, indent=1))
        said = result.get("error") or f"cosine {result['cosine']:.6f}, weights {result['weights']:.3f}"
        print(f"{said} ({result['seconds']} s)", file=sys.stderr)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone")
    parser.add_argument("--write", action="store_true", help="write docs/coverage.md")
    parser.add_argument("--resume", action="store_true", help="skip models that went through before")
    parser.add_argument("--limit", type=float, default=1200, metavar="SECONDS", help="for each model (1200)")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker)))
        return 0
    vision, hugging_face = names()
    every = [*vision, *hugging_face]
    wanted = options.only or every
    if problem := _problem(wanted, every, options.write):
        parser.error(problem)
    run(wanted, options.limit, options.resume)
    results = {name: json.loads(_stored(name).read_text()) for name in (every if options.write else wanted)}
    if options.write:
        PAGE.write_text(page([results[name] for name in vision], [results[name] for name in hugging_face]))
        print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)
    else:
        print(table(list(results.values())))
    failed = [name for name, result in results.items() if not passed(result)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _problem(wanted: Sequence[str], every: Sequence[str], write: bool) -> str:
    """Why these models can't be measured, or written; empty where they can."""
    if unknown := set(wanted) - set(every):
        return f"unknown: {', '.join(sorted(unknown))}"
    missing = [name for name in every if name not in wanted and not _stored(name).is_file()]
    return f"--write needs all models; never measured here: {', '.join(missing)}" if write and missing else ""


def _stored(name: str) -> Path:
    return RESULTS / f"{name}.json"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the small models live with the tests
    sys.exit(main())
