"""What a bundle says of itself: manifest, signature, and files for people and shells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from armopt import environment, targets
from armopt._version import __version__
from armopt.bundle import files, manifest, schema, writer
from armopt.bundle.program import Part, Program
from armopt.capture import inputs
from armopt.compiler.stages import Planned
from armopt.ir.records import Captured, ExampleSpec, Signature, Skip
from armopt.passes import _pipeline as pipeline


def describe_graph(
    planned: Planned,
    programs: Sequence[Program],
    accuracy: Mapping[str, Any],
    variables: Mapping[str, environment.Variable],
    onnxruntime: manifest.Session,
) -> manifest.Manifest:
    """The manifest of a model that is one graph, without files."""
    captured = planned.captured
    model = manifest.Model(captured.source, captured.digest, (inputs_of("", captured),))
    weights = manifest.Weights(
        size(writer.collect_weights([part(planned, programs)]).values()), size(captured.graph_module.buffers())
    )
    return describe({"": planned}, model, weights, accuracy, variables, onnxruntime)


def part(planned: Planned, programs: Sequence[Program], path: str = "") -> Part:
    """What a bundle holds of one graph."""
    return Part(path, programs, signature(planned.captured))


def inputs_of(path: str, captured: Captured) -> manifest.PartInputs:
    """The inputs and symbols of a graph as the manifest has them."""
    return manifest.PartInputs(path, captured.input_specs, captured.symbols)


def describe(
    planned: Mapping[str, Planned],
    model: manifest.Model,
    weights: manifest.Weights,
    accuracy: Mapping[str, Any],
    variables: Mapping[str, environment.Variable],
    onnxruntime: manifest.Session | None,
    left: Sequence[Skip] = (),
) -> manifest.Manifest:
    """A manifest without files.

    Args:
        planned: By path of the part; the whole model's is empty.
        model: What it says of the model.
        weights: Bytes in the bundle and in FP32.
        accuracy: The report.
        variables: Wanted of the environment.
        onnxruntime: What a session of ONNX Runtime needs to be told.
        left: What is left to Python.
    """
    target = next(iter(planned.values())).target
    plans = [(path, each) for path, whole in planned.items() for each in whole.plans]
    half = any(entry.precision.startswith("bf16") for _, each in plans for entry in each.decisions)
    refused = [
        replace(skip, node=f"{path}: {skip.node}") if path else skip
        for path, whole in planned.items()
        for skip in whole.refused
    ]
    return manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        armopt_version=__version__,
        target=target.name,
        machine=targets.machine(target),
        required_features=("bf16",) if half and target.bf16 else (),
        environment=variables,
        versions=environment.record(),
        files={},
        model=model,
        plan=tuple(manifest.PartPlan(path, each.bucket, each.policy, each.decisions) for path, each in plans),
        accuracy=schema.convert(accuracy, manifest.Accuracy, "accuracy"),
        onnxruntime=onnxruntime,
        weights=weights,
        refused=(*refused, *left),
    )


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def signature(captured: Captured) -> Signature:
    """What a bundle holds of a graph beside its programs."""
    specs = tuple(
        ExampleSpec(spec.name, spec.shape, spec.dtype, inputs.statistics(tensor))
        for spec, tensor in zip(captured.input_specs, captured.example, strict=True)
    )
    return Signature(captured.inputs, captured.outputs, specs, captured.symbols)


def texts(
    accuracy: Mapping[str, Any], planned: Iterable[Planned], variables: Mapping[str, environment.Variable]
) -> dict[str, str]:
    """The files of a bundle that are for people and shells."""
    passed = [_record(record) for each in planned for record in each.records]
    return {
        files.REPORT: writer.to_json({**accuracy, "passes": passed}),
        files.ENV: environment.render(variables, "shell"),
        files.REQUIREMENTS: _requirements(),
    }


def _record(record: pipeline.Record) -> dict[str, Any]:
    skipped = [asdict(skip) for skip in record.skipped]
    return {"name": record.name, "rewritten": list(record.rewritten), "skipped": skipped}


def _requirements() -> str:
    """Versions to install on the server: this armopt, and a torch that armopt knows."""
    return f"armopt=={__version__}\ntorch>=2.10,<2.14\nsafetensors\nnumpy\n"
