"""A bundle, or the programs that become one, -> an ONNX model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from armopt.bundle import manifest, reader
from armopt.bundle.files import GRAPH, WEIGHTS, hash_file
from armopt.bundle.program import Part, Program
from armopt.errors import InputError
from armopt.onnx_export import session, store
from armopt.onnx_export.options import NAME, OnnxOptions
from armopt.onnx_export.standard import standard
from armopt.onnx_export.translate import Translated, translate


@dataclass(frozen=True, slots=True)
class Exported:
    """An ONNX model in its place.

    Attributes:
        files: The model, then its weights where they are apart -> bytes.
        inputs: Names, in order.
        outputs: Names, in order.
        kept: Weights that stay in FP32 because the dtype asked for can't hold their values.
        session: What a session of ONNX Runtime needs to be told of it.
    """

    files: Mapping[Path, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kept: tuple[str, ...]
    session: manifest.Session


@dataclass(frozen=True, slots=True)
class Prepared:
    """A translated program, not yet written."""

    translated: Translated
    program: Program
    options: OnnxOptions

    def attach(self, described: manifest.Manifest, folder: Path) -> None:
        """Writes the model into the folder of an unfinished bundle, in which graph and weights are."""
        _name(self, described, _hashes({name: hash_file(folder / name) for name in (GRAPH, WEIGHTS)}))
        store.save(self.translated.model, folder / NAME)


def export(
    bundle: str | Path, output: str | Path, options: OnnxOptions | None = None, *, force: bool = False
) -> Exported:
    """Exports a bundle's graph as an ONNX model.

    Args:
        bundle: A folder or a zip.
        output: Where the model goes. Above 2 GB its weights go to ``OUTPUT.data`` beside it.
        options: Dtype of the weights, and form of the graph.
        force: Replace a model that is there.

    Raises:
        BundleError: The bundle is damaged.
        InputError: The bundle is of kind "module", ONNX has no form of an operation, or the place is unusable;
            nothing is left there.
    """
    output, options = Path(output), options or OnnxOptions()
    store.check_place(output, force=force)
    read = reader.read(bundle)
    if read.manifest.is_module:
        raise InputError(
            'is of kind "module": its parts are graphs, but the model is not',
            where=str(bundle),
            hint="ONNX export needs a model that is captured whole (docs/compile.md)",
        )
    prepared = prepare(read.whole, options)
    _name(prepared, read.manifest, {**_hashes(read.manifest.files), "bundle_digest": read.manifest.digest})
    files = store.write(prepared.translated.model, output, force=force)
    return Exported(
        files={file: file.stat().st_size for file in files},
        inputs=prepared.translated.inputs,
        outputs=prepared.translated.outputs,
        kept=prepared.translated.kept,
        session=session.describe(read.programs, options),
    )


def prepare(whole: Part, options: OnnxOptions) -> Prepared:
    """Translates a model's program for the largest bucket; its dynamic dimensions take all sizes.

    Raises:
        InputError: ONNX has no form of an operation.
    """
    program = whole.programs[-1]
    source = standard(program, fast_math=options.fast_math)
    return Prepared(translate(source, whole.signature, program.bucket, options.weights), program, options)


def _hashes(files: Mapping[str, str]) -> dict[str, str]:
    return {"graph_sha256": files[GRAPH], "weights_sha256": files[WEIGHTS]}


def _name(prepared: Prepared, described: manifest.Manifest, more: Mapping[str, str]) -> None:
    """Says in the model itself what it was made from."""
    said = {
        "version": described.armopt_version,
        "target": described.target,
        "model_source": described.model.source,
        "model_digest": described.model.digest,
        "bucket": json.dumps(dict(prepared.program.bucket), sort_keys=True),
        "weights": prepared.options.weights,
        **more,
    }
    prepared.translated.model.metadata_props.update({f"armopt.{name}": value for name, value in said.items()})
