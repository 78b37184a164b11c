"""`optimize`: capture -> prepare -> plan -> lower -> validate -> write."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from armopt import environment
from armopt.accuracy import Validation, nodes, runs, tasks
from armopt.accuracy.report import page
from armopt.bundle import manifest, writer
from armopt.bundle.program import describe_program
from armopt.compiler import describe, invariance
from armopt.compiler.captured_model import CapturedModel, Inputs, Kind, Model, capture_model
from armopt.compiler.checks import Checks, Judge, Judged, merge_repairs, merge_validations
from armopt.compiler.output import Output
from armopt.compiler.recipe import Prepared as PreparedGraph
from armopt.compiler.recipe import Recipe
from armopt.errors import AccuracyError, ArmoptWarning, CaptureError, InputError
from armopt.ir import graph as g
from armopt.ir.pieces import BATCH
from armopt.ir.records import Target
from armopt.onnx_export import session
from armopt.plan.planner import Policy
from armopt.progress import Steps

if TYPE_CHECKING:
    from armopt.onnx_export.export import Prepared

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """A bundle that was written.

    Attributes:
        path: Where it is.
        manifest: As in the bundle.
        verdict: What was measured, and which gates hold.
    """

    path: Path
    manifest: manifest.Manifest
    verdict: Validation

    @property
    def passed(self) -> bool:
        """Whether it may be deployed: every accuracy gate holds."""
        return self.verdict.passed

    def require(self) -> Result:
        """This result, if the bundle may be deployed.

        Raises:
            AccuracyError: A gate failed: the bundle is there, and marked as not deployable.
        """
        if not self.passed:
            repaired = self.manifest.accuracy.repair
            no_repair = f". There is {repaired.said}" if repaired is not None else ""
            raise AccuracyError(
                f"{self.verdict.failures()}{no_repair}",
                where=str(self.path),
                hint="The bundle is marked as not deployable; see its report.json",
            )
        return self


def optimize(
    model: Model,
    example_inputs: Inputs | None = None,
    *,
    output: str | Path | Output,
    target: str | Target = "graviton3",
    batch: Sequence[int] = (),
    kind: Kind = "graph",
    policy: Policy | str | None = None,
    checks: Checks = Checks(),
) -> Result:
    """Optimizes a model for a target and writes a bundle.

    Args:
        model: A module, an exported program, or the path of a model file; a :class:`TrustedFile` where reading it may
            run code of the file.
        example_inputs: Positional inputs as a sequence, or named ones as a mapping; a file may have its own. An
            :class:`Example` says which dimensions vary besides the batch. Of kind "module": a sequence of calls, each
            with such inputs; sizes that differ between them may vary.
        output: Where the bundle goes: a folder, or one file where it ends in .zip; or an :class:`Output`, which also
            says what else is written.
        target: A product's name (see ``armopt targets``), or ``host``.
        batch: Sizes of the first dimension to plan for; several make it dynamic.
        kind: "graph" for the whole model in one graph. "module" for a module that can't be captured whole: its parts
            become graphs, and the Python between them stays in the model's own code (see docs/compile.md).
        policy: How kernels are chosen, also as ``--policy`` has it; by cost where there is a table for the core.
        checks: The gates, what to measure them on, and whether to repair what breaks them.

    Returns:
        What was written. Where a gate failed, the bundle is marked as not deployable, a warning says so, and
        ``result.require()`` raises.

    Raises:
        InputError: The model, an input or the place is unusable; or ONNX has no form of an operation.
        CaptureError: torch.export can't take the model whole.
    """
    place = output if isinstance(output, Output) else Output(Path(output))
    recipe = Recipe.of(target, policy)
    if not isinstance(checks, Checks):
        raise InputError(f"checks is a {type(checks).__name__}", hint="Pass armopt.Checks(min_cosine=0.99)")
    opened = partial(capture_model, model, example_inputs, kind=kind, batch=batch, any_batch=checks.batch_invariant)
    result = carry_out(opened, recipe, checks, place, divided=kind == "module")
    if not result.passed:
        said = f"{result.path} is marked as not deployable: {result.verdict.failures()}"
        warnings.warn(said, ArmoptWarning, stacklevel=2)
    return result


def carry_out(
    opened: Callable[[], CapturedModel], recipe: Recipe, checks: Checks, output: Output, *, divided: bool = False
) -> Result:
    """What :func:`optimize` does, whoever gives the model.

    Args:
        opened: Captures the model; called once the place of the bundle is known to be usable.
        recipe: How its graphs become programs.
        checks: See :class:`Checks`.
        output: See :class:`Output`.
        divided: Whether the model is known to come in parts: what they can't do is then refused before they are made.

    Raises:
        InputError: See :func:`optimize`.
        CaptureError: See :func:`optimize`.
    """
    output.check_places()
    if divided:
        _refuse_what_needs_one_graph(checks, output)
    bounds = checks.bounds()
    steps = Steps("capture", "prepare", "plan", "lower", "validate", *(("onnx",) if output.onnx else ()), "write")
    steps("capture")
    model = opened()
    if model.shell is not None:
        _refuse_what_needs_one_graph(checks, output)
        checks = replace(checks, task=tasks.NONE, examples="what each part gets from the example calls")
    sizes: list[int] = []
    if checks.batch_invariant:
        invariance.check_shapes(model.parts[0].captured)
        sizes = [bucket[BATCH] for bucket in model.parts[0].buckets]
        model = model.at_most_rows()
    steps("prepare")
    recipe = replace(recipe, keep_fp32=(*recipe.keep_fp32, *checks.keep_fp32))
    prepared = _prepared(model, recipe)
    steps("plan")
    planned = [recipe.plan_part(part, graph) for part, graph in zip(model.parts, prepared, strict=True)]
    steps("lower")
    programs = [recipe.lower_part(each) for each in planned]
    steps("validate")
    judged = {
        each.part.path: Judge(each.captured, bounds, checks).judge(recipe, each, lowered)
        for each, lowered in zip(planned, programs, strict=True)
    }
    if checks.batch_invariant:
        invariance.check_rows(judged[""], sizes)
    verdict = merge_validations(judged, bounds)
    accuracy = verdict.to_json() | {"repair": merge_repairs(judged)}
    exported = None
    if output.onnx:
        steps("onnx")
        exported = _translate(judged[""], output)
    steps("write")
    written = _write(describe.Optimized(model, recipe.target, judged, accuracy), output, exported)
    if output.report is not None:
        _report(judged[""], written, output, accuracy)
    steps.done()
    _log.info("wrote %s: %s", output.place, "passed" if verdict.passed else verdict.failures())
    return Result(output.place, written, verdict)


def _prepared(model: CapturedModel, recipe: Recipe) -> list[PreparedGraph]:
    """The graph of each part, prepared once for all its buckets.

    Raises:
        CaptureError: One draws random numbers.
        InputError: No layer is called as the recipe says.
    """
    prepared = {part.path: recipe.prepare(part.captured.graph_module) for part in model.parts}
    for part in model.parts:
        _refuse_random_numbers(prepared[part.path].graph_module, part.captured.source)
    recipe.check_names(prepared)
    return list(prepared.values())


def _refuse_random_numbers(graph_module: fx.GraphModule, source: str) -> None:
    """Refuses a graph that draws random numbers: a bundle gives the same for the same inputs.

    Raises:
        CaptureError: Naming the node, and the line that it comes from.
    """
    for name in runs.random_nodes(graph_module):
        node = next(node for node in graph_module.graph.nodes if node.name == name)
        line = g.source_line(node)
        raise CaptureError(
            f"{name}{f' ({line})' if line else ''} draws random numbers, and a bundle draws none",
            where=source,
            hint="For dropout pass training=self.training; else armopt.compile runs it, checked from one seed",
        )


def _refuse_what_needs_one_graph(checks: Checks, output: Output) -> None:
    """Refuses what parts can't do.

    Raises:
        InputError: Naming the option.
    """
    asked = {
        "checks.inputs (--check-inputs)": checks.inputs is not None,
        "checks.task (--task)": checks.task not in ("", tasks.NONE),
        "output.keep_reference (--keep-reference)": output.keep_reference,
        "output.report (--report)": output.report is not None,
        "output.onnx (--onnx)": output.onnx is not None,
        "checks.batch_invariant (--batch-invariant)": checks.batch_invariant,
    }
    for option, given in asked.items():
        if given:
            raise InputError('needs the model in one graph (not kind "module")', where=option, hint="Leave it out")


def _translate(judged: Judged, output: Output) -> Prepared:
    from armopt.onnx_export import export  # onnx and onnxscript take a second to import

    assert output.onnx is not None
    return export.prepare(describe.describe_part(judged), output.onnx)


def _write(optimized: describe.Optimized, output: Output, exported: Prepared | None) -> manifest.Manifest:
    """The bundle, and its manifest as written."""
    variables = environment.wanted(optimized.target)
    whole = optimized.judged.get("")
    onnxruntime, reference = None, None  # of parts there is no one graph for ONNX Runtime
    if whole is not None:
        onnxruntime = session.describe(whole.programs, output.onnx, inside=True)
    if whole is not None and output.keep_reference:
        (part,), prepared = optimized.model.parts, whole.planned.prepared.graph_module
        reference = describe_program(prepared, part.buckets[0], part.captured.values(part.buckets[0]))
    described = optimized.manifest(variables, onnxruntime)
    return writer.write(
        output.place,
        described,
        optimized.parts(),
        optimized.texts(variables),
        rest=optimized.rest,
        reference=reference,
        force=output.force,
        attach=partial(exported.attach, described) if exported else None,
    )


def _report(judged: Judged, written: manifest.Manifest, output: Output, accuracy: Mapping[str, Any]) -> None:
    """Writes the page that shows both sides."""
    assert output.report_place is not None
    judge, validation = judged.judge, judged.validation
    errors, evidence = judge.nodes(judged)
    outcome = {**accuracy, "nodes": nodes.entries(errors), "node_bucket": validation.worst_bucket}
    pictures = judge.samples.pictures[:1] if judge.samples is not None else ()
    about = page.About.of(written, str(output.place))
    page.save(output.report_place, outcome, about, validation, errors, evidence, pictures, accuracy["repair"])
