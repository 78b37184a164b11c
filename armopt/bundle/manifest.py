"""The manifest: what a bundle says of itself, as sorted JSON that is checked to the byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from armopt.errors import BundleError

#: 2 where the bundle is of kind "module", else 1: an older armopt reads what it can.
SCHEMA_VERSION = 2
NAME = "manifest.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        schema_version: Of the bundle's format.
        armopt_version: That wrote it.
        target: Name of the target.
        machine: Architecture that its kernels are for, as ``platform.machine()`` has it.
        required_features: CPU features without which it must not run.
        environment: Variable -> ``{"value", "why"}``.
        versions: Package or library -> version, where the bundle was made.
        files: Every other file of the bundle -> sha256.
        model: Source, digest, inputs and symbols; of kind "module" also `kind`, `factory` and `parts`.
        plan: For each bucket: its sizes, policy and decisions.
        refused: Nodes that run as plain ATen, each with its reason.
        accuracy: Cosine similarity, errors and the gate.
        weights: ``bytes`` in the bundle, ``fp32_bytes`` of the model.
        onnxruntime: What a session of ONNX Runtime needs to be told on the target, and the ONNX model in the bundle.
    """

    schema_version: int
    armopt_version: str
    target: str
    machine: str
    required_features: tuple[str, ...]
    environment: Mapping[str, Mapping[str, str]]
    versions: Mapping[str, str]
    files: Mapping[str, str]
    model: Mapping[str, Any]
    plan: tuple[Mapping[str, Any], ...]
    refused: tuple[Mapping[str, str], ...]
    accuracy: Mapping[str, Any]
    weights: Mapping[str, int]
    onnxruntime: Mapping[str, Any]

    @property
    def is_module(self) -> bool:
        """Whether it is of kind "module": submodules as graphs, and the model's own Python around them."""
        return self.model.get("kind") == "module"


def to_bytes(manifest: Manifest) -> bytes:
    """Canonical JSON, with the sha256 of everything else as ``digest``."""
    return _canonical(_content(manifest) | {"digest": digest(manifest)})


def digest(manifest: Manifest) -> str:
    """The manifest's sha256, and through its files' that of the whole bundle."""
    return hashlib.sha256(_canonical(_content(manifest))).hexdigest()


def _content(manifest: Manifest) -> dict[str, Any]:
    return {field.name: getattr(manifest, field.name) for field in fields(manifest)}


def from_bytes(data: bytes, where: str | Path) -> Manifest:
    """Reads and checks a manifest.

    Raises:
        BundleError: Not JSON, changed since it was written, or of a later schema.
    """
    damaged = BundleError("was changed or damaged after it was written", where=str(where), hint="Copy the bundle again")
    try:
        content = json.loads(data)
        found = content.pop("digest")
        version = content["schema_version"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged from None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            f"has schema {version}; this armopt reads up to {SCHEMA_VERSION}",
            where=str(where),
            hint=f"Install armopt {content.get('armopt_version', '')} or later",
        )
    if found != hashlib.sha256(_canonical(content)).hexdigest():
        raise damaged
    if _canonical(content | {"digest": found}) != data or set(content) != {f.name for f in fields(Manifest)}:
        raise damaged
    content["required_features"] = tuple(content["required_features"])
    content["plan"] = tuple(content["plan"])
    content["refused"] = tuple(content["refused"])
    return Manifest(**content)


def _canonical(content: Any) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
