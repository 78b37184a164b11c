"""Loads a bundle, checks this host, proves which kernels run, and runs it."""

from __future__ import annotations

import inspect
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from armopt import buckets, glue, host, structure
from armopt.bind import Binder, Bound
from armopt.bundle import reader
from armopt.bundle.codec import Program
from armopt.bundle.manifest import Manifest
from armopt.errors import HostError, InputError
from armopt.host import ArmoptWarning as ArmoptWarning

Forward = Callable[..., Sequence[torch.Tensor]]
_RESTART = "Start the process with: armopt run BUNDLE -- CMD"


class Model:
    """A bundle ready to run. Call it as the original model.

    Attributes:
        manifest: Of the bundle.
        portable: Whether the kernels' portable twins run: the same rounding, on a host that is not the target.
        kernels: For each bucket, what every node runs.
    """

    def __init__(
        self,
        manifest: Manifest,
        signature: Mapping[str, Any],
        programs: Sequence[tuple[Mapping[str, int], Forward]],
        *,
        portable: bool,
        kernels: Sequence[Sequence[Bound]],
        empty: Forward | None = None,
    ) -> None:
        self.manifest = manifest
        self.portable = portable
        self.kernels = tuple(tuple(entries) for entries in kernels)
        self._inputs = signature["inputs"]
        self._positional = len(self._inputs["items"]["args"]["items"])
        self._names: list[str] = self._inputs["names"]
        self._specs = [(s["name"], tuple(s["shape"]), getattr(torch, s["dtype"])) for s in signature["specs"]]
        self._plain = self._names if _is_plain(self._inputs) else None
        self._symbols: list[str] = [symbol["name"] for symbol in signature["symbols"]]
        self._build = structure.builder(signature["outputs"])
        self._positions: list[int] = signature["outputs"]["positions"]
        self._empty = empty
        self._programs = [(dict(bucket), forward) for bucket, forward in programs]
        # where the symbols' values are found: (symbol, tensor, dimension)
        self._where = [
            (size, i, d)
            for i, (_, shape, _) in enumerate(self._specs)
            for d, size in enumerate(shape)
            if isinstance(size, str) and size in self._symbols
        ]
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in self._names if n.isidentifier()]
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model.

        Raises:
            InputError: An input's name, shape or dtype is not what the model was captured with.
        """
        results = self.run_flat(self.flatten(args, kwargs))
        return self._build([results[i] for i in self._positions])

    def run_flat(self, tensors: Sequence[torch.Tensor]) -> Sequence[Any]:
        """The graph's flat outputs from its flat inputs, unchecked."""
        if not torch.is_grad_enabled():
            return self._select(tensors)(*tensors)
        with torch.no_grad():
            return self._select(tensors)(*tensors)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call, in the order of the graph's inputs, checked."""
        if self._plain is not None and len(args) + len(kwargs) == len(self._plain):
            names = self._plain[len(args) :]
            if all(name in kwargs for name in names):
                tensors = [*args, *(kwargs[name] for name in names)]
                self.check(tensors)
                return tensors
        args, kwargs = self._arrange(args, kwargs)
        tensors = structure.flatten(self._inputs, {"args": list(args), "kwargs": kwargs}, "inputs")
        self.check(tensors)
        return tensors

    def check(self, tensors: Sequence[Any]) -> None:
        """Compares flat inputs with what the model was captured with.

        Raises:
            InputError: Naming the input that differs.
        """
        for tensor, (name, shape, dtype) in zip(tensors, self._specs, strict=True):
            if not isinstance(tensor, torch.Tensor):
                raise InputError(f"expected a tensor, found a {type(tensor).__name__}", where=f"input {name}")
            if tensor.dtype != dtype:
                raise InputError(
                    f"expected {_short(dtype)}, found {_short(tensor.dtype)}",
                    where=f"input {name}",
                    hint=f"Convert it with .to(torch.{_short(dtype)})",
                )
            if tensor.shape != shape and (
                len(shape) != tensor.dim()
                or any(n != wanted for n, wanted in zip(tensor.shape, shape, strict=True) if isinstance(wanted, int))
            ):
                raise InputError(
                    f"expected shape {_shape(shape)}, found {_shape(tensor.shape)}",
                    where=f"input {name}",
                    hint="Optimize the model again for this shape, with --batch or --input",
                )
        values: dict[str, int] = {}
        for symbol, i, d in self._where:
            size = tensors[i].shape[d]
            if values.setdefault(symbol, size) != size:
                raise InputError(
                    f"dimension {d} is {size}, but {symbol} is {values[symbol]} elsewhere",
                    where=f"input {self._specs[i][0]}",
                )

    def _arrange(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Puts arguments where they were when the model was captured, whichever way they are given now."""
        given, named = list(args), dict(kwargs)
        expected_kwargs = self._inputs["items"]["kwargs"]["items"]
        if len(given) == self._positional and named.keys() == expected_kwargs.keys():
            return given, named
        if len(given) > max(self._positional, len(self._names)):
            known = ", ".join(name for name, _, _ in self._specs)
            raise InputError(f"too many inputs: {len(given)}", where="inputs", hint=f"The model takes: {known}")
        wanted = [name for name in self._names[len(given) : self._positional] if name not in expected_kwargs]
        given += [named.pop(name) for name in wanted if name in named]
        for i, name in enumerate(self._names[self._positional : len(given)], start=self._positional):
            if name in expected_kwargs and name not in named:
                named[name] = given[i]
        given = given[: self._positional]
        for name, constant in expected_kwargs.items():
            if name not in named and constant["kind"] == "constant":
                named[name] = constant["value"]
        missing = [n for n in expected_kwargs if n not in named] + self._names[len(given) : self._positional]
        extra = [name for name in named if name not in expected_kwargs]
        if missing or extra or len(given) != self._positional:
            raise InputError(
                f"missing {', '.join(missing) or 'nothing'}; unexpected {', '.join(extra) or 'nothing'}",
                where="inputs",
                hint=f"The model was captured with: {', '.join(name for name, _, _ in self._specs)}",
            )
        return given, named

    def bucket(self, tensors: Sequence[torch.Tensor]) -> Mapping[str, int]:
        """The bucket whose program runs for these flat inputs."""
        forward = self._select(tensors)
        return next((bucket for bucket, run in self._programs if run is forward), self._programs[0][0])

    def _select(self, tensors: Sequence[torch.Tensor]) -> Forward:
        """The program of the nearest bucket, by ratio; without elements to work on, kernels have no part in it."""
        if self._empty is not None and self._where and not all(tensor.numel() for tensor in tensors):
            return self._empty
        if len(self._programs) == 1:
            return self._programs[0][1]
        values = {symbol: tensors[i].shape[d] for symbol, i, d in self._where}
        return buckets.nearest(self._programs, values)


def _is_plain(inputs: Mapping[str, Any]) -> bool:
    """Whether the arguments are tensors and nothing else, all positional, in the order of the graph's inputs."""
    items = inputs["items"]["args"]["items"]
    plain = [item["kind"] == "tensor" and item["index"] == i for i, item in enumerate(items)]
    return all(plain) and not inputs["items"]["kwargs"]["items"] and len(inputs["names"]) == len(items)


#: What builds a model: a reference, a function without arguments, or the model itself.
Factory = str | Callable[[], torch.nn.Module] | torch.nn.Module


def load(
    path: str | Path, *, model: Factory | None = None, strict: bool = False, tuning: str | Path | None = None
) -> Model | ModuleModel:
    """Loads a bundle for this host.

    On the target's architecture each kernel is run once with oneDNN's log on; one that answers with a reference
    implementation, or reorders its weight on every call, is replaced by the next best, with a warning. On another
    architecture the portable twins run: the target's rounding, not its speed.

    Args:
        path: The bundle, a folder or a zip.
        model: For a bundle of kind "module": what builds the model whose Python runs between the graphs; its weights
            count for nothing. torchvision's own models need none. Code is never taken out of a bundle.
        strict: Whether any difference between this host and the manifest is an error.
        tuning: A file from ``armopt tune`` on this host; by default the one that ``ARMOPT_TUNING`` names.

    Returns:
        A callable that takes and returns what the original model did.

    Raises:
        BundleError: The bundle is damaged, or another model is given than it was made from.
        HostError: This host lacks a CPU feature that the bundle needs, or, if strict, differs at all.
        InputError: `model` is missing, or builds none.
    """
    bundle = reader.read(path)
    factory = glue.find_factory(bundle, model)
    parts = load_parts(bundle, strict=strict, tuning=tuning, stacklevel=3)
    made = parts[""] if factory is None else ModuleModel(bundle.manifest, glue.assemble(bundle, factory, parts), parts)
    if not made.portable:
        _close_file(bundle)
    return made


def load_parts(
    bundle: reader.Bundle, *, strict: bool = False, tuning: str | Path | None = None, stacklevel: int = 2
) -> dict[str, Model]:
    """The graphs of a bundle, ready to run, by path of the part; the whole model's is empty.

    Raises:
        HostError: See :func:`load`.
    """
    described = bundle.manifest
    if not described.accuracy["passed"]:
        warnings.warn(
            f"{bundle.path} is marked as not deployable: its accuracy gate failed (see its report.json)",
            ArmoptWarning,
            stacklevel=stacklevel,
        )
    portable = host.is_portable(described.machine)
    if portable:
        aim = f"{described.target} ({described.machine})"
        warnings.warn(
            f"the bundle is for {aim}, this host is {platform.machine()}: "
            "portable twins run, with the target's rounding but not its speed",
            ArmoptWarning,
            stacklevel=stacklevel,
        )
        twins = {part.path: [(p, p.graph_module.forward, ()) for p in part.programs] for part in bundle.parts}
        return _models(bundle, twins, portable=True)
    host.check(
        described.target,
        described.environment,
        described.required_features,
        described.versions,
        strict=strict,
        remedy=_RESTART,
        stacklevel=stacklevel + 1,
    )
    bound: dict[str, list[_Bound]] = {}
    copies: dict[int, torch.Tensor] = {}
    verdicts: dict[str, str | None] = {}
    fast_math, times, bf16_attention = host.fast_math(os.environ), host.tuning(tuning), host.multiplies_bf16()
    with host.remembering(verdicts):
        for part in bundle.parts:
            binder = Binder(fast_math, times, verdicts, bf16_attention=bf16_attention, release=bundle.release)
            for program in part.programs:
                module, entries = binder.bind(program)
                _leave_file(module, program, copies, bundle.release)
                bound.setdefault(part.path, []).append((program, module.forward, entries))
    if changed := host.changes(entries for each in bound.values() for _, _, entries in each):
        if strict:
            raise HostError(changed, hint=_RESTART)
        warnings.warn(changed, ArmoptWarning, stacklevel=stacklevel)
    return _models(bundle, bound, portable=False)


def _leave_file(
    module: fx.GraphModule,
    program: Program,
    copies: dict[int, torch.Tensor],
    release: Callable[[torch.Tensor], None],
) -> None:
    """Copies what a bound graph keeps as it is stored: one tensor would hold the whole file of weights open.

    `copies` are by address; programs share them.
    """
    stored = {tensor.data_ptr() for tensor in program.graph_module.buffers()}
    for node in module.graph.find_nodes(op="get_attr"):
        tensor: torch.Tensor = getattr(module, str(node.target))
        if tensor.layout is torch.strided and tensor.data_ptr() in stored:
            if tensor.data_ptr() not in copies:
                copies[tensor.data_ptr()] = tensor.clone()
                release(tensor)
            object.__setattr__(module, str(node.target), copies[tensor.data_ptr()])


def _close_file(bundle: reader.Bundle) -> None:
    """Takes the weights out of all stored graphs that no model runs; being cycles, they would hold the file open."""
    for part in bundle.parts:
        for program in part.programs[bool(part.path) :]:  # as _models keeps one
            program.graph_module._buffers.clear()


_Bound = tuple[Program, Forward, Sequence[Bound]]


def _models(bundle: reader.Bundle, bound: Mapping[str, Sequence[_Bound]], *, portable: bool) -> dict[str, Model]:
    return {
        part.path: Model(
            bundle.manifest,
            part.signature,
            [(program.bucket, forward) for program, forward, _ in bound[part.path]],
            portable=portable,
            kernels=[entries for _, _, entries in bound[part.path]],
            empty=part.programs[0].graph_module.forward if part.path else None,
        )
        for part in bundle.parts
    }


class ModuleModel:
    """A bundle of kind "module" ready to run. Call it as the original model.

    Attributes:
        manifest: Of the bundle.
        module: The model; the parts in the bundle run its graphs.
        parts: The graphs by path.
        portable: Whether the kernels' portable twins run.
        kernels: For each part and bucket, what every node runs.
    """

    def __init__(self, manifest: Manifest, module: torch.nn.Module, parts: Mapping[str, Model]) -> None:
        self.manifest = manifest
        self.module = module
        self.parts = dict(parts)
        self.portable = any(part.portable for part in parts.values())
        self.kernels = tuple(entries for part in parts.values() for entries in part.kernels)
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        with torch.no_grad():
            return self.module(*args, **kwargs)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: Sequence[Any]) -> str:
    return "x".join(str(size) for size in shape) or "scalar"
