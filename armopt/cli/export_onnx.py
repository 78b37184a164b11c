"""``armopt export-onnx``: a bundle -> an ONNX model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armopt.cli import options
from armopt.cli.output import Output, human_size

if TYPE_CHECKING:
    from armopt.bundle.manifest import Session
    from armopt.onnx_export.export import Exported


def export_onnx(
    bundle: options.BundlePath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where the ONNX model goes.")],
    weights: options.OnnxWeights = "fp32",
    plain: options.OnnxPlain = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is there.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write a bundle's graph as an ONNX model: for the largest bucket, with its dynamic dimensions."""
    from armopt.onnx_export import export
    from armopt.onnx_export.options import OnnxOptions

    out = Output(as_json)
    written = export.export(bundle, output, OnnxOptions(weights, fast_math=not plain), force=force)
    out.result(_to_json(written), lambda: _text(written))


def _to_json(written: Exported) -> dict[str, Any]:
    from armopt.bundle import schema

    return {
        "files": {str(file): size for file, size in written.files.items()},
        "inputs": list(written.inputs),
        "outputs": list(written.outputs),
        "kept_in_fp32": list(written.kept),
        "onnxruntime": schema.builtins(written.session),
    }


def _text(written: Exported) -> str:
    model, *apart = written.files
    described = written.session.model
    assert described is not None
    bucket = ", ".join(f"{name} {size}" for name, size in described.bucket.items())
    lines = [
        f"Wrote {model}: opset {described.opset}" + (f", planned for {bucket}." if bucket else "."),
        "",
        f"  weights   {described.weights}, {human_size(sum(written.files.values()))}"
        + "".join(f", in {file} beside it" for file in apart),
        f"  takes     {', '.join(written.inputs)}",
        f"  gives     {', '.join(written.outputs)}",
    ]
    if written.kept:
        lines.append(f"  kept      {len(written.kept)} weights in FP32: {described.weights} can't hold their values")
    engaged = written.session.layers
    lines.append(f"  BF16      {engaged.bf16} of {engaged.all} layers, on a core that has it and with the options")
    lines += ["", "Next, in ONNX Runtime on the server:", ""]
    return "\n".join([*lines, *(f"    {line}" for line in _snippet(model, written.session))])


def _snippet(model: Path, session: Session) -> list[str]:
    entries = [
        f"options.add_session_config_entry({name!r}, {entry.value!r})"
        for name, entry in session.session_config.items()
        if entry.engages
    ]
    return [
        "options = onnxruntime.SessionOptions()",
        *entries,
        f"session = onnxruntime.InferenceSession({str(model)!r}, options, providers=['CPUExecutionProvider'])",
    ]
