"""What a bundle says of itself: manifest, signature, and files for people and shells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from armopt import environment, targets
from armopt._version import TORCH_REQUIREMENT, __version__
from armopt.bundle import files, manifest, writer
from armopt.bundle.program import Program
from armopt.capture import inputs
from armopt.ir.records import Captured, Skip
from armopt.passes import _pipeline as pipeline

if TYPE_CHECKING:
    pass
from armopt.compiler.stages import Planned


def describe_graph(
    planned: Planned,
    programs: Sequence[Program],
    accuracy: Mapping[str, Any],
    variables: Mapping[str, environment.Variable],
    onnxruntime: Mapping[str, Any],
) -> manifest.Manifest:
    captured = planned.captured
    model = {"source": captured.source, "digest": captured.digest, **inputs_of(captured)}
    sizes = {
        "bytes": size(writer.collect_weights(programs).values()),
        "fp32_bytes": size(captured.graph_module.buffers()),
    }
    return describe({"": planned}, model, sizes, accuracy, variables, onnxruntime)


def inputs_of(captured: Captured) -> dict[str, Any]:
    """The inputs and symbols of a graph as the manifest has them."""
    return {
        "inputs": [asdict(spec) | {"shape": list(spec.shape)} for spec in captured.input_specs],
        "symbols": [asdict(symbol) for symbol in captured.symbols],
    }


def describe(
    planned: Mapping[str, Planned],
    model: Mapping[str, Any],
    weights: Mapping[str, int],
    accuracy: Mapping[str, Any],
    variables: Mapping[str, environment.Variable],
    onnxruntime: Mapping[str, Any],
    left: Sequence[Skip] = (),
) -> manifest.Manifest:
    """A manifest without files.

    Args:
        planned: By path of the part; the whole model's is empty.
        model: What it says of the model.
        weights: Bytes in the bundle and in FP32.
        accuracy: The report.
        variables: Wanted of the environment.
        onnxruntime: The manifest's section of that name.
        left: What is left to Python.
    """
    target = next(iter(planned.values())).target
    plans = [(path, each) for path, whole in planned.items() for each in whole.plans]
    half = any(entry.precision.startswith("bf16") for _, each in plans for entry in each.decisions)
    return manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION if model.get("kind") == "module" else 1,
        armopt_version=__version__,
        target=target.name,
        machine=targets.machine(target),
        required_features=("bf16",) if half and target.bf16 else (),
        environment={name: asdict(variable) for name, variable in variables.items()},
        versions=environment.record(),
        files={},
        model=model,
        plan=tuple(
            {
                **({"part": path} if path else {}),
                "bucket": dict(each.bucket),
                "policy": each.policy,
                "nodes": [asdict(entry) | {"shape": list(entry.shape)} for entry in each.decisions],
            }
            for path, each in plans
        ),
        accuracy={name: accuracy[name] for name in _RECORDED},
        onnxruntime=onnxruntime,
        weights=weights,
        refused=tuple(
            asdict(replace(skip, node=f"{path}: {skip.node}") if path else skip)
            for path, whole in planned.items()
            for skip in whole.refused
        )
        + tuple(asdict(skip) for skip in left),
    )


#: What the manifest says of accuracy; report.json has the rest.
_RECORDED = (
    *("cosine", "max_abs", "finite", "min_cosine", "passed", "reference"),
    *("gates", "inputs", "inputs_given", "task", "repair"),
)


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def signature(captured: Captured) -> dict[str, Any]:
    """What a bundle holds of a graph beside its programs."""
    return {
        "inputs": captured.inputs,
        "outputs": captured.outputs,
        "specs": [
            asdict(spec) | {"statistics": inputs.statistics(tensor)}
            for spec, tensor in zip(captured.input_specs, captured.example, strict=True)
        ],
        "symbols": [asdict(symbol) for symbol in captured.symbols],
    }


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
    return f"armopt=={__version__}\n{TORCH_REQUIREMENT}\nsafetensors\nnumpy\n"
