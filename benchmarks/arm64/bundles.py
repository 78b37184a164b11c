"""Bundles and ONNX models of the workloads: made on this machine, run on the emulated one."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

from benchmarks.arm64.emulated_jobs import Job
from benchmarks.arm64.kept import CACHE


@functools.cache
def make_bundle(workload: str, cpu: str, torch_version: str, without: str = "", threads: int = 1) -> Path:
    """Optimizes a model on this machine, planned for a torch release; random weights, so no accuracy gate.

    `without` names a pass to leave out.
    """
    import armopt
    from armopt import targets
    from armopt.compiler.captured_model import capture_model
    from armopt.compiler.optimize import carry_out
    from armopt.compiler.recipe import Recipe
    from armopt.plan import cost_policy
    from benchmarks.arm64.workloads import WORKLOADS

    model, inputs = WORKLOADS[workload].build()
    place = CACHE / "bundles" / _file_name(f"{workload} {without} {cpu} {torch_version} {threads}")
    place.parent.mkdir(parents=True, exist_ok=True)
    whole = WORKLOADS[workload].whole
    target = targets.load(cpu)
    recipe = Recipe(target, cost_policy.default(target, torch_version, threads))
    recipe = recipe.without(without) if without else recipe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # images of other brightness too: how many proposals there are is not known beforehand
        example = inputs if whole else [inputs, *(([image * share for image in inputs[0]],) for share in (0.3, 0.6))]
        opened = functools.partial(capture_model, model, example, kind="graph" if whole else "module")
        carry_out(opened, recipe, armopt.Checks(min_cosine=-1.0), armopt.Output(place, force=True))
    return place


@functools.cache
def make_onnx(workload: str, cpu: str, torch_version: str, form: str) -> Path:
    """The bundle as an ONNX model, with weights in FP32; `form` is plain, or flag for ONNX Runtime's BF16 flag."""
    from armopt.onnx_export import export
    from armopt.onnx_export.options import OnnxOptions

    bundle = make_bundle(workload, cpu, torch_version)
    place = bundle.with_name(f"{bundle.name}-{form}.onnx")
    export.export(bundle, place, OnnxOptions(fast_math=form != "plain"), force=True)
    return place


def bundle_job(name: str, workload: str, bundle: Path, nodes: bool = False) -> Job:
    """One call of a bundle."""
    from benchmarks.arm64.workloads import WORKLOADS

    if WORKLOADS[workload].whole:
        return Job(name, "benchmarks.arm64.jobs:bundle", {"path": str(bundle)}, 1, 1, nodes)
    return Job(name, "benchmarks.arm64.jobs:module_bundle", {"path": str(bundle), "workload": workload}, 1)


def _file_name(workload: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in workload)
