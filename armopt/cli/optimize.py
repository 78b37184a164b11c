"""``armopt optimize``: a model file -> a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armopt.cli import options, sink

if TYPE_CHECKING:
    from armopt.bundle.manifest import Manifest


def optimize(
    model: options.ModelPath = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="Where the bundle goes.")] = ...,  # type: ignore[assignment]
    target: options.TargetName = "graviton3",
    reference: options.Reference = "",
    described: options.Inputs = None,
    samples: options.Samples = None,
    batch: options.Batch = "",
    policy: options.PolicyName = "cost",
    tuning: options.TuningFile = None,
    kind: options.Kind = "auto",
    min_cosine: Annotated[float, typer.Option("--min-cosine", help="Least cosine similarity to FP32.")] = 0.99,
    trust_pickle: options.TrustPickle = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    as_json: options.Json = False,
) -> None:
    """Optimize a model for an Arm server and write a bundle."""
    from armopt import compiler
    from armopt.bundle import source, writer
    from armopt.errors import AccuracyError

    out = sink.Sink(as_json)
    writer.check_place(output, force=force)
    chosen = compiler.find_target(target)
    policy_chosen, sizes = options.parse_policy(policy, chosen, tuning), options.parse_batch(batch)
    with out.progress() as progress:
        progress("capture", 0, 5)
        opened = options.open_for(kind, model, reference, described, samples, sizes, trust_pickle)
        try:
            written = compiler.optimize(
                opened,
                output=output,
                target=chosen,
                batch=sizes,
                policy=policy_chosen,
                min_cosine=min_cosine,
                force=force,
                progress=progress,
            )
            failed = None
        except AccuracyError as error:
            written, failed = source.read_manifest(output), error
    out.result(to_json(written, output), lambda: summary(written, output))
    if failed is not None:
        raise failed


def to_json(written: Manifest, path: Path) -> dict[str, Any]:
    """The result of `optimize --json`."""
    return {
        "bundle": str(path),
        "target": written.target,
        "kind": written.model.get("kind", "graph"),
        "buckets": [
            {**({"part": each["part"]} if "part" in each else {}), "bucket": each["bucket"], "kernels": kernels(each)}
            for each in written.plan
        ],
        "weights_bytes": written.weights["bytes"],
        "fp32_weights_bytes": written.weights["fp32_bytes"],
        "refused": list(written.refused),
        "accuracy": dict(written.accuracy),
    }


def kernels(plan: Any) -> dict[str, int]:
    """How many nodes each kernel has."""
    counts: dict[str, int] = {}
    for node in plan["nodes"]:
        counts[node["kernel"]] = counts.get(node["kernel"], 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def summary(written: Manifest, path: Path) -> str:
    """The result for people."""
    half, full = written.weights["bytes"], written.weights["fp32_bytes"]
    lines = [f"Wrote {path} for {written.target}.", ""]
    for each in written.plan:
        sizes = ", ".join(f"{name} {value}" for name, value in each["bucket"].items())
        where = ": ".join(filter(None, (each.get("part", ""), sizes)))
        chosen = ", ".join(f"{count} {name}" for name, count in kernels(each).items()) or "no layers"
        lines.append(f"  kernels   {f'at {where}: ' if where else ''}{chosen}")
    ratio = f" ({half / full:.2f} of FP32's {sink.size(full)})" if full else ""
    lines.append(f"  weights   {sink.size(half)}{ratio}")
    verdict = "passed" if written.accuracy["passed"] else "FAILED"
    lines.append(
        f"  accuracy  cosine similarity to FP32 {written.accuracy['cosine']:.6f}, "
        f"largest error {written.accuracy['max_abs']:.3g}: {verdict} (gate {written.accuracy['min_cosine']})"
    )
    if written.refused:
        lines.append(f"  refused   {len(written.refused)} nodes run as plain ATen: armopt inspect {path}")
    lines += ["", f"Next, on the server:  armopt run {path} -- python serve.py"]
    given = ", model=factory" if written.is_module and not written.model["factory"].startswith("torchvision:") else ""
    lines.append(f"In serve.py:          model = armopt.load({str(path)!r}{given})")
    return "\n".join(lines)
