"""The manifest: what a bundle says of itself, as sorted JSON that is checked to the byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from armopt.bundle import legacy, schema
from armopt.environment.variables import Variable
from armopt.errors import BundleError, printable
from armopt.ir.records import Bucket, Count, Decision, InputSpec, Line, Remainder, Skip, Symbol

#: What is written; bundles of 1 and 2 are read too.
SCHEMA_VERSION = 3
NAME = "manifest.json"
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


@dataclass(frozen=True, slots=True)
class PartInputs:
    """What one graph takes: that of a submodule by its path, or of the whole model, which has none."""

    path: Line
    inputs: tuple[InputSpec, ...]
    symbols: tuple[Symbol, ...]


@dataclass(frozen=True, slots=True)
class SourceModel:
    """What the bundle was made from.

    Attributes:
        source: A file, a reference or a class, in words.
        digest: sha256 over graph and weights.
        parts: The whole model as one, or the submodules that are graphs, with the model's own Python between them.
        factory: Reference to what builds the model around its parts; empty where there is none to follow.
    """

    source: Line
    digest: Digest
    parts: Annotated[tuple[PartInputs, ...], Meta(min_length=1)]
    factory: Line = ""

    def __post_init__(self) -> None:
        paths = [part.path for part in self.parts]
        if len(set(paths)) < len(paths) or ("" in paths and len(paths) > 1):
            raise ValueError("two parts share a place in the model")

    @property
    def whole(self) -> PartInputs | None:
        """The part that is all of the model; None where Python runs between parts."""
        return self.parts[0] if not self.parts[0].path else None

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The whole model's; empty where Python runs between parts, which takes what it likes."""
        return self.whole.inputs if self.whole else ()


@dataclass(frozen=True, slots=True)
class PartPlan:
    """The plan of one part for one bucket."""

    part: Line
    bucket: Bucket
    policy: Line
    nodes: tuple[Decision, ...]


@dataclass(frozen=True, slots=True)
class GateResult:
    """A gate, its worst value (None if infinite or not measured), where that is, and whether it held."""

    gate: Line
    value: float | None
    where: Line
    passed: bool


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """A task's figures by bucket, and why it is that task; no name where there is none."""

    name: Line
    why: Line
    metrics: Mapping[Line, Mapping[Line, float]]


@dataclass(frozen=True, slots=True)
class Change:
    """One layer that was taken out of BF16."""

    node: Line
    before: Line
    after: Line
    precision: Line


@dataclass(frozen=True, slots=True)
class RepairResult:
    """What repair did: whether all gates hold now, after how many measurements, in words, and by which changes."""

    passed: bool
    evaluations: Count
    said: Line
    changes: tuple[Change, ...]


class Accuracy(Struct, frozen=True, omit_defaults=True):
    """How far the bundle is from FP32; report.json has the rest.

    Attributes:
        cosine: Least cosine similarity of any output of numbers; where there is none, the least share of equal values.
        max_abs: Largest error.
        finite: Whether infinities and NaNs stand where they do in FP32.
        min_cosine: What the cosine had to reach.
        passed: Whether all gates held: the bundle may be deployed.
        reference: What it was compared with, in words.
        gates: Each with its worst value.
        inputs: On what, in words.
        inputs_given: Whether those are the user's.
        task: What the model is for, and how well it does it.
        repair: None where nothing had to be repaired.
        difference: In what the capture is not the model, and why; empty where it is.
        remarks: What the gates do not see.
    """

    cosine: float
    max_abs: float
    finite: bool
    min_cosine: float | None
    passed: bool
    reference: Line
    gates: Annotated[tuple[GateResult, ...], Meta(min_length=1)]
    inputs: Line
    inputs_given: bool
    task: TaskFigures
    repair: RepairResult | None
    difference: str = ""
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of weights: in the bundle, and of the model in FP32."""

    bytes: Count
    fp32_bytes: Count


@dataclass(frozen=True, slots=True)
class SessionFlag:
    """A configuration entry of a session, whether it takes effect, and why."""

    value: Line
    engages: bool
    why: Line


@dataclass(frozen=True, slots=True)
class SessionOption:
    """An option of a session, and why."""

    value: int
    why: Line


@dataclass(frozen=True, slots=True)
class LayerCount:
    """How many layers run in BF16, of how many."""

    bf16: Count
    all: Count


class OnnxModel(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """An ONNX model: its opset, the dtype and bucket that it was exported for, and its file if it is in the bundle."""

    opset: int
    weights: Line
    bucket: dict[Line, Count]
    file: Line = ""


@dataclass(frozen=True, slots=True)
class Session:
    """What a session of ONNX Runtime needs to be told on the target.

    Attributes:
        seen_with: The version of ONNX Runtime that all this was seen with.
        session_config: Configuration entries by name.
        session_options: Fields of SessionOptions by name.
        layers: How many the BF16 flag reaches.
        model: The ONNX model, if one was made.
    """

    seen_with: Line
    session_config: Mapping[Line, SessionFlag]
    session_options: Mapping[Line, SessionOption]
    layers: LayerCount
    model: OnnxModel | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        schema_version: Of the bundle's format.
        armopt_version: That wrote it.
        target: Name of the target.
        machine: Architecture that its kernels are for, as ``platform.machine()`` has it.
        required_features: CPU features without which it must not run.
        environment: Wanted variables by name.
        versions: Package or library -> version, where the bundle was made.
        files: Every other file of the bundle -> sha256.
        model: What it was made from, and what that takes.
        plan: For each part and bucket, the decisions.
        refused: Nodes that run as plain ATen, each with its reason.
        accuracy: Against FP32.
        weights: Their bytes.
        onnxruntime: For ONNX Runtime; None where there is no one graph.
        not_in_bf16: For each part and bucket, what multiplies in FP32; empty in bundles from before it was written.
        digest: sha256 of all else, and through `files` of the whole bundle; empty until it is written.
    """

    schema_version: int
    armopt_version: Line
    target: Line
    machine: Line
    required_features: tuple[Line, ...]
    environment: Mapping[Line, Variable]
    versions: Mapping[Line, Line]
    files: Mapping[Line, Digest]
    model: SourceModel
    plan: tuple[PartPlan, ...]
    refused: tuple[Skip, ...]
    accuracy: Accuracy
    weights: Weights
    onnxruntime: Session | None
    not_in_bf16: tuple[Remainder, ...] = ()
    digest: str = field(default="", compare=False)

    @property
    def is_module(self) -> bool:
        """Whether it is of kind "module": submodules as graphs, and the model's own Python around them."""
        return self.model.whole is None


def to_bytes(manifest: Manifest) -> bytes:
    """Canonical JSON, with the sha256 of everything else as ``digest``."""
    content = _content(manifest)
    return _canonical(content | {"digest": _hash(content)})


def _content(manifest: Manifest) -> dict[str, Any]:
    content: dict[str, Any] = _shown(schema.builtins(manifest))
    del content["digest"]
    return content


def _shown(content: Any) -> Any:
    """JSON without control characters, which may stand in the name of a file or in what a library says."""
    if isinstance(content, dict):
        return {_shown(key): _shown(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_shown(each) for each in content]
    return printable(content) if isinstance(content, str) else content


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def from_bytes(data: bytes, where: str | Path) -> Manifest:
    """Reads and checks a manifest.

    Raises:
        BundleError: Not JSON, changed since it was written, of a later schema, or a field does not fit.
    """
    damaged = BundleError("was changed or damaged after it was written", where=str(where), hint="Copy the bundle again")
    try:
        content = json.loads(data)
        found = content.pop("digest")
        version = content["schema_version"]
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise BundleError(
                f"has schema {version}; this armopt reads up to {SCHEMA_VERSION}",
                where=str(where),
                hint=f"Install armopt {content.get('armopt_version', '')} or later",
            )
        unchanged = found == _hash(content) and data == _canonical(content | {"digest": found})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged from None
    if not unchanged:
        raise damaged
    if version != SCHEMA_VERSION:
        content = legacy.manifest(content, where)
    described = schema.convert(content | {"digest": found}, Manifest, where)
    if surplus := _surplus(content, json.loads(_canonical(_content(described)))):
        raise BundleError(f"{surplus} is no field that armopt knows", where=str(where), hint="Make the bundle again")
    return described


def _surplus(content: Any, known: Any, path: str = "") -> str:
    """Where JSON holds what a record did not take of it; empty where it is all there."""
    if content == known or not isinstance(content, (dict, list)):
        return "" if content == known else path
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        place = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".lstrip(".")
        if isinstance(known, dict) and key not in known:
            return place
        if value != known[key]:
            return _surplus(value, known[key], place)
    return path


def _canonical(content: Any) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
