"""What a bundle says of itself: manifest, signature, and files for people and shells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from armopt import environment, targets
from armopt._version import TORCH_REQUIREMENT, __version__
from armopt.bundle import files, manifest, writer
from armopt.capture import inputs
from armopt.compiler.checks import Judged
from armopt.compiler.source import Source
from armopt.ir.records import Captured, Target
from armopt.passes._pipeline import Record


@dataclass(frozen=True, slots=True)
class Optimized:
    """A model before it is written.

    Attributes:
        source: What was captured.
        target: What it is for.
        judged: By path of the part, what is written of it.
        accuracy: The report.
    """

    source: Source
    target: Target
    judged: Mapping[str, Judged]
    accuracy: Mapping[str, Any]

    def parts(self) -> list[writer.Part]:
        """What the bundle holds of each part."""
        return [
            writer.Part(path, part.programs, signature(part.planned.captured)) for path, part in self.judged.items()
        ]

    def manifest(
        self, variables: Mapping[str, environment.Variable], onnxruntime: Mapping[str, Any]
    ) -> manifest.Manifest:
        """The manifest, without files.

        Args:
            variables: Wanted of the environment.
            onnxruntime: The section of that name.
        """
        plans = [(path, plan) for path, part in self.judged.items() for plan in part.planned.plans]
        half = any(entry.precision.startswith("bf16") for _, each in plans for entry in each.decisions)
        return manifest.Manifest(
            schema_version=1 if self.source.shell is None else manifest.SCHEMA_VERSION,
            armopt_version=__version__,
            target=self.target.name,
            machine=targets.machine(self.target),
            required_features=("bf16",) if half and self.target.bf16 else (),
            environment={name: asdict(variable) for name, variable in variables.items()},
            versions=environment.record(),
            files={},
            model=self._model(),
            plan=tuple(
                {
                    **({"part": path} if path else {}),
                    "bucket": dict(each.bucket),
                    "policy": each.policy,
                    "nodes": [asdict(entry) | {"shape": list(entry.shape)} for entry in each.decisions],
                }
                for path, each in plans
            ),
            accuracy={name: self.accuracy[name] for name in _RECORDED},
            onnxruntime=onnxruntime,
            weights={"bytes": self._bytes(), "fp32_bytes": size(self.source.tensors)},
            refused=tuple(
                asdict(replace(skip, node=f"{path}: {skip.node}") if path else skip)
                for path, part in self.judged.items()
                for skip in part.planned.refused
            )
            + tuple(asdict(skip) for skip in self.source.left),
        )

    def texts(self, variables: Mapping[str, environment.Variable]) -> dict[str, str]:
        """The files of the bundle that are for people and shells."""
        passed = [_record(record) for part in self.judged.values() for record in part.planned.records]
        return {
            files.REPORT: writer.to_json({**self.accuracy, "passes": passed}),
            files.ENV: environment.render(variables, "shell"),
            files.REQUIREMENTS: _requirements(),
        }

    def _model(self) -> dict[str, Any]:
        """What the manifest says of the model."""
        described = {"source": self.source.name, "digest": self.source.digest}
        if self.source.shell is None:
            return described | inputs_of(self.source.parts[0].captured)
        return described | {
            "kind": "module",
            "factory": self.source.shell.factory,
            "inputs": [],
            "symbols": [],
            "parts": [{"path": part.path, **inputs_of(part.captured)} for part in self.source.parts],
        }

    def _bytes(self) -> int:
        """Of the weights in the bundle."""
        if self.source.shell is None:
            return size(writer.collect_weights(self.judged[""].programs).values())
        return size(writer.collect_part_weights(self.parts(), self.source.shell.state).values())


def inputs_of(captured: Captured) -> dict[str, Any]:
    """The inputs and symbols of a graph as the manifest has them."""
    return {
        "inputs": [asdict(spec) | {"shape": list(spec.shape)} for spec in captured.input_specs],
        "symbols": [asdict(symbol) for symbol in captured.symbols],
    }


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


def _record(record: Record) -> dict[str, Any]:
    skipped = [asdict(skip) for skip in record.skipped]
    return {"name": record.name, "rewritten": list(record.rewritten), "skipped": skipped}


def _requirements() -> str:
    """Versions to install on the server: this armopt, and a torch that armopt knows."""
    return f"armopt=={__version__}\n{TORCH_REQUIREMENT}\nsafetensors\nnumpy\n"
