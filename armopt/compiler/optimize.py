"""`optimize`: capture -> annotate shapes -> plan -> rewrite -> validate -> bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from armopt import capture, environment
from armopt.accuracy import MIN_COSINE, Validation, gates, nodes
from armopt.accuracy.report import page
from armopt.bundle import manifest, writer
from armopt.bundle.program import Part, Program, describe_program
from armopt.capture import files
from armopt.compiler.checks import Checked, Checks
from armopt.compiler.describe import describe_graph, part, texts
from armopt.compiler.repair import Repair
from armopt.compiler.stages import (
    Planned,
    Progress,
    find_buckets,
    find_target,
    lower,
    lower_at,
    make_plan,
    silent,
)
from armopt.errors import AccuracyError, InputError
from armopt.ir.records import Captured, Target
from armopt.onnx_export import session
from armopt.onnx_export.options import Options
from armopt.plan import planner
from armopt.plan.policies import find_policy

if TYPE_CHECKING:
    from armopt.onnx_export.export import Prepared


def optimize(
    model: torch.nn.Module | torch.export.ExportedProgram | Captured | files.Whole | str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    kind: Literal["graph", "module"] = "graph",
    output: str | Path,
    target: str | Target = "graviton3",
    batch: Sequence[int] = (),
    policy: planner.Policy | str | None = None,
    min_cosine: float = MIN_COSINE,
    checks: Checks = Checks(),
    force: bool = False,
    onnx: Options | None = None,
    progress: Progress = silent,
) -> manifest.Manifest:
    """Optimizes a model for a target and writes a bundle.

    Args:
        model: A module, an exported program, or the path of a model file.
        example_inputs: Positional inputs as a sequence, or named ones as a mapping; a file may have its own. Of kind
            "module": a sequence of calls, each a tuple of positional inputs; sizes that differ between them may vary.
        kind: "graph" for the whole model in one graph. "module" for a module that can't be captured whole: its parts
            become graphs, and the Python between them stays in the model's own code (see docs/compile.md).
        output: Where the bundle goes; a folder, or one file where it ends in .zip.
        target: A product's name (see ``armopt targets``), or ``host``.
        batch: Sizes of the first dimension to plan for; several make it dynamic.
        policy: How kernels are chosen, also as ``--policy`` has it; by cost where there is a table for the core.
        min_cosine: The least cosine similarity to FP32 of any output.
        checks: More gates, what to measure them on, and whether to repair what breaks them.
        force: Replace a bundle that is there.
        onnx: Put an ONNX model into the bundle as well, as ``model.onnx``.
        progress: Told of each step.

    Returns:
        The manifest, as in the bundle.

    Raises:
        InputError: The model, an input or the place is unusable; or ONNX has no form of an operation.
        CaptureError: torch.export can't take the model whole.
        AccuracyError: The gate failed; the bundle is written and marked as not deployable.
    """
    if kind == "module":
        if not isinstance(model, torch.nn.Module):
            raise InputError('kind "module" needs an nn.Module', where=type(model).__name__, hint="Pass the module")
        model = files.Whole(model, tuple((tuple(args), {}) for args in example_inputs or ()))
    if isinstance(model, files.Whole):
        from armopt.compiler import optimize_module  # which is made of the functions of this module

        return optimize_module.optimize(
            model,
            Path(output),
            find_target(target),
            policy,
            min_cosine=min_cosine,
            checks=checks,
            force=force,
            onnx=onnx,
            progress=progress,
        )
    output = Path(output)
    writer.check_place(output, force=force)
    if checks.report is not None:
        page.check_place(checks.report)
    bounds = gates.standard(checks.gates, min_cosine)
    chosen = find_target(target)
    policy = find_policy(policy, chosen)
    steps = ("capture", "plan", "rewrite", "validate", *(("onnx",) if onnx else ()), "write")

    def step(name: str) -> None:
        progress(name, steps.index(name), len(steps))

    step("capture")
    captured = _capture(model, example_inputs, batch)
    buckets = find_buckets(captured, batch)
    step("plan")
    planned = make_plan(captured, chosen, policy, buckets)
    step("rewrite")
    rounded: dict[str, torch.Tensor] = {}
    programs = lower(planned, rounded)
    step("validate")
    checked = Checked(captured, bounds, checks)
    planned, programs, validation, repaired = check(planned, programs, rounded, checked, checks.repair, progress)
    whole = part(planned, programs)
    prepared = None
    if onnx:
        step("onnx")
        prepared = _translate(whole, onnx)
    step("write")
    accuracy = validation.to_json() | {"repair": None if repaired is None else repaired.to_json()}
    variables = environment.wanted(chosen)
    described = describe_graph(planned, programs, accuracy, variables, session.describe(programs, onnx, inside=True))
    reference = None
    if checks.keep_reference:
        reference = describe_program(planned.prepared, buckets[0], captured.values(buckets[0]))
    written = writer.write(
        output,
        described,
        [whole],
        texts(accuracy, [planned], variables),
        reference=reference,
        force=force,
        attach=partial(prepared.attach, described) if prepared else None,
    )
    if checks.report is not None:
        errors, evidence = checked.nodes(planned.prepared, programs, validation)
        about = page.About.of(written, str(output))
        pictures = checked.samples.pictures[:1] if checked.samples is not None else ()
        outcome = accuracy | {"nodes": nodes.entries(errors), "node_bucket": validation.worst_bucket}
        page.save(checks.report, outcome, about, validation, errors, evidence, pictures, accuracy["repair"])
    progress("done", len(steps), len(steps))
    gate(accuracy, output)
    return written


def check(
    planned: Planned,
    programs: tuple[Program, ...],
    rounded: dict[str, torch.Tensor],
    checked: Checked,
    may_repair: bool,
    progress: Progress,
) -> tuple[Planned, tuple[Program, ...], Validation, Repair | None]:
    """Measures programs and, where a gate breaks and it helps, takes layers out of BF16.

    Args:
        planned: The plans.
        programs: Those carried out.
        rounded: Weights in BF16 by name, as `programs` share them.
        checked: Measures.
        may_repair: Whether plans may change.
        progress: Told of each measurement of repair.

    Returns:
        Plans and programs as they are to be written, their figures, and what repair did; None where nothing broke.
    """
    validation = checked.validate(programs)
    if validation.passed or not may_repair:
        return planned, programs, validation, None
    repaired = checked.repair(
        planned.prepared,
        planned.plans,
        programs,
        lambda each: lower_at(planned.prepared, each, planned.captured.values(each.bucket), rounded),
        lambda done, most: progress("repair", done, most),
    )
    if not repaired.passed:
        return planned, programs, validation, repaired
    better = replace(planned, plans=repaired.plans)
    programs = lower(better, rounded)
    return better, programs, checked.validate(programs), repaired


def _translate(whole: Part, onnx: Options) -> Prepared:
    from armopt.onnx_export import export  # onnx and onnxscript take a second to import

    return export.prepare(whole, onnx)


def _capture(
    model: torch.nn.Module | torch.export.ExportedProgram | Captured | str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    batch: Sequence[int],
) -> Captured:
    if isinstance(model, Captured):
        return model
    if isinstance(model, (str, Path)):
        samples = dict(example_inputs) if isinstance(example_inputs, Mapping) else None
        return files.open_model(Path(model), files.Options(samples=samples, batch=tuple(batch)))
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    args = None if example_inputs is None else () if kwargs else tuple(example_inputs)
    if isinstance(model, torch.export.ExportedProgram):
        return capture.exported(model, args, kwargs, source="exported program")
    if args is None:
        raise InputError("the model needs example inputs", where=type(model).__name__, hint="Pass example_inputs=(x,)")
    return capture.module(model, args, kwargs, batch=batch, source=type(model).__name__)


def gate(accuracy: Mapping[str, Any], output: Path) -> None:
    """Refuses a bundle that is written but not accurate enough.

    Raises:
        AccuracyError: It is not.
    """
    if not accuracy["passed"]:
        no_repair = f". There is {accuracy['repair']['said']}" if accuracy["repair"] is not None else ""
        raise AccuracyError(
            f"{accuracy['failed']}{no_repair}",
            where=str(output),
            hint="The bundle is marked as not deployable; see its report.json",
        )
