"""What a bundle says of itself: manifest, signature, and files for people and shells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from armopt import environment, targets
from armopt._version import TORCH_REQUIREMENT, __version__
from armopt.bundle import files, schema, writer
from armopt.bundle import manifest as manifests
from armopt.bundle.program import Part
from armopt.capture import inputs
from armopt.compiler.captured_model import CapturedModel
from armopt.compiler.checks import Judged
from armopt.ir.pieces import BATCH
from armopt.ir.records import Captured, ExampleSpec, Signature, Target
from armopt.passes.pipeline import Record
from armopt.plan import remainder


@dataclass(frozen=True, slots=True)
class Optimized:
    """A model before it is written.

    Attributes:
        model: What was captured.
        target: What it is for.
        judged: By path of the part, what is written of it.
        accuracy: The report.
    """

    model: CapturedModel
    target: Target
    judged: Mapping[str, Judged]
    accuracy: Mapping[str, Any]

    @property
    def rest(self) -> Mapping[str, torch.Tensor]:
        """Parameters and buffers of all that is in no part, by name."""
        return self.model.shell.state if self.model.shell is not None else {}

    def parts(self) -> list[Part]:
        """What the bundle holds of each part."""
        return [describe_part(part) for part in self.judged.values()]

    def manifest(
        self, variables: Mapping[str, environment.Variable], onnxruntime: manifests.Session | None
    ) -> manifests.Manifest:
        """The manifest, without files.

        Args:
            variables: Wanted of the environment.
            onnxruntime: What a session of ONNX Runtime needs to be told; None where there is no one graph.
        """
        plans = [(path, plan) for path, part in self.judged.items() for plan in part.planned.plans]
        half = any(entry.precision.startswith("bf16") for _, each in plans for entry in each.decisions)
        refused = [
            replace(skip, node=f"{path}: {skip.node}") if path else skip
            for path, part in self.judged.items()
            for skip in part.planned.refused
        ]
        return manifests.Manifest(
            schema_version=manifests.SCHEMA_VERSION,
            armopt_version=__version__,
            target=self.target.name,
            machine=targets.machine(self.target),
            required_features=("bf16",) if half and self.target.bf16 else (),
            environment=variables,
            versions=environment.record(),
            files={},
            model=self._model(),
            plan=tuple(manifests.PartPlan(path, each.bucket, each.policy, each.decisions) for path, each in plans),
            accuracy=schema.convert(self.accuracy, manifests.Accuracy, "accuracy"),
            onnxruntime=onnxruntime,
            weights=manifests.Weights(
                _bytes(writer.collect_weights(self.parts(), self.rest).tensors.values()), _bytes(self.model.tensors)
            ),
            refused=(*refused, *self.model.left),
            not_in_bf16=tuple(remainder.find(each, path) for path, each in plans),
        )

    def texts(self, variables: Mapping[str, environment.Variable]) -> dict[str, str]:
        """The files of the bundle that are for people and shells."""
        passed = [_record(record) for part in self.judged.values() for record in part.planned.records]
        return {
            files.REPORT: writer.to_json({**self.accuracy, "passes": passed}),
            files.ENV: environment.render(variables, "shell"),
            files.REQUIREMENTS: _requirements(),
        }

    def _model(self) -> manifests.SourceModel:
        """What the manifest says of the model."""
        parts = tuple(
            manifests.PartInputs(part.path, part.captured.input_specs, part.captured.symbols)
            for part in self.model.parts
        )
        factory = self.model.shell.factory if self.model.shell is not None else ""
        return manifests.SourceModel(self.model.name, self.model.digest, parts, factory)


def describe_part(judged: Judged) -> Part:
    """What a bundle holds of one part: its programs, and what they take and return."""
    rows = judged.programs[0].bucket[BATCH] if judged.judge.batch_invariant else 0
    return Part(judged.planned.part.path, judged.programs, _signature(judged.planned.captured, rows))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _signature(captured: Captured, rows: int) -> Signature:
    """What a bundle holds of a graph beside its programs, which run so many rows at a time, or all where 0."""
    specs = tuple(
        ExampleSpec(spec.name, spec.shape, spec.dtype, inputs.statistics(tensor))
        for spec, tensor in zip(captured.input_specs, captured.example, strict=True)
    )
    return Signature(captured.inputs, captured.outputs, specs, captured.symbols, rows)


def _record(record: Record) -> dict[str, Any]:
    skipped = [asdict(skip) for skip in record.skipped]
    return {"name": record.name, "rewritten": list(record.rewritten), "skipped": skipped}


def _requirements() -> str:
    """Versions to install on the server: this armopt, and a torch that armopt knows."""
    return f"armopt=={__version__}\n{TORCH_REQUIREMENT}\nsafetensors\nnumpy\n"
