"""A bundle's graph as a callable that takes and returns what the original model did."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from armopt.bundle.manifest import Manifest
from armopt.errors import ArmoptError, InputError, first_line
from armopt.ir import buckets, nesting
from armopt.ir.pieces import BATCH, run_in_pieces
from armopt.ir.records import Bucket, Dim, Signature
from armopt.runtime import forks, guards, surroundings
from armopt.runtime.arguments import Arguments
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
        self._arguments = Arguments(signature.inputs, [spec.name for spec in signature.specs])
        self._specs = [(spec.name, spec.shape, getattr(torch, spec.dtype)) for spec in signature.specs]
        self._count = len(self._specs)
        self._fit = guards.of(self._specs)
        self._plain = signature.inputs.names if _is_plain(signature.inputs) else None
        symbols = {symbol.name for symbol in signature.symbols}
        self._least, self._most = _bounds(signature)
        self._outputs = signature.outputs.tree
        self._build = nesting.builder(self._outputs)
        self._positions = signature.outputs.positions
        self._in_order = tuple(self._positions) == tuple(range(len(self._positions)))
        self._empty = empty
        self._forks = None if forks.on_own_thread() else FORKS.count
        self._programs = [(dict(bucket), forward) for bucket, forward in programs]
        self._lending = _lending(programs, len(self._specs))
        dynamic = _dynamic([shape for _, shape, _ in self._specs])
        # where the symbols' values are found: (symbol, tensor, dimension); and sizes that follow from them: 2*batch
        self._where = [entry for entry in dynamic if entry[0] in symbols]
        self._rows = signature.rows
        self._only = _only(programs, signature)
        self._quick = self._check_and_program()
        self._batched = [spec.shape[:1] == (BATCH,) for spec in signature.specs]
        self._following = [entry for entry in dynamic if entry[0] not in symbols]
        self.__signature__ = _signature(signature.inputs.names)

    def _check_and_program(self) -> tuple[Callable[..., bool], Forward] | None:
        """What a call needs where its arguments are the graph's inputs, and its results in their order; else None."""
        if self._only is None or self._plain is None or not self._in_order:
            return None
        return self._fit, self._only

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model.

        Raises:
            InputError: An input's name, shape or dtype is not what the model was captured with.
        """
        if self._quick is not None and self._forks == FORKS.count:
            # one frame of Python where tensors of one size are all there is; of what fits, none wants gradients
            fit, forward = self._quick
            tensors = args if not kwargs else self._ordered(args, kwargs)
            if len(tensors) == self._count and fit(*tensors) and not surroundings.differ():
                try:
                    return self._build(forward(*tensors))
                except Exception as error:
                    self._fail(error)
        return self.nested(self.run_flat(self.flatten(args, kwargs)))

    def run(self, *args: Any, out: Any, **kwargs: Any) -> Any:
        """Runs the model, and writes what it returns where the caller wants it: a steady call then makes no tensor.

        A layer whose result is returned writes there itself, if the tensor lies as its result does; whatever else is
        returned is copied there.

        Args:
            args: As in a call. An input by the name of ``out`` can be given by position alone.
            out: Tensors nested as what the model returns, for instance what a call of the same sizes returned.
            kwargs: As in a call.

        Returns:
            `out`.

        Raises:
            InputError: An input, or a tensor of `out`, has another shape or dtype than the model's.
        """
        tensors = self.flatten(args, kwargs)
        given = nesting.flatten(self._outputs, out, "out")
        places: list[torch.Tensor | None] = [None] * (max(self._positions, default=-1) + 1)
        taken = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        for i, (position, tensor) in enumerate(zip(self._positions, given, strict=True)):
            if not isinstance(tensor, torch.Tensor) or not tensor.is_cpu or tensor.layout is not torch.strided:
                raise _no_tensor(f"out, tensor {i}", tensor)
            memory = tensor.untyped_storage().data_ptr()
            if memory not in taken:  # else it is written when all inputs are read
                taken.add(memory)
                places[position] = tensor
        results = self.run_flat(tensors, places)
        for i, (position, tensor) in enumerate(zip(self._positions, given, strict=True)):
            if results[position] is not tensor:
                _write(results[position], tensor, f"out, tensor {i}")
        return out

    def nested(self, results: Sequence[Any]) -> Any:
        """What the model returns, from the graph's flat outputs."""
        return self._build(results if self._in_order else [results[i] for i in self._positions])

    def run_flat(
        self, tensors: Sequence[torch.Tensor], out: Sequence[torch.Tensor | None] | None = None
    ) -> Sequence[Any]:
        """The graph's flat outputs from its flat inputs, unchecked; in the tensors of `out` where they fit.

        Raises:
            InputError: An operation can't take the values or the sizes that come to it.
        """
        if self._forks != FORKS.count and self._forks is not None:
            forks.refuse(f"the bundle for {self.manifest.target}")
        FORKS.worked_at = FORKS.count
        if surroundings.differ():
            with surroundings.as_captured():
                return self._run(tensors, out)
        return self._run(tensors, out)

    def _run(self, tensors: Sequence[torch.Tensor], out: Sequence[torch.Tensor | None] | None) -> Sequence[Any]:
        try:
            if not torch.is_grad_enabled():
                return self._only(*tensors) if self._only is not None and out is None else self._call(tensors, out)
            torch._C._set_grad_enabled(False)  # a fifth of what torch.no_grad() takes
            try:
                return self._only(*tensors) if self._only is not None and out is None else self._call(tensors, out)
            finally:
                torch._C._set_grad_enabled(True)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        """Says of an error in a call where it was: an index beyond a table, too little memory…"""
        if isinstance(error, ArmoptError):
            raise error
        what = f"the model can't run on these inputs: {type(error).__name__}: {first_line(error)}"
        raise InputError(what, where=f"the bundle for {self.manifest.target}") from error

    def _call(self, tensors: Sequence[torch.Tensor], out: Sequence[torch.Tensor | None] | None) -> Sequence[Any]:
        forward = self._select(tensors)
        if self._rows:
            return run_in_pieces(forward, tensors, self._batched, self._rows)
        return forward(*tensors) if out is None or forward not in self._lending else forward(*tensors, out)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[torch.Tensor]:
        """The tensors of a call, in the order of the graph's inputs, checked."""
        tensors = args if not kwargs else self._ordered(args, kwargs)
        if self._plain is not None and len(tensors) == self._count and self._fit(*tensors):
            if self._where:
                self._check_sizes(tensors)
            return tensors
        return self.check_inputs(self._arguments.flatten(args, kwargs))

    def _ordered(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """Tensors in the graph's order, some given by name; None, or nothing, where that can't be told so quickly."""
        if self._plain is None or len(args) + len(kwargs) != self._count:
            return ()
        return (*args, *map(kwargs.get, self._plain[len(args) :]))

    def check_inputs(self, tensors: Sequence[Any]) -> Sequence[torch.Tensor]:
        """Compares flat inputs with what the model was captured with.

        Returns:
            The same; int32 as int64 where that was captured, which changes no value.

        Raises:
            InputError: Naming the input that differs.
        """
        if len(tensors) == self._count and self._fit(*tensors):
            if self._where:
                self._check_sizes(tensors)
            return tensors
        checked = [_checked(tensor, *spec) for tensor, spec in zip(tensors, self._specs, strict=True)]
        if self._where:
            self._check_sizes(checked)
        return checked

    def _check_sizes(self, tensors: Sequence[torch.Tensor]) -> None:
        """Compares dynamic sizes with each other.

        Raises:
            InputError: Naming both inputs, where they differ.
        """
        values: dict[str, int] = {}
        said: dict[str, str] = {}
        for symbol, i, d in self._where:
            name, size = self._specs[i][0], tensors[i].shape[d]
            if values.setdefault(symbol, size) != size:
                raise InputError(
                    f"dimension {d} is {size}, but {symbol} is {values[symbol]} by {said[symbol]}",
                    where=f"input {name}",
                    hint="Give both the same size there",
                )
            said.setdefault(symbol, f"dimension {d} of input {name}")
            if size > self._most.get(symbol, size):
                raise InputError(
                    f"dimension {d} is {size}, the model takes up to {self._most[symbol]}", where=f"input {name}"
                )
            if 0 < size < self._least.get(symbol, 0):
                raise InputError(
                    f"dimension {d} is {size}, the model takes {self._least[symbol]} and more", where=f"input {name}"
                )
        for expression, i, d in self._following:
            size = tensors[i].shape[d]
            wanted = buckets.evaluate(expression, values)
            if wanted is not None and wanted != size:
                sizes = ", ".join(f"{symbol} is {values[symbol]} by {said[symbol]}" for symbol in values)
                raise InputError(
                    f"dimension {d} is {size}, expected {expression}, which is {wanted}: {sizes}",
                    where=f"input {self._specs[i][0]}",
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


def _only(programs: Sequence[tuple[Bucket, Forward]], signature: Signature) -> Forward | None:
    """The program of every call; None where sizes decide."""
    fixed = not signature.symbols and not signature.rows
    return programs[0][1] if len(programs) == 1 and fixed else None


def _checked(tensor: Any, name: str, shape: Sequence[Dim], dtype: torch.dtype) -> torch.Tensor:
    """An input as the graph takes it.

    Raises:
        InputError: It is not what the model was captured with.
    """
    if not isinstance(tensor, torch.Tensor) or not tensor.is_cpu or tensor.layout is not torch.strided:
        raise _no_tensor(f"input {name}", tensor)
    if tensor.dtype != dtype and (tensor.dtype, dtype) != (torch.int32, torch.int64):
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
            hint="Optimize the model again for this shape, with batch (--batch) or example_inputs (--input)",
        )
    return tensor if tensor.dtype == dtype else tensor.long()


def _lending(programs: Sequence[tuple[Bucket, Forward]], inputs: int) -> list[Forward]:
    """Those with primitives of their own: they take one argument more, tensors to write to."""
    return [forward for _, forward in programs if len(inspect.signature(forward).parameters) > inputs]


def _bounds(signature: Signature) -> tuple[dict[str, int], dict[str, int]]:
    """The least and the largest size of the symbols that have one.

    torch.export writes a least size of 2 where it saw no other, though one of 1 runs.
    """
    least = {symbol.name: symbol.least for symbol in signature.symbols if symbol.least > 2}
    return least, {symbol.name: symbol.most for symbol in signature.symbols if symbol.most is not None}


def _dynamic(shapes: Sequence[Sequence[int | str]]) -> list[tuple[str, int, int]]:
    """Every dynamic size, with its tensor and dimension."""
    return [(size, i, d) for i, shape in enumerate(shapes) for d, size in enumerate(shape) if isinstance(size, str)]


def _signature(names: Sequence[str]) -> inspect.Signature:
    """What Python tools are told of the arguments."""
    fit = [name for name in dict.fromkeys(names) if name.isidentifier() and not keyword.iskeyword(name)]
    return inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in fit])


def _is_plain(inputs: nesting.Inputs) -> bool:
    """Whether the arguments are tensors and nothing else, all positional, in the order of the graph's inputs."""
    plain = all(isinstance(item, nesting.Tensor) for item in inputs.args)
    return plain and not inputs.kwargs and len(inputs.names) == len(inputs.args)


def _write(result: torch.Tensor, tensor: torch.Tensor, where: str) -> None:
    """Copies a result to where its caller wants it.

    Raises:
        InputError: It has another shape or dtype, or can't be written to.
    """
    wanted, found = (f"{_short(each.dtype)} {_shape(each.shape)}" for each in (result, tensor))
    hint = "Give what a call with inputs of these sizes returned"
    if wanted != found:
        raise InputError(f"expected {wanted}, found {found}", where=where, hint=hint)
    try:
        tensor.detach().copy_(result)
    except RuntimeError as error:  # of one that is expanded, say
        raise InputError(f"can't be written to: {first_line(error)}", where=where, hint=hint) from None


def _no_tensor(where: str, found: Any) -> InputError:
    """The error for what is no dense tensor on the CPU."""
    if not isinstance(found, torch.Tensor):
        hint = "Convert it with torch.from_numpy()" if type(found).__module__ == "numpy" else "Give a torch.Tensor"
        return InputError(f"expected a tensor, found a {type(found).__name__}", where=where, hint=hint)
    if found.layout is not torch.strided:
        return InputError(f"expected a dense tensor, found {found.layout}", where=where, hint="Call .to_dense() first")
    what = f"is on the device {found.device}, and a bundle runs on the CPU"
    return InputError(what, where=where, hint="Move it with .cpu()")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: Sequence[Any]) -> str:
    return "x".join(str(size) for size in shape) or "scalar"
