"""Compares what a bundle computes with the original in FP32."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from armopt import inputs as inputs_module
from armopt import structure
from armopt.errors import InputError
from armopt.kernels import aten
from armopt.kernels.ops import CONV, KERNEL, LINEAR

if TYPE_CHECKING:
    from armopt.bundle.reader import Bundle, Part

#: TorchBench's bound for BF16.
MIN_COSINE = 0.99


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How one output agrees with FP32.

    Attributes:
        output: Its name.
        cosine: Cosine similarity; 1 for two zero tensors.
        sqnr_db: Signal to quantization noise ratio, in dB; None where there is no noise.
        max_abs: Largest absolute error.
        mean_abs: Mean absolute error.
        max_rel: Largest absolute error over the largest reference value.
        finite: Whether infinities and NaNs stand where they do in FP32, and nowhere else.
    """

    output: str
    cosine: float
    sqnr_db: float | None
    max_abs: float
    mean_abs: float
    max_rel: float
    finite: bool


def compare(output: str, reference: torch.Tensor, found: torch.Tensor) -> Accuracy:
    """Metrics of one output, computed in FP64.

    Raises:
        InputError: The shapes differ.
    """
    if reference.shape != found.shape:
        raise InputError(
            f"shape {tuple(found.shape)}, the original gives {tuple(reference.shape)}",
            where=f"output {output}",
            hint="Is the bundle made from this model?",
        )
    a, b = reference.detach().double().flatten(), found.detach().double().flatten()
    alike = (torch.isfinite(a) & torch.isfinite(b)) | (a == b) | (a.isnan() & b.isnan())
    finite = bool(alike.all())
    both = torch.isfinite(a) & torch.isfinite(b)
    a, b = a[both], b[both]
    if a.numel() == 0:
        return Accuracy(output, 1.0, None, 0.0, 0.0, 0.0, finite)
    noise = a - b
    norms = float(a.norm() * b.norm())
    cosine = float(a @ b) / norms if norms else float(float(a.norm()) == float(b.norm()))
    power = float(noise.square().sum())
    signal = float(a.square().sum())
    peak = float(a.abs().max())
    worst = float(noise.abs().max())
    return Accuracy(
        output=output,
        cosine=min(1.0, cosine),
        sqnr_db=10 * math.log10(signal / power) if power and signal else None,
        max_abs=worst,
        mean_abs=float(noise.abs().mean()),
        max_rel=worst / peak if peak else 0.0,
        finite=finite,
    )


def compare_all(names: Sequence[str], reference: Sequence[Any], found: Sequence[Any]) -> list[Accuracy]:
    """Metrics of every tensor among the outputs, in order."""
    return [
        compare(name, a, b)
        for name, a, b in zip(names, reference, found, strict=True)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    ]


def summary(found: Mapping[str, Sequence[Accuracy]], *, min_cosine: float, reference: str) -> dict[str, Any]:
    """The report: worst cosine over all buckets and outputs, the gate, and every figure.

    Args:
        found: Accuracies by bucket.
        min_cosine: The gate.
        reference: What was compared with, in words.
    """
    every = [accuracy for entries in found.values() for accuracy in entries]
    floats = every or [Accuracy("none", 1.0, None, 0.0, 0.0, 0.0, True)]
    cosine = min(accuracy.cosine for accuracy in floats)
    finite = all(accuracy.finite for accuracy in floats)
    return {
        "cosine": cosine,
        "max_abs": max(accuracy.max_abs for accuracy in floats),
        "finite": finite,
        "min_cosine": min_cosine,
        "passed": bool(cosine >= min_cosine and finite),
        "reference": reference,
        "outputs": {bucket: [asdict(accuracy) for accuracy in entries] for bucket, entries in found.items()},
    }


class InFp32(fx.Interpreter):
    """Runs a lowered program without its roundings of activations: weights as they are stored, all else in FP32."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sends each layer to plain ATen, and drops casts to BF16."""
        if target is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            return args[0]
        if target in (LINEAR, CONV):
            plain = aten.LINEAR if target is LINEAR else aten.CONV
            args = (*args[: KERNEL[target]], plain.name, 0)
        return super().call_function(target, args, kwargs)


def validate(
    bundle: str | Path,
    *,
    against: str | Path | torch.nn.Module | None = None,
    model: str = "",
    inputs: Mapping[str, torch.Tensor] | None = None,
    min_cosine: float = MIN_COSINE,
    trust_pickle: bool = False,
) -> dict[str, Any]:
    """Compares a bundle, as it runs on this host, with FP32.

    Args:
        bundle: The bundle.
        against: The original: a module, or its file. Without it the reference is the bundle's own graph with its stored
            weights and all activations in FP32, which leaves the rounding of weights out; the report says so.
        model: Reference to the class of `against`, where that is a state dict.
        inputs: Named inputs; by default seeded random ones for each bucket.
        min_cosine: The gate.
        trust_pickle: Whether unpickling `against` may run code.

    Returns:
        ``cosine`` (the worst), ``passed``, ``reference``, ``inputs``, ``ran`` and every output's metrics by bucket.

    Raises:
        InputError: The original doesn't fit the bundle, or the inputs don't fit the model.
    """
    from armopt import runtime
    from armopt.bundle import reader

    read = reader.read(bundle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", runtime.ArmoptWarning)
        loaded = runtime.load_parts(read)
    if read.manifest.is_module and inputs is not None:
        raise InputError('its parts take no inputs of the model (kind "module")', where="--inputs", hint="Leave it out")
    originals = _originals(read, against, model, trust_pickle)
    found: dict[str, list[Accuracy]] = {}
    for part, program in [(each, program) for each in read.parts for program in each.programs]:
        tensors = _tensors(part.signature, program.bucket, inputs)
        loaded[part.path].check(tensors)
        result = loaded[part.path].run_flat(tensors)
        original = originals.get(part.path)
        with torch.no_grad():
            reference = InFp32(program.graph_module).run(*tensors) if original is None else original(*tensors)
        positions = part.signature["outputs"]["positions"]
        if len(reference) != len(result):
            raise InputError(f"the original has {len(reference)} outputs, the bundle {len(result)}", where=str(against))
        names = structure.output_names(part.signature["outputs"], len(result))
        found[" ".join(filter(None, (part.path, bucket_name(program.bucket))))] = compare_all(
            [names[i] for i in positions], [reference[i] for i in positions], [result[i] for i in positions]
        )
        if inputs is not None:
            break
    if not originals:
        said = "the bundle's own graph with FP32 activations (weights as stored; pass --against for the original)"
    else:
        said = f"the original in FP32 ({against if isinstance(against, (str, Path)) else type(against).__name__})"
    report = summary(found, min_cosine=min_cosine, reference=said)
    ran = (
        "portable twins on this host" if any(part.portable for part in loaded.values()) else "the kernels of this host"
    )
    return report | {"inputs": "given" if inputs is not None else "random, seeded", "ran": ran}


def bucket_name(bucket: Mapping[str, int]) -> str:
    """A bucket as text: ``batch=8``; ``static`` where nothing is dynamic."""
    return ",".join(f"{name}={size}" for name, size in bucket.items()) or "static"


def _originals(
    read: Bundle, against: str | Path | torch.nn.Module | None, model: str, trust_pickle: bool
) -> dict[str, Callable[..., Sequence[Any]]]:
    """The original's graph, or its parts, by path: each takes and returns flat tensors."""
    if against is None:
        return {}
    if not read.manifest.is_module:
        original = _original(read, against, model, trust_pickle)
        return {} if original is None else {"": original}
    if isinstance(against, torch.nn.Module):
        whole = against
    else:
        from armopt import sources

        reference = model or str(read.manifest.model["factory"])
        whole = sources.build(Path(against), sources.Options(model=reference))
    return {part.path: _flat(whole, part) for part in read.parts}


def _flat(whole: torch.nn.Module, part: Part) -> Callable[..., Sequence[Any]]:
    """A submodule as a function of flat tensors, whose result stands as a graph's does."""
    try:
        module = whole.get_submodule(part.path)
    except AttributeError:
        raise InputError(f"has no part {part.path}", where=type(whole).__name__, hint="Is it the original?") from None
    outputs = part.signature["outputs"]
    arrange = structure.builder(part.signature["inputs"])

    def call(*tensors: torch.Tensor) -> Sequence[Any]:
        nested = arrange(list(tensors))
        found = structure.flatten(outputs, module(*nested["args"], **nested["kwargs"]), "outputs")
        flat: list[Any] = [None] * (max(outputs["positions"]) + 1)
        for position, tensor in zip(outputs["positions"], found, strict=True):
            flat[position] = tensor
        return flat

    module.eval()
    return call


def _original(
    read: Bundle, against: str | Path | torch.nn.Module | None, model: str, trust_pickle: bool
) -> fx.GraphModule | None:
    """The original as a flat graph that takes the bundle's inputs."""
    if against is None:
        return None
    from armopt import capture, sources

    specs = read.signature["specs"]
    bucket = read.programs[0].bucket
    tensors = dict(zip([spec["name"] for spec in specs], _tensors(read.signature, bucket, None), strict=True))
    sizes = tuple(sorted({program.bucket["batch"] for program in read.programs if "batch" in program.bucket}))
    batch = sizes if len(sizes) > 1 else ()
    if isinstance(against, torch.nn.Module):
        args, kwargs = inputs_module.bind(
            inputs_module.parameters(against)[0], [], tensors, "original", open_ended=True
        )
        captured = capture.module(against, args, kwargs, batch=batch, source=type(against).__name__)
    else:
        options = sources.Options(model=model, samples=tensors, batch=batch, trust_pickle=trust_pickle)
        captured = sources.open_model(Path(against), options)
    if len(captured.input_specs) != len(specs):
        raise InputError(
            f"takes {len(captured.input_specs)} inputs, the bundle {len(specs)}",
            where=captured.source,
            hint="Is the bundle made from this model?",
        )
    return captured.graph_module


def _tensors(
    signature: Mapping[str, Any], bucket: Mapping[str, int], given: Mapping[str, torch.Tensor] | None
) -> list[torch.Tensor]:
    """Inputs in the graph's order: the given ones, or seeded random ones at a bucket's sizes."""
    if given is not None:
        names = [spec["name"] for spec in signature["specs"]]
        missing = [name for name in names if name not in given]
        if missing:
            raise InputError(
                f"lacks {', '.join(missing)}", where="--inputs", hint=f"The model takes {', '.join(names)}"
            )
        return [given[name] for name in names]
    generator = torch.Generator().manual_seed(0)
    return [
        inputs_module.InputOption(
            spec["name"],
            tuple(bucket.get(size, 1) if isinstance(size, str) else size for size in spec["shape"]),
            getattr(torch, spec["dtype"]),
        ).tensor(generator)
        for spec in signature["specs"]
    ]
