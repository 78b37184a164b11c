"""A model as its user calls it, as a function of flat tensors: what captures and bundles are judged against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind

from armopt.capture.calls import eval_mode, unchanged
from armopt.capture.widening import are_half, weights_of, widen_graph
from armopt.errors import AccuracyError, ArmoptError, InputError, first_line
from armopt.ir import nesting
from armopt.models.huggingface import without_cache

#: Nested arguments of a call from its flat tensors.
Arrange = Callable[[Sequence[torch.Tensor]], tuple[Sequence[Any], dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Eager:
    """A module, run by Python. What a call leaves in buffers and attributes is undone behind it.

    Attributes:
        module: The model; in training mode it is put into eval mode for a call, else its parts run in the modes they
            are in.
        arrange: Nests the tensors of a call.
        outputs: How its results nest, and where each tensor stands among the flat ones.
        source: What to call it in messages.
    """

    module: torch.nn.Module
    arrange: Arrange
    outputs: nesting.Outputs
    source: str

    @classmethod
    def of_module(cls, module: torch.nn.Module, inputs: nesting.Inputs, outputs: nesting.Outputs, source: str) -> Eager:
        """A module that takes inputs nested so."""
        build = nesting.builder(inputs.tree)

        def arrange(tensors: Sequence[torch.Tensor]) -> tuple[Sequence[Any], dict[str, Any]]:
            nested = build(list(tensors))
            return nested["args"], nested["kwargs"]

        return cls(module, arrange, outputs, source)

    @classmethod
    def of_program(cls, program: ExportedProgram, outputs: nesting.Outputs, source: str) -> Eager:
        """An exported program, run as it was loaded, but in FP32 where it is in half precision."""
        specs = [spec.arg for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
        assert program.call_spec.in_spec is not None
        tree = program.call_spec.in_spec

        def arrange(tensors: Sequence[torch.Tensor]) -> tuple[Sequence[Any], dict[str, Any]]:
            given = iter(tensors)
            leaves = [arg.value if isinstance(arg, ConstantArgument) else next(given) for arg in specs]
            args, kwargs = torch.utils._pytree.tree_unflatten(leaves, tree)
            return args, kwargs

        module: Any = program.module()
        if are_half(weights_of(program)):
            widen_graph(module)
        return cls(module, arrange, outputs, source)

    def __call__(self, tensors: Sequence[torch.Tensor], *, times: int = 1) -> Sequence[Any]:
        """The flat outputs of the last of so many calls on the same inputs, which stay as they are.

        Raises:
            InputError: The model fails on them.
            AccuracyError: Its results nest otherwise than those captured, or hold other numbers.
        """
        with torch.no_grad(), self._as_called(), unchanged(self.module):
            for _ in range(times):
                args, kwargs = self.arrange([tensor.clone() for tensor in tensors])
                result = self._run(args, kwargs)
            found = self._flatten(result)
            found = [each.clone() if isinstance(each, torch.Tensor) else each for each in found]
        flat: list[Any] = [None] * (max(self.outputs.positions, default=-1) + 1)
        for position, value in zip(self.outputs.positions, found, strict=True):
            flat[position] = value
        return flat

    def in_fp64(self, tensors: Sequence[torch.Tensor], *, times: int = 1) -> Sequence[Any]:
        """Runs the model in FP64. Its weights are held twice until it returns.

        Raises:
            InputError: It can't be: TorchScript, or a forward that names FP32.
        """
        with _widened(self.module, self.source):
            found = self([x.double() if x.dtype == torch.float32 else x for x in tensors], times=times)
        if any(isinstance(y, torch.Tensor) and y.dtype == torch.float32 for y in found):
            raise InputError("its forward names FP32", where=self.source)
        return found

    def _flatten(self, result: Any) -> list[Any]:
        try:
            return nesting.flatten(self.outputs.tree, result, "outputs")
        except InputError as error:
            raise AccuracyError(
                f"the model returns something else than was captured: {error.where}: {error.what}",
                where=self.source,
                hint="A bundle returns what the captured call did: numbers and structure are its constants",
            ) from None

    def keeps_state(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a call changes buffers or attributes."""
        with torch.no_grad(), self._as_called(), unchanged(self.module) as changed:
            self._run(*self.arrange([tensor.clone() for tensor in tensors]))
            return changed()

    def _run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            return self.module(*args, **kwargs)
        except ArmoptError:
            raise
        except Exception as error:
            raise InputError(
                f"the model fails on these inputs: {type(error).__name__}: {first_line(error)}",
                where=self.source,
                hint="Is the bundle made from this model? Give inputs (--inputs) that it takes",
            ) from error

    @contextlib.contextmanager
    def _as_called(self) -> Iterator[None]:
        exported = isinstance(self.module, torch.fx.GraphModule) and hasattr(self.module, "validate_inputs")
        with without_cache(self.module):
            if exported or not getattr(self.module, "training", False):  # frozen TorchScript has none
                yield
            else:
                with eval_mode(self.module):
                    yield


@contextlib.contextmanager
def _widened(module: torch.nn.Module, source: str) -> Iterator[None]:
    """A module whose FP32 parameters and buffers are FP64; afterwards they are as they were."""
    parts = list(module.modules())
    if any(isinstance(part, torch.jit.ScriptModule) for part in parts):
        raise InputError("TorchScript stays in its dtype", where=source)
    tables: list[dict[str, Any]] = [table for part in parts for table in (part._parameters, part._buffers)]
    held = [dict(table) for table in tables]
    wide: dict[int, torch.Tensor] = {}
    try:
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and tensor.dtype == torch.float32:
                    table[name] = wide.setdefault(id(tensor), tensor.detach().double())
        yield
    finally:
        for table, before in zip(tables, held, strict=True):
            table.clear()
            table.update(before)
