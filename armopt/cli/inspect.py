"""``armopt inspect``: what is in a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from armopt.cli import options
from armopt.cli.output import Output, human_size, text_table

if TYPE_CHECKING:
    from armopt.bundle.manifest import Manifest


def inspect(bundle: options.BundlePath, as_json: options.Json = False) -> None:
    """Show a bundle: every layer's kernel and reason, weights, accuracy, environment. Checks all hashes."""
    from armopt.bundle import reader

    read = reader.read(bundle, reference=True)
    out = Output(as_json)
    out.result(to_json(read.manifest), lambda: _text(read.manifest))


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The bundle as one object."""
    several = len(manifest.plan) > 1
    nodes = []
    for each in manifest.plan:
        for node in each["nodes"]:
            entry = {key: node[key] for key in ("op", "shape", "kernel", "precision", "layout", "reason")}
            part = {"part": each["part"]} if "part" in each else {}
            nodes.append({"name": node["node"], **part, **entry, **({"bucket": each["bucket"]} if several else {})})
    return {
        "target": manifest.target,
        "armopt_version": manifest.armopt_version,
        "model": manifest.model,
        "nodes": nodes,
        "weights_bytes": manifest.weights["bytes"],
        "fp32_weights_bytes": manifest.weights["fp32_bytes"],
        "refused": [{"name": entry["node"], "reason": entry["reason"]} for entry in manifest.refused],
        "accuracy": dict(manifest.accuracy),
        "environment": {name: dict(entry) for name, entry in manifest.environment.items()},
        "required_features": list(manifest.required_features),
        "versions": dict(manifest.versions),
        "files": dict(manifest.files),
    }


def _text(manifest: Manifest) -> str:
    inputs = _inputs(manifest.model["inputs"])
    if manifest.is_module:
        inputs = f"those of {manifest.model['factory'] or 'its module'}, whose Python runs between the parts"
    needs = ", ".join(manifest.required_features) or "nothing special"
    verdict = "deployable" if manifest.accuracy["passed"] else "NOT deployable: the accuracy gate failed"
    lines = [
        f"target    {manifest.target} ({manifest.machine}; needs {needs})",
        f"model     {manifest.model['source']}, sha256 {manifest.model['digest'][:16]}…",
        f"inputs    {inputs}",
        f"weights   {human_size(manifest.weights['bytes'])}, FP32 {human_size(manifest.weights['fp32_bytes'])}",
        f"accuracy  cosine {manifest.accuracy['cosine']:.6f} against {manifest.accuracy['reference']}; {verdict}",
        f"gates     {_gates(manifest.accuracy)}",
    ]
    if repair := manifest.accuracy.get("repair"):
        lines.append(f"repair    {repair['said']}")
    lines += [*(f"part      {p['path']}: {_inputs(p['inputs'])}" for p in manifest.model.get("parts", ())), ""]
    for each in manifest.plan:
        if "part" in each:
            lines += ["", f"{each['part']}:"]
        if each["bucket"]:
            lines.append(", ".join(f"{name}={value}" for name, value in each["bucket"].items()) + ":")
        rows = [
            (n["node"], n["op"], "x".join(map(str, n["shape"])), n["kernel"], n["precision"], n["reason"])
            for n in each["nodes"]
        ]
        lines += [text_table(("node", "op", "input", "kernel", "precision", "reason"), rows), ""]
    if manifest.refused:
        rows_refused = [(entry["node"], entry["reason"]) for entry in manifest.refused]
        lines += [
            "Plain ATen or Python:" if manifest.is_module else "Plain ATen:",
            text_table(("node", "reason"), rows_refused),
            "",
        ]
    lines += ["environment:", *(f"  {name}={entry['value']}" for name, entry in manifest.environment.items())]
    return "\n".join(lines)


def _inputs(described: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{i['name']} [{', '.join(map(str, i['shape']))}] {i['dtype']}" for i in described)


def _gates(accuracy: Mapping[str, Any]) -> str:
    """Every gate and its worst value; a bundle of an earlier armopt has the cosine alone."""
    gates = accuracy.get("gates", [{"gate": f"cosine>={accuracy['min_cosine']}", "value": accuracy["cosine"]}])
    return ", ".join(
        f"{gate['gate']} ({'-' if gate['value'] is None else format(gate['value'], '.6g')})" for gate in gates
    )
