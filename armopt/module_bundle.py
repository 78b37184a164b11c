"""Makes bundles of kind "module": parts of a model as graphs, for models that can't be captured whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from armopt import accuracy as metrics
from armopt import compiler, environment, parts
from armopt import graph as g
from armopt.bundle import manifest, writer
from armopt.errors import InputError
from armopt.ir import Target
from armopt.plan import Policy
from armopt.sources import Whole


def optimize(
    model: Whole,
    output: Path,
    target: Target,
    policy: Policy | str | None,
    *,
    min_cosine: float,
    force: bool,
    progress: Callable[[str, int, int], None],
) -> manifest.Manifest:
    """Finds the parts of a model, optimizes each and writes the bundle; see :func:`armopt.compiler.optimize`.

    Raises:
        InputError: Nothing in the model can be captured, or the place is unusable.
        AccuracyError: The gate failed for a part; the bundle is written and marked as not deployable.
    """
    writer.check_place(output, force=force)
    source = model.factory or type(model.module).__name__
    if not model.calls:
        raise InputError(
            "the model needs example calls", where=source, hint="Pass example_inputs=[(images,), (others,)]"
        )
    chosen = compiler.find_policy(policy, target)
    steps = ("capture", "plan", "rewrite", "validate", "write")

    def step(name: str) -> None:
        progress(name, steps.index(name), len(steps))

    step("capture")
    found, left = parts.find(model.module, model.calls, source)
    step("plan")
    planned = {part.path: compiler.make_plan(part.captured, target, chosen, part.buckets) for part in found}
    step("rewrite")
    programs = {path: compiler.lower(each) for path, each in planned.items()}
    step("validate")
    compared = {
        f"{path} {bucket}": entries
        for path, each in planned.items()
        for bucket, entries in compiler.compare(each.captured, programs[path]).items()
    }
    said = "each part of the model in FP32, on what it gets from the example calls"
    accuracy = metrics.summary(compared, min_cosine=min_cosine, reference=said)
    step("write")
    rest = _rest(model.module, list(planned))
    held = [writer.Part(path, programs[path], compiler.signature(each.captured)) for path, each in planned.items()]
    described = compiler.describe(
        planned,
        {
            "kind": "module",
            "source": source,
            "factory": model.factory,
            "digest": _digest(planned, rest),
            "inputs": [],
            "symbols": [],
            "parts": [{"path": path, **compiler.inputs_of(each.captured)} for path, each in planned.items()],
        },
        {
            "bytes": compiler.size(writer.collect_part_weights(held, rest).values()),
            "fp32_bytes": compiler.size((*model.module.parameters(), *model.module.buffers())),
        },
        accuracy,
        variables := environment.variables(target),
        left,
    )
    texts = compiler.texts(accuracy, planned.values(), variables)
    written = writer.write_parts(output, described, held, rest, texts, force=force)
    progress("done", len(steps), len(steps))
    compiler.gate(accuracy, output)
    return written


def _rest(module: torch.nn.Module, paths: Sequence[str]) -> dict[str, torch.Tensor]:
    """The state of all that is no part."""
    inside = tuple(f"{path}." for path in paths)
    return {
        name: tensor.detach()
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, torch.Tensor) and not name.startswith(inside)
    }


def _digest(planned: Mapping[str, compiler.Planned], rest: Mapping[str, torch.Tensor]) -> str:
    """sha256 over the parts' digests and the rest's content."""
    state = hashlib.sha256()
    for path, each in planned.items():
        state.update(f"{path}:{each.captured.digest}".encode())
    for name, tensor in sorted(rest.items()):
        state.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        state.update(g.raw(tensor))
    return state.hexdigest()
