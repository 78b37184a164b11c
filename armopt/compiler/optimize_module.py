"""Makes bundles of kind "module": parts of a model as graphs, for models that can't be captured whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from armopt import environment
from armopt.accuracy import Validation, gates, tasks
from armopt.bundle import manifest, writer
from armopt.capture import submodules
from armopt.capture.files import Whole
from armopt.compiler import describe, stages
from armopt.compiler.checks import Checked, Checks
from armopt.compiler.optimize import check, gate
from armopt.compiler.repair import Repair
from armopt.errors import InputError
from armopt.ir import graph as g
from armopt.ir.records import Target
from armopt.onnx_export.options import Options
from armopt.plan import policies
from armopt.plan.planner import Policy


def optimize(
    model: Whole,
    output: Path,
    target: Target,
    policy: Policy | str | None,
    *,
    min_cosine: float,
    checks: Checks,
    force: bool,
    onnx: Options | None,
    progress: stages.Progress,
) -> manifest.Manifest:
    """Finds the parts of a model, optimizes each and writes the bundle; see :func:`armopt.compiler.optimize.optimize`.

    Raises:
        InputError: Nothing in the model can be captured, or the place is unusable.
        AccuracyError: The gate failed for a part; the bundle is written and marked as not deployable.
    """
    writer.check_place(output, force=force)
    _refuse_what_needs_one_graph(checks, onnx)
    bounds = gates.standard(checks.gates, min_cosine)
    source = model.factory or type(model.module).__name__
    if not model.calls:
        raise InputError(
            "the model needs example calls", where=source, hint="Pass example_inputs=[(images,), (others,)]"
        )
    chosen = policies.find_policy(policy, target)
    steps = ("capture", "plan", "rewrite", "validate", "write")

    def step(name: str) -> None:
        progress(name, steps.index(name), len(steps))

    step("capture")
    found, left = submodules.find(model.module, model.calls, source)
    step("plan")
    planned = {part.path: stages.make_plan(part.captured, target, chosen, part.buckets) for part in found}
    step("rewrite")
    rounded: dict[str, dict[str, torch.Tensor]] = {path: {} for path in planned}
    programs = {path: stages.lower(each, rounded[path]) for path, each in planned.items()}
    step("validate")
    checks = replace(checks, task=tasks.NONE, examples="what each part gets from the example calls")
    validations: dict[str, Validation] = {}
    repairs: dict[str, Repair] = {}
    for path, each in list(planned.items()):
        checked = Checked(each.captured, bounds, checks)
        planned[path], programs[path], validations[path], repaired = check(
            each, programs[path], rounded[path], checked, checks.repair, progress
        )
        if repaired is not None:
            repairs[path] = repaired
    accuracy = _merge(validations, bounds).to_json() | {"repair": _merge_repairs(repairs)}
    step("write")
    rest = _rest(model.module, list(planned))
    held = [describe.part(each, programs[path], path) for path, each in planned.items()]
    described = describe.describe(
        planned,
        manifest.Model(
            source,
            _digest(planned, rest),
            tuple(describe.inputs_of(path, each.captured) for path, each in planned.items()),
            model.factory,
        ),
        manifest.Weights(
            describe.size(writer.collect_weights(held, rest).values()),
            describe.size((*model.module.parameters(), *model.module.buffers())),
        ),
        accuracy,
        variables := environment.wanted(target),
        None,  # there is no one graph for ONNX Runtime
        left,
    )
    texts = describe.texts(accuracy, planned.values(), variables)
    written = writer.write(output, described, held, texts, rest=rest, force=force)
    progress("done", len(steps), len(steps))
    gate(accuracy, output)
    return written


def _refuse_what_needs_one_graph(checks: Checks, onnx: Options | None) -> None:
    """Refuses what parts can't do.

    Raises:
        InputError: Naming the option.
    """
    asked = {
        "--check-inputs": checks.inputs is not None,
        "--task": checks.task not in ("", tasks.NONE),
        "--keep-reference": checks.keep_reference,
        "--report": checks.report is not None,
        "--onnx": onnx is not None,
    }
    for option, given in asked.items():
        if given:
            raise InputError('needs the model in one graph (not kind "module")', where=option, hint="Leave it out")


def _merge(validations: Mapping[str, Validation], bounds: Sequence[gates.Gate]) -> Validation:
    """The parts' figures as one outcome, each bucket by path and sizes."""
    figures = {
        f"{path} {bucket}": each for path, whole in validations.items() for bucket, each in whole.figures.items()
    }
    first = next(iter(validations.values()))
    return replace(
        first,
        reference="each part of the model in FP32",
        figures=figures,
        verdicts=gates.judge(bounds, figures, ""),
        no_anchor=next((each.no_anchor for each in validations.values() if each.no_anchor), ""),
    )


def _merge_repairs(repairs: Mapping[str, Repair]) -> dict[str, Any] | None:
    """What repair did in all parts; where it failed, only that is said."""
    if not repairs:
        return None
    failed = {path: each for path, each in repairs.items() if not each.passed}
    return {
        "passed": not failed,
        "evaluations": sum(each.evaluations for each in repairs.values()),
        "said": "; ".join(f"{each.said} ({path})" for path, each in (failed or repairs).items()),
        "changes": [
            change | {"node": f"{path}: {change['node']}"}
            for path, each in repairs.items()
            for change in each.to_json()["changes"]
        ],
    }


def _rest(module: torch.nn.Module, paths: Sequence[str]) -> dict[str, torch.Tensor]:
    """The state of all that is no part."""
    inside = tuple(f"{path}." for path in paths)
    return {
        name: tensor.detach()
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, torch.Tensor) and not name.startswith(inside)
    }


def _digest(planned: Mapping[str, stages.Planned], rest: Mapping[str, torch.Tensor]) -> str:
    """sha256 over the parts' digests and the rest's content."""
    state = hashlib.sha256()
    for path, each in planned.items():
        state.update(f"{path}:{each.captured.digest}".encode())
    for name, tensor in sorted(rest.items()):
        state.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        state.update(g.raw(tensor))
    return state.hexdigest()
