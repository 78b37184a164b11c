"""A bundle's graph as a callable that takes and returns what the original model did."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from armopt.bundle.manifest import Manifest
from armopt.errors import ArmoptError, InputError, first_line
from armopt.ir import buckets, nesting
from armopt.ir.records import Bucket, Signature
from armopt.runtime import forks
from armopt.runtime.bind import Bound
from armopt.runtime.forks import FORKS
from armopt.runtime.loaded import Loaded

Forward = Callable[..., Sequence[torch.Tensor]]


class Model(Loaded):
    """A bundle's graph ready to run. Call it as the original model."""

    def __init__(
        self,
        manifest: Manifest,
        signature: Signature,
        programs: Sequence[tuple[Bucket, Forward]],
        *,
        portable: bool,
        kernels: Sequence[Sequence[Bound]],
        empty: Forward | None = None,
    ) -> None:
        self.manifest = manifest
        self.portable = portable
        self.kernels = tuple(tuple(entries) for entries in kernels)
        self._inputs = signature.inputs
        self._tree = signature.inputs.tree
        self._positional = len(self._inputs.args)
        self._names = self._inputs.names
        self._specs = [(spec.name, spec.shape, getattr(torch, spec.dtype)) for spec in signature.specs]
        self._plain = self._names if _is_plain(self._inputs) else None
        symbols = {symbol.name for symbol in signature.symbols}
        self._build = nesting.builder(signature.outputs.tree)
        self._positions = signature.outputs.positions
        self._empty = empty
        self._forks = FORKS.count
        self._programs = [(dict(bucket), forward) for bucket, forward in programs]
        # where the symbols' values are found: (symbol, tensor, dimension)
        self._where = [
            (size, i, d)
            for i, (_, shape, _) in enumerate(self._specs)
            for d, size in enumerate(shape)
            if isinstance(size, str) and size in symbols
        ]
        names = [n for n in dict.fromkeys(self._names) if n.isidentifier() and not keyword.iskeyword(n)]
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model.

        Raises:
            InputError: An input's name, shape or dtype is not what the model was captured with.
        """
        results = self.run_flat(self.flatten(args, kwargs))
        return self._build([results[i] for i in self._positions])

    def run_flat(self, tensors: Sequence[torch.Tensor]) -> Sequence[Any]:
        """The graph's flat outputs from its flat inputs, unchecked.

        Raises:
            InputError: An operation can't take the values or the sizes that come to it.
        """
        if self._forks != FORKS.count:
            forks.refuse(f"the bundle for {self.manifest.target}")
        FORKS.worked_at = FORKS.count
        try:
            if not torch.is_grad_enabled():
                return self._select(tensors)(*tensors)
            with torch.no_grad():
                return self._select(tensors)(*tensors)
        except ArmoptError:
            raise
        except Exception as error:  # an index beyond a table, too little memory…
            what = f"the model can't run on these inputs: {type(error).__name__}: {first_line(error)}"
            raise InputError(what, where=f"the bundle for {self.manifest.target}") from error

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call, in the order of the graph's inputs, checked."""
        if self._plain is not None and len(args) + len(kwargs) == len(self._plain):
            names = self._plain[len(args) :]
            if all(name in kwargs for name in names):
                tensors = [*args, *(kwargs[name] for name in names)]
                self.check_inputs(tensors)
                return tensors
        args, kwargs = self._arrange(args, kwargs)
        tensors = nesting.flatten(self._tree, {"args": list(args), "kwargs": kwargs}, "inputs")
        self.check_inputs(tensors)
        return tensors

    def check_inputs(self, tensors: Sequence[Any]) -> None:
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
        given, named, expected_kwargs = list(args), dict(kwargs), self._inputs.kwargs
        if len(given) == self._positional and named.keys() == expected_kwargs.keys():
            return given, named
        if len(given) > max(self._positional, len(self._names)):
            known = ", ".join(name for name, _, _ in self._specs)
            raise InputError(f"too many inputs: {len(given)}", where="inputs", hint=f"The model takes: {known}")
        self._by_place(given, named)
        for name, constant in expected_kwargs.items():
            if isinstance(constant, nesting.Constant):
                named.setdefault(name, constant.value)
        self._check_complete(given, named)
        return given, named

    def _by_place(self, given: list[Any], named: dict[str, Any]) -> None:
        """Moves arguments between the positional and the named ones to where they were captured."""
        expected = self._inputs.kwargs
        wanted = [name for name in self._names[len(given) : self._positional] if name not in expected]
        given += [named.pop(name) for name in wanted if name in named]
        for name, value in zip(self._names[self._positional :], given[self._positional :], strict=False):
            if name in expected:
                named.setdefault(name, value)
        del given[self._positional :]

    def _check_complete(self, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Refuses a call that lacks an argument, or has one that the model was not captured with.

        Raises:
            InputError: Naming them.
        """
        expected = self._inputs.kwargs
        missing = [*(name for name in expected if name not in named), *self._names[len(given) : self._positional]]
        extra = [name for name in named if name not in expected]
        if missing or extra or len(given) != self._positional:
            raise InputError(
                f"missing {', '.join(missing) or 'nothing'}; unexpected {', '.join(extra) or 'nothing'}",
                where="inputs",
                hint=f"The model was captured with: {', '.join(name for name, _, _ in self._specs)}",
            )

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


def _is_plain(inputs: nesting.Inputs) -> bool:
    """Whether the arguments are tensors and nothing else, all positional, in the order of the graph's inputs."""
    plain = all(isinstance(item, nesting.Tensor) for item in inputs.args)
    return plain and not inputs.kwargs and len(inputs.names) == len(inputs.args)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: Sequence[Any]) -> str:
    return "x".join(str(size) for size in shape) or "scalar"
