"""Writes an ONNX model, with its weights beside it where one file can't hold them; checks it before it is in place."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir

from armopt.errors import InputError
from armopt.files import check_parent, sync

#: Bytes of weights above which they go to a file of their own. A protobuf message ends at 2**31; its nodes need room.
EXTERNAL_ABOVE = 2**31 - 2**26
#: Bytes of weights above which a model is checked without them.
CHECKED_WHOLE = 2**28


def data_path(path: Path) -> Path:
    """Where the weights of a large model go."""
    return path.with_name(f"{path.name}.data")


def check_place(path: Path, *, force: bool = False) -> None:
    """Refuses a place that can't take a model, before any work is done.

    Raises:
        InputError: The parent is missing or not writable, or something is there already.
    """
    check_parent(path)
    for place in (path, data_path(path)):
        if place.is_dir() or (place.exists() and not force):
            hint = "Choose another place with -o" + ("" if place.is_dir() else ", or pass --force")
            raise InputError("is there already", where=str(place), hint=hint)


def write(model: ir.Model, path: Path, *, force: bool = False, external_above: int = EXTERNAL_ABOVE) -> list[Path]:
    """Writes a model whole or not at all; returns its files.

    Raises:
        InputError: The place can't take it; nothing is left there.
    """
    check_place(path, force=force)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as name:
            made = save(model, Path(name) / path.name, external_above=external_above)
            for file in reversed(made):  # the model last: it is of no use without its weights
                file.replace(path.with_name(file.name))
            if len(made) == 1:
                data_path(path).unlink(missing_ok=True)  # of the model that was replaced
            sync(path.absolute().parent)
    except OSError as error:
        raise InputError(
            f"can't write the model: {error.strerror or error}",
            where=str(path),
            hint="Nothing was left behind. Free some space or choose another place with -o",
        ) from error
    return [path.with_name(file.name) for file in made]


def save(model: ir.Model, path: Path, *, external_above: int = EXTERNAL_ABOVE) -> list[Path]:
    """Writes and checks a model where nothing is yet; returns its files, the model first."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    files = [path] if size <= external_above else [path, data_path(path)]
    ir.save(model, path, external_data=None if len(files) == 1 else files[1].name)
    if len(files) > 1 or size <= CHECKED_WHOLE:
        onnx.checker.check_model(str(path), full_check=True)
    else:
        _check_without_weights(model, path)
    for file in files:
        sync(file)
    return files


def _check_without_weights(model: ir.Model, path: Path) -> None:
    """Checks a model with its large constants in a file that takes no space: the checker would hold them twice."""
    model = ir.Model(model.graph.clone(), ir_version=model.ir_version)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as name:
        folder, most = Path(name), 0
        for value in model.graph.initializers.values():
            held = value.const_value
            if held is not None and held.nbytes > 1024:
                most = max(most, held.nbytes)
                shape, called = ir.Shape([int(size) for size in held.shape]), str(value.name)  # type: ignore[arg-type]
                value.const_value = ir.ExternalTensor(
                    "constants", 0, held.nbytes, held.dtype, shape=shape, name=called, base_dir=folder
                )
        with (folder / "constants").open("wb") as file:
            file.truncate(most)
        ir.save(model, folder / path.name)
        onnx.checker.check_model(str(folder / path.name), full_check=True)
