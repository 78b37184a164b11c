"""``armopt inspect``: what is in a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from armopt.cli import layers, options, remainder
from armopt.cli.output import Output, human_size, text_table
from armopt.cli.validate import similarity

if TYPE_CHECKING:
    from armopt.bundle.manifest import GateResult, Manifest, PartPlan
    from armopt.bundle.reader import Bundle
    from armopt.ir.records import InputSpec


def inspect(bundle: options.BundlePath, every: options.EveryLayer = False, as_json: options.Json = False) -> None:
    """Show a bundle: every layer's kernel and reason, weights, accuracy, environment. Checks all hashes."""
    from armopt.bundle import reader

    read = reader.read(bundle, reference=True)
    out = Output(as_json)
    memory = _memory(read)
    rows = max(part.signature.rows for part in read.parts)
    out.result(to_json(read.manifest, memory, rows), lambda: text(read.manifest, memory, rows, every=every))


def _memory(read: Bundle) -> tuple[int, int]:
    """Bytes of the largest arena of a part or bucket, and of its results without one."""
    from armopt.runtime.memory import between_layers

    return max(between_layers(program) for part in read.parts for program in part.programs)


def to_json(manifest: Manifest, memory: tuple[int, int], rows: int = 0) -> dict[str, Any]:
    """The bundle as one object; `rows` of one run, 0 where all rows of a call run at once."""
    from armopt.bundle import schema

    several = len(manifest.plan) > 1
    nodes = []
    for each in manifest.plan:
        place = ({"part": each.part} if each.part else {}) | ({"bucket": dict(each.bucket)} if several else {})
        for node in each.nodes:
            entry = schema.builtins(node)
            del entry["block"]
            nodes.append({"name": entry.pop("node"), **entry, **place})
    return {
        "target": manifest.target,
        "armopt_version": manifest.armopt_version,
        "model": _model(manifest),
        "nodes": nodes,
        "weights_bytes": manifest.weights.bytes,
        "fp32_weights_bytes": manifest.weights.fp32_bytes,
        "arena_bytes": memory[0],
        "results_bytes": memory[1],
        "rows": rows,
        "refused": [{"name": skip.node, "reason": skip.reason} for skip in manifest.refused],
        "not_in_bf16": [remainder.to_json(each) for each in manifest.not_in_bf16],
        "accuracy": schema.builtins(manifest.accuracy),
        "environment": schema.builtins(manifest.environment),
        "required_features": list(manifest.required_features),
        "versions": dict(manifest.versions),
        "files": dict(manifest.files),
    }


def _model(manifest: Manifest) -> dict[str, Any]:
    """What the bundle was made from: the whole model's inputs, or each part's."""
    from armopt.bundle import schema

    described: dict[str, Any] = schema.builtins(manifest.model)
    if manifest.is_module:
        return described | {"kind": "module", "inputs": [], "symbols": []}
    (whole,) = described.pop("parts")
    del described["factory"], whole["path"]
    described |= whole
    return described


def text(manifest: Manifest, memory: tuple[int, int], rows: int = 0, *, every: bool) -> str:
    """The bundle for people; with `every` a line for each layer, however many there are."""
    model, accuracy = manifest.model, manifest.accuracy
    inputs = _inputs(model.inputs)
    if manifest.is_module:
        inputs = f"those of {model.factory or 'its module'}, whose Python runs between the parts"
    needs = ", ".join(manifest.required_features) or "nothing special"
    verdict = "deployable" if accuracy.passed else "NOT deployable: the accuracy gate failed"
    lines = [
        f"target    {manifest.target} ({manifest.machine}; needs {needs})",
        f"model     {model.source}, sha256 {model.digest[:16]}…",
        f"inputs    {inputs}",
        f"weights   {human_size(manifest.weights.bytes)}, FP32 {human_size(manifest.weights.fp32_bytes)}",
        f"memory    {human_size(memory[0])} between layers for each call at a time, {human_size(memory[1])} unshared",
        f"accuracy  {similarity(accuracy.cosine, accuracy.gates[0].value)} against {accuracy.reference}; {verdict}",
        f"gates     {', '.join(map(_gate, accuracy.gates))}",
    ]
    if rows:
        lines.append(f"rows      {rows} in each run, whatever the call has: no row's result depends on the others")
    if accuracy.difference:
        lines.append(f"capture   {accuracy.difference}")
    lines += [f"note      {remark}" for remark in accuracy.remarks]
    if accuracy.repair is not None:
        lines.append(f"repair    {accuracy.repair.said}")
    lines += [*(f"part      {part.path}: {_inputs(part.inputs)}" for part in model.parts if part.path), ""]
    for plan in manifest.plan:
        lines += _planned(plan, every=every)
    lines += _in_fp32(manifest)
    lines += ["environment:", *(f"  {name}={each.value}" for name, each in manifest.environment.items())]
    return "\n".join(lines)


def _planned(plan: PartPlan, *, every: bool) -> list[str]:
    """The layers of one part at one bucket."""
    lines = ["", f"{plan.part}:"] if plan.part else []
    if plan.bucket:
        lines.append(", ".join(f"{name}={value}" for name, value in plan.bucket.items()) + ":")
    rows = [layers.Row(n.node, n.op, n.shape, n.kernel, n.precision, n.reason) for n in plan.nodes]
    return [*lines, layers.table(rows, every=every), ""]


def _in_fp32(manifest: Manifest) -> list[str]:
    """What is not in BF16, and what runs as plain ATen or Python besides."""
    lines = []
    for each in manifest.not_in_bf16:
        if left := remainder.text(each):
            lines += [*([f"{each.part}:"] if each.part else []), left, ""]
    listed = {_path(each.part, row.node) for each in manifest.not_in_bf16 for row in each.products}
    if rows := [(skip.node, skip.reason) for skip in manifest.refused if skip.node not in listed]:
        title = "Plain ATen or Python:" if manifest.is_module else "Plain ATen:"
        lines += [title, text_table(("node", "reason"), rows), ""]
    return lines


def _path(part: str, node: str) -> str:
    return f"{part}: {node}" if part else node


def _inputs(described: Sequence[InputSpec]) -> str:
    return ", ".join(f"{spec.name} [{', '.join(map(str, spec.shape))}] {spec.dtype}" for spec in described)


def _gate(gate: GateResult) -> str:
    """A gate and its worst value."""
    return f"{gate.gate} ({'-' if gate.value is None else format(gate.value, '.6g')})"
