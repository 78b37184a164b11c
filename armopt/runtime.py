"""Loads a bundle, checks this host, proves which kernels run, and runs it."""

from __future__ import annotations

import inspect
import math
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from armopt import environment, structure, targets, verdicts
from armopt.bind import Binder, Bound
from armopt.bundle import reader
from armopt.bundle.codec import Program
from armopt.bundle.manifest import Manifest
from armopt.errors import HostError, InputError
from armopt.tuning import read as read_tuning

#: Names of oneDNN's fast-math mode; the first wins.
_FAST_MATH = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
Forward = Callable[..., Sequence[torch.Tensor]]


class ArmoptWarning(UserWarning):
    """Something that costs speed or says that this host is not the target."""


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
    ) -> None:
        self.manifest = manifest
        self.portable = portable
        self.kernels = tuple(tuple(entries) for entries in kernels)
        self._inputs = signature["inputs"]
        self._positional = len(self._inputs["items"]["args"]["items"])
        self._names: list[str] = self._inputs["names"]
        self._specs = [(s["name"], tuple(s["shape"]), getattr(torch, s["dtype"])) for s in signature["specs"]]
        self._symbols: list[str] = [symbol["name"] for symbol in signature["symbols"]]
        self._build = structure.builder(signature["outputs"])
        self._positions: list[int] = signature["outputs"]["positions"]
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
        with torch.no_grad():
            return self._select(tensors)(*tensors)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call, in the order of the graph's inputs, checked."""
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
            if len(shape) != tensor.dim() or any(
                size != expected
                for size, expected in zip(tensor.shape, shape, strict=True)
                if isinstance(expected, int)
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
        return next(bucket for bucket, run in self._programs if run is forward)

    def _select(self, tensors: Sequence[torch.Tensor]) -> Forward:
        """The program of the nearest bucket, by ratio."""
        if len(self._programs) == 1:
            return self._programs[0][1]
        values = {symbol: tensors[i].shape[d] for symbol, i, d in self._where}
        return min(self._programs, key=lambda entry: _distance(entry[0], values))[1]


def _distance(bucket: Mapping[str, int], values: Mapping[str, int]) -> float:
    return sum(abs(math.log(max(1, values[name]) / max(1, size))) for name, size in bucket.items() if name in values)


def load(path: str | Path, *, strict: bool = False, tuning: str | Path | None = None) -> Model:
    """Loads a bundle for this host.

    On the target's architecture each kernel is run once with oneDNN's log on; one that answers with a reference
    implementation, or reorders its weight on every call, is replaced by the next best, with a warning. On another
    architecture the portable twins run: the target's rounding, not its speed.

    Args:
        path: The bundle, a folder or a zip.
        strict: Whether any difference between this host and the manifest is an error.
        tuning: A file from ``armopt tune`` on this host; by default the one that ``ARMOPT_TUNING`` names.

    Returns:
        A callable that takes and returns what the original model did.

    Raises:
        BundleError: The bundle is damaged.
        HostError: This host lacks a CPU feature that the bundle needs, or, if strict, differs at all.
    """
    return from_bundle(reader.read(path), strict=strict, tuning=tuning)


def from_bundle(bundle: reader.Bundle, *, strict: bool = False, tuning: str | Path | None = None) -> Model:
    """The same for a bundle that is read already.

    Raises:
        HostError: As :func:`load`.
    """
    if not bundle.manifest.accuracy["passed"]:
        warnings.warn(
            f"{bundle.path} is marked as not deployable: its accuracy gate failed (see its report.json)",
            ArmoptWarning,
            stacklevel=3,
        )
    portable = platform.machine() != bundle.manifest.machine
    if portable:
        aim = f"{bundle.manifest.target} ({bundle.manifest.machine})"
        warnings.warn(
            f"the bundle is for {aim}, this host is {platform.machine()}: "
            "portable twins run, with the target's rounding but not its speed",
            ArmoptWarning,
            stacklevel=3,
        )
        return _model(bundle, [(p, p.graph_module.forward, []) for p in bundle.programs], portable=True)
    _check_host(bundle.manifest, strict)
    remembered = verdicts.path_for(_build_facts())
    # a variable set after the start may have come too late for oneDNN: such a process neither learns nor teaches
    reliable = not environment.late_variables(_FAST_MATH)
    known = verdicts.read(remembered) if reliable else {}
    times = tuning or os.environ.get("ARMOPT_TUNING")
    binder = Binder(fast_math(os.environ), read_tuning(Path(times)) if times else None, dict(known))
    bound = []
    for program in bundle.programs:
        module, entries = binder.bind(program)
        bound.append((program, module.forward, entries))
    if reliable and binder.verdicts != known:
        verdicts.write(remembered, binder.verdicts)
    changed = {
        entry.node: entry
        for _, _, entries in bound
        for entry in entries
        if entry.kernel != entry.planned and not entry.reason.startswith("tuned")
    }
    if changed:
        first = next(iter(changed.values()))
        message = (
            f"{len(changed)} of {len(bound[0][2])} layers run another kernel than planned, "
            f"e.g. {first.node}: {first.kernel} ({first.reason})"
        )
        if strict:
            raise HostError(message, hint="Start the process with: armopt run BUNDLE -- CMD")
        warnings.warn(message, ArmoptWarning, stacklevel=3)
    return _model(bundle, bound, portable=False)


def _model(
    bundle: reader.Bundle, programs: Sequence[tuple[Program, Forward, Sequence[Bound]]], *, portable: bool
) -> Model:
    return Model(
        bundle.manifest,
        bundle.signature,
        [(program.bucket, forward) for program, forward, _ in programs],
        portable=portable,
        kernels=[entries for _, _, entries in programs],
    )


def _build_facts() -> dict[str, str]:
    """What a probe's verdict depends on besides the layer: the core, the libraries, and the fast-math mode."""
    host, record = targets.host(), environment.record()
    names = ("torch", "torch_git", "torch_build", "onednn", "acl", "blas", "threads")
    facts = {name: record.get(name, "") for name in names}
    features = " ".join(sorted(host.isa_features))
    return facts | {"core": host.core, "features": features, "fast_math": str(fast_math(os.environ))}


def fast_math(environ: Mapping[str, str]) -> bool:
    """Whether oneDNN reads BF16 fast math from these variables."""
    value = next((environ[name] for name in _FAST_MATH if name in environ), "")
    return value.upper() in ("BF16", "ANY")


def _check_host(manifest: Manifest, strict: bool) -> None:
    """Compares this host and process with the manifest: refuses what can't run, warns of what costs."""
    host = targets.host()
    differences = environment.compare(
        manifest.environment,
        manifest.required_features,
        # versions of a machine of another kind say nothing about this one
        manifest.versions if manifest.versions.get("machine") == platform.machine() else {},
        host,
        os.environ,
        record=environment.record(),
        late=environment.late_variables(manifest.environment),
    )
    for difference in differences:
        if difference.severity == "hard":
            found = f"{difference.what}: expected {difference.expected}, found {difference.found}"
            raise HostError(f"the bundle is for {manifest.target}. {found}", hint=difference.remedy)
        if difference.severity == "soft":
            if strict:
                raise HostError(str(difference), hint="Start the process with: armopt run BUNDLE -- CMD")
            warnings.warn(str(difference), ArmoptWarning, stacklevel=4)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: Sequence[Any]) -> str:
    return "x".join(str(size) for size in shape) or "scalar"
