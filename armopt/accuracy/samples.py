"""What both sides are run on: the user's inputs, or generated ones; and which, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from armopt.accuracy import images
from armopt.capture import inputs, sample_files
from armopt.capture.sample_files import SAMPLE_FILES
from armopt.errors import InputError
from armopt.ir.records import Bucket, ExampleSpec, InputSpec

#: Inputs of one call, by name.
Named = Mapping[str, torch.Tensor]
#: What users give: a file, a folder, one sample, or several.
Given = str | Path | Named | Sequence[Named]


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs for as many calls.

    Attributes:
        said: Which they are, in words.
        given: Whether they are the user's.
        load: One function for each sample: large sets are read one by one.
        pictures: The file of each sample, where the samples are images.
    """

    said: str
    given: bool
    load: tuple[Callable[[], Named], ...]
    pictures: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.load)

    def __iter__(self) -> Iterator[Named]:
        return (load() for load in self.load)


def read(given: Given, specs: Sequence[InputSpec], model: str) -> Samples:
    """The user's inputs.

    Args:
        given: A file (see :mod:`armopt.capture.sample_files`), a folder of such files or of images, or tensors by name.
        specs: The model's inputs: name, shape and dtype.
        model: ``torchvision:NAME`` where known: how that model's images are prepared.

    Raises:
        InputError: There is nothing to read, or it doesn't fit the model.
    """
    if isinstance(given, Mapping):
        return _of([given], specs, "given as tensors")
    if not isinstance(given, (str, Path)):
        return _of(list(given), specs, "given as tensors")
    path = Path(given)
    if path.is_dir():
        return _of_folder(path, specs, model)
    return _of([sample_files.read(path)], specs, str(path))


def generated(specs: Sequence[InputSpec], bucket: Bucket, seed: int = 0) -> Samples:
    """One sample of seeded random inputs at a bucket's sizes, with the statistics of the example inputs if known."""
    generator = torch.Generator().manual_seed(seed)
    named = {spec.name: inputs.like(spec, bucket, generator) for spec in specs}
    known = all(isinstance(spec, ExampleSpec) and spec.statistics for spec in specs)
    how = "with the mean, spread and range of the example inputs" if known else "normal, or integers below two"
    return Samples(f"generated: seeded random numbers, {how}", False, (lambda: named,))


def _of(given: Sequence[Named], specs: Sequence[InputSpec], where: str) -> Samples:
    if not given:
        raise InputError("no sample", where=where, hint="Give at least one set of inputs")
    parts = [part for each in given for part in _split(_named(each, specs, where), specs)]
    for part in parts:
        _check(part, specs, where)
    count = f" ({len(parts)} samples)" if len(parts) > 1 else ""
    return Samples(f"{where}{count}", True, tuple(lambda part=part: part for part in parts))  # type: ignore[misc]


def _of_folder(folder: Path, specs: Sequence[InputSpec], model: str) -> Samples:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    pictures = [file for file in files if file.suffix.lower() in images.SUFFIXES]
    tensors = [file for file in files if file.suffix in SAMPLE_FILES]
    if pictures and not tensors:
        return _of_images(folder, pictures, specs, model)
    if tensors and not pictures:
        return Samples(f"{folder} ({len(tensors)} files)", True, tuple(_file_loader(file, specs) for file in tensors))
    kinds = ", ".join(sorted({*SAMPLE_FILES, *images.SUFFIXES}))
    what = "holds images and tensors both" if pictures else "holds no images and no tensors"
    raise InputError(what, where=str(folder), hint=f"Give a folder of one kind of {kinds}")


def _file_loader(file: Path, specs: Sequence[InputSpec]) -> Callable[[], Named]:
    def load() -> Named:
        found = _named(sample_files.read(file), specs, str(file))
        _check(found, specs, str(file))
        return found

    return load


def _of_images(folder: Path, files: Sequence[Path], specs: Sequence[InputSpec], model: str) -> Samples:
    pictured = [spec for spec in specs if images.is_image(spec)]
    if len(specs) != 1 or len(pictured) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise InputError(
            f"images don't fit the model's inputs ({names})",
            where=str(folder),
            hint="Images are for a model that takes one tensor [batch, 3, height, width]; give tensors instead",
        )
    prepare = images.preparation(pictured[0], model)
    name, first = pictured[0].name, pictured[0].shape[0]
    batch = first if isinstance(first, int) else 1
    groups = [files[i : i + batch] for i in range(0, len(files) // batch * batch, batch)]
    if not groups:
        raise InputError(
            f"holds {len(files)} images, the model takes {batch} at a time", where=str(folder), hint="Add some"
        )

    def loader(group: Sequence[Path]) -> Callable[[], Named]:
        return lambda: {name: torch.stack([prepare.read(file) for file in group])}

    used = len(groups) * batch
    left_out = f" of {len(files)}, as the model takes {batch} at a time" if used < len(files) else ""
    said = f"{folder} ({used} images{left_out}; {prepare.said})"
    return Samples(said, True, tuple(loader(group) for group in groups), tuple(group[0] for group in groups))


def _named(given: Named, specs: Sequence[InputSpec], where: str) -> Named:
    """One tensor for each input; a tensor without a name is the only input's.

    Raises:
        InputError: One is missing, or one too many.
    """
    names = [spec.name for spec in specs]
    if len(names) == 1 and set(given) == {""}:
        given = {names[0]: given[""]}
    missing = [name for name in names if name not in given]
    if missing:
        raise InputError(
            f"lacks {', '.join(missing)}",
            where=where,
            hint=f"The model takes {', '.join(names)}",
        )
    extra = [name for name in given if name not in names]
    if extra:
        raise InputError(
            f"the model takes no input {extra[0]!r}",
            where=where,
            hint=f"It takes {', '.join(names)}",
        )
    return {name: given[name] for name in names}


def _check(given: Named, specs: Sequence[InputSpec], where: str) -> None:
    """Compares tensors with what the model takes, before either side runs.

    Raises:
        InputError: Naming the input whose dtype or shape differs.
    """
    for spec in specs:
        tensor = given[spec.name]
        if not tensor.is_cpu:
            raise InputError(
                f"input {spec.name} is on the device {tensor.device}",
                where=where,
                hint="Give it on the CPU",
            )
        found, shape = str(tensor.dtype).removeprefix("torch."), "x".join(map(str, tensor.shape)) or "scalar"
        expected = "x".join(map(str, spec.shape)) or "scalar"
        fits = tensor.dim() == len(spec.shape) and all(
            not isinstance(size, int) or size == held for size, held in zip(spec.shape, tensor.shape, strict=True)
        )
        if found != spec.dtype or not fits:
            raise InputError(
                f"input {spec.name} is {shape} {found}, the model takes {expected} {spec.dtype}",
                where=where,
                hint="Give it as the model takes it",
            )


def _split(given: Named, specs: Sequence[InputSpec]) -> list[Named]:
    """Samples of the model's fixed batch size out of more rows of it."""
    fixed = {spec.shape[0] if spec.shape else None for spec in specs}
    rows = {tensor.shape[0] if tensor.dim() else None for tensor in given.values()}
    (batch,) = fixed if len(fixed) == 1 else (None,)
    (count,) = rows if len(rows) == 1 else (None,)
    if not isinstance(batch, int) or count is None or batch == 0 or count <= batch or count % batch:
        return [given]
    return [{name: tensor[i : i + batch] for name, tensor in given.items()} for i in range(0, count, batch)]
