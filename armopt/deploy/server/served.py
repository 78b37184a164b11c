"""A loaded bundle as a server needs it: what it takes and returns, whether requests may be joined, what answers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from armopt.deploy.server.settings import Settings
from armopt.errors import ArmoptError, InputError, first_line
from armopt.ir.records import InputSpec
from armopt.runtime import host_check, onednn_log
from armopt.runtime.load import load
from armopt.runtime.model import Model

_OWN_SERVER = "Serve it with a server of your own: armopt run BUNDLE -- python serve.py"
#: Layers, where a reference implementation counts as a fault.
_LAYERS = ("convolution", "deconvolution", "matmul", "inner_product")
#: Rows of the two requests that are tried together.
_TRIED = (1, 2)
#: Joined or alone, another program or another blocking of sums may answer: both have the rounding of BF16.
_LEAST_COSINE = 0.99


@dataclass(frozen=True, slots=True)
class Served:
    """A bundle that is ready to be served.

    Attributes:
        model: The loaded bundle.
        inputs: Of the model, in order.
        outputs: Name, shape and dtype of each output; -1 for a size that follows from an input's.
        buckets: Planned numbers of rows, ascending. Requests are put together up to the last, which is 1 where they
            are not.
        remarks: What was said when it was loaded.
        changed: Why another kernel runs than planned; empty where none does.
        version: The beginning of the bundle's digest.
    """

    model: Model
    inputs: tuple[InputSpec, ...]
    outputs: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    buckets: tuple[int, ...]
    remarks: tuple[str, ...]
    changed: str
    version: str

    @property
    def most_rows(self) -> int:
        """How many rows run together; 1 where requests are not put together."""
        return self.buckets[-1]

    def run(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name from checked inputs.

        Raises:
            InputError: An operation can't take the values.
        """
        return dict(named(self.model.nested(self.model.run_flat(tensors))))

    def probe(self) -> str:
        """Runs the model once with oneDNN's log on; why its kernels can't be trusted, empty where they can."""
        try:
            tensors = _example(self.inputs, _sizes(self.model), torch.Generator().manual_seed(0))
            if self.model.portable:
                self.run(tensors)
                return ""
            with onednn_log.capture_verbose() as log:
                self.run(tensors)
        except (RuntimeError, ArmoptError) as error:
            return f"the model fails: {first_line(error)}"
        slow = {e.implementation for e in onednn_log.references(log.executions) if e.primitive in _LAYERS}
        return f"oneDNN answers with {', '.join(sorted(slow))}" if slow else ""


def prepare(settings: Settings) -> Served:
    """Loads a bundle and tries it.

    Raises:
        BundleError: See :func:`armopt.load`.
        HostError: See :func:`armopt.load`.
        InputError: A server can't call it.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = load(settings.bundle, strict=settings.strict, tuning=settings.tuning)
    if not isinstance(model, Model):
        raise InputError('a bundle of kind "module" takes more than tensors', where=settings.bundle, hint=_OWN_SERVER)
    inputs, sizes = model.manifest.model.inputs, _sizes(model)
    remarks = [str(each.message) for each in said]
    outputs: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = ()
    buckets: tuple[int, ...] = (1,)
    try:
        outputs = _observed(model, inputs, sizes)
    except (ArmoptError, RuntimeError) as error:
        remarks.append(f"outputs are not described, as the model can't run on random inputs: {first_line(error)}")
    if settings.batching and outputs:
        why_not = _why_alone(model, inputs, sizes)
        if why_not:
            remarks.append(f"requests are not put together: {why_not}")
        else:
            buckets = _row_buckets(model, inputs)
    changed = host_check.changes(model.kernels)
    return Served(model, inputs, outputs, buckets, tuple(remarks), changed, model.manifest.digest[:12])


def named(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in what a model returned, each named by its path."""
    if isinstance(value, torch.Tensor):
        yield path or "output", value
        return
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from named(item, f"{path}.{key}" if path else str(key))


# --- what a run on random inputs shows ------------------------------------------------------------


def _sizes(model: Model) -> dict[str, int]:
    """A value for each dynamic size: what the first plan is for."""
    plans = model.manifest.plan
    return dict(plans[0].bucket) if plans else {}


def _example(
    inputs: Sequence[InputSpec], sizes: Mapping[str, int], generator: torch.Generator, scale: float = 1
) -> list[torch.Tensor]:
    """Random inputs: whole numbers are 0 or 1, which any table of indices has."""
    made = []
    for spec in inputs:
        shape = [size if isinstance(size, int) else sizes.get(size, 1) for size in spec.shape]
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point or dtype.is_complex:
            made.append((scale * torch.randn(shape, generator=generator)).to(dtype))
        else:
            made.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return made


def _run(model: Model, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(named(model.nested(model.run_flat(model.check_inputs(tensors)))))


def _observed(
    model: Model, inputs: Sequence[InputSpec], sizes: Mapping[str, int]
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Each output, with -1 for sizes that change where an input's do."""
    generator = torch.Generator().manual_seed(0)
    first = _run(model, _example(inputs, sizes, generator))
    shapes = {name: list(value.shape) for name, value in first.items()}
    for symbol, size in sizes.items():
        try:
            other = _run(model, _example(inputs, {**sizes, symbol: size + 1}, generator))
            moved = {name: list(value.shape) for name, value in other.items()}
        except (ArmoptError, RuntimeError):  # sizes may depend on each other, or be bounded
            other = _run(model, _example(inputs, {**sizes, symbol: max(1, size - 1)}, generator))
            moved = {name: list(value.shape) for name, value in other.items()}
        for name, shape in moved.items():
            shapes[name] = [-1 if a != b else a for a, b in zip(shapes[name], shape, strict=True)]
    return tuple((name, tuple(shapes[name]), value.dtype) for name, value in first.items())


def _rows_symbol(inputs: Sequence[InputSpec]) -> str | None:
    """The dynamic size that is every input's first; None where there is none."""
    firsts = {spec.shape[0] if spec.shape else 0 for spec in inputs}
    only = firsts.pop() if len(firsts) == 1 else 0
    return only if isinstance(only, str) and only.isidentifier() else None


def _row_buckets(model: Model, inputs: Sequence[InputSpec]) -> tuple[int, ...]:
    symbol = _rows_symbol(inputs)
    assert symbol is not None
    planned = {plan.bucket[symbol] for plan in model.manifest.plan if symbol in plan.bucket}
    return tuple(sorted(planned)) or (1,)


def _why_alone(model: Model, inputs: Sequence[InputSpec], sizes: Mapping[str, int]) -> str:
    """Why requests can't be put together; empty where they can.

    Tried, not assumed: two requests run together with other rows before them, twice. If the rows before are exchanged,
    theirs must stay the same to the bit, and be what the request gives alone.
    """
    symbol = _rows_symbol(inputs)
    if symbol is None:
        return "its inputs have no dynamic first dimension in common"
    if _row_buckets(model, inputs)[-1] < 2:
        return "it is planned for one row"
    generator = torch.Generator().manual_seed(1)
    few, many = _TRIED
    a, other = (_example(inputs, {**sizes, symbol: few}, generator, scale) for scale in (1, 8))
    b = _example(inputs, {**sizes, symbol: many}, generator)
    try:
        alone = [_run(model, tensors) for tensors in (a, b)]
        both, exchanged = (_run(model, _joined(before, b)) for before in (a, other))
    except (ArmoptError, RuntimeError) as error:
        return f"it can't run on random inputs of {few + many} rows: {first_line(error)}"
    for name, value in both.items():
        if value.dim() == 0 or value.shape[0] != few + many or exchanged[name].shape != value.shape:
            return f"the output {name} does not have the rows of the inputs"
        if not _same(value[few:], exchanged[name][few:]):
            return f"rows of the output {name} depend on each other"
        if not (_close(value[:few], alone[0][name]) and _close(value[few:], alone[1][name])):
            return f"the output {name} differs for rows that run together"
    return ""


def _joined(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat(pair) for pair in zip(first, second, strict=True)]


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool(((found == wanted) | (found.isnan() & wanted.isnan())).all())


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    if not found.is_floating_point() or not found.numel():
        return True  # a whole number is mostly a choice, which rounding may turn
    a, b = (value.double().nan_to_num().flatten() for value in (found, wanted))
    if not a.any() and not b.any():
        return True
    return float(torch.nn.functional.cosine_similarity(a, b, 0)) >= _LEAST_COSINE
