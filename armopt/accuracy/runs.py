"""Runs for comparison: models, and graphs as they stand, in FP32, in FP64, and node by node.

Values go after their last use. All runs draw their random numbers from the same seed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from armopt import environment
from armopt.errors import ArmoptError, InputError, first_line
from armopt.ir import graph as g
from armopt.ir import nesting
from armopt.ir.calls import ConvCall, call_from
from armopt.ir.operations import CONV, LINEAR
from armopt.kernels import post_ops, table

_CAST = torch.ops.aten._to_copy.default
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_RESHAPE = torch.ops.aten.reshape.default
_WIDE = {
    **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float64),
    torch.complex64: torch.complex128,
}


#: Of every run that is compared: models that draw random numbers draw the same on both sides.
SEED = 0


class AsCaptured(fx.Interpreter):
    """Runs a captured graph. Of one image some memory formats can't be told apart, and torch.export may have taken one
    for another: a view that is none of what lies there copies, as in the model."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation, or the one that also copies."""
        return super().call_function(_RESHAPE if target in _VIEWS else target, args, kwargs)


class InFp32(fx.Interpreter):
    """Runs a lowered program without its roundings of activations: weights as they are stored, all else in FP32."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sends each layer to plain ATen, and drops casts to BF16."""
        if target is _CAST and kwargs.get("dtype") == torch.bfloat16:
            return args[0]
        if target in (LINEAR, CONV):
            call = call_from(target, args)
            args = call.replace(kernel=table.plain(call.op).name, block=0).args
        return super().call_function(target, args, kwargs)


class InFp64(AsCaptured):
    """Runs a graph in FP64: inputs, weights and every result widened, each weight only while it is used."""

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The input, widened."""
        return _wide(super().placeholder(target, args, kwargs))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same operation on FP64; a buffer that it writes to stays as it was."""
        if is_random(target, args, kwargs):  # in FP64 it would draw other numbers
            args, kwargs = torch.utils._pytree.tree_map(_narrow, (args, kwargs))
            return torch.utils._pytree.tree_map(_wide, super().call_function(target, args, kwargs))
        args, kwargs = torch.utils._pytree.tree_map(_wide, (args, kwargs))
        if target in (LINEAR, CONV):
            return _layer(target, args)
        result = super().call_function(target, args, kwargs)
        return torch.utils._pytree.tree_map(_wide, result)


def _wide(value: Any) -> Any:
    """A tensor or a dtype in FP64 where it is of less."""
    if isinstance(value, torch.Tensor):
        return value.to(_WIDE.get(value.dtype, value.dtype))
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def _narrow(value: Any) -> Any:
    """A tensor that was widened, as it was in FP32."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float64 else value


def is_random(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operation draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    known = {each.name: each for each in target._schema.arguments}
    given = dict(zip(known, args, strict=False)) | dict(kwargs)
    switches = [name for name in ("dropout_p", "train") if name in known]  # of attention and recurrent layers
    return all(given.get(name, known[name].default_value) for name in switches)


def random_nodes(graph_module: fx.GraphModule) -> list[str]:
    """The nodes of a graph that draw random numbers."""
    return [node.name for node in graph_module.graph.nodes if is_random(node.target, node.args, node.kwargs)]


@contextlib.contextmanager
def seeded(seed: int = SEED) -> Iterator[None]:
    """Random numbers from a seed; afterwards they go on as if nothing had been drawn."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _layer(target: Any, args: tuple[Any, ...]) -> torch.Tensor:
    call = call_from(target, args)
    if isinstance(call, ConvCall):
        y = torch.convolution(call.x, call.weight, call.bias, *call.geometry)
    else:
        y = torch.nn.functional.linear(call.x, call.weight, call.bias)
    return post_ops.apply(call.post_op, y, call.other)


@contextlib.contextmanager
def true_fp32() -> Iterator[None]:
    """FP32 that is FP32: in a process with fast math oneDNN would multiply it in BF16, so it is switched off there."""
    before: bool = torch._C._get_mkldnn_enabled()
    # not torch.backends.mkldnn.flags: that sets TF32 too, and warns of it
    torch._C._set_mkldnn_enabled(before and not environment.fast_math(os.environ))
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextlib.contextmanager
def unchanged_buffers(graph_module: fx.GraphModule) -> Iterator[None]:
    """Undoes what runs write to buffers: runs that are compared start alike."""
    written = [getattr(graph_module, name) for name in g.written_constants(graph_module.graph)]
    before = [tensor.clone() for tensor in written]
    try:
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(written, before, strict=True):
                tensor.copy_(value)


@contextlib.contextmanager
def explained(what: str = "a graph can't run on these inputs") -> Iterator[None]:
    """What an operation says to values or sizes that it can't take is an error of ours.

    Args:
        what: Can't be done then.

    Raises:
        InputError: In its place.
    """
    try:
        yield
    except ArmoptError:
        raise
    except Exception as error:
        said = f"{what}: {type(error).__name__}: {first_line(error)}"
        raise InputError(said, hint="Check the inputs, or make the bundle again") from error


def run(
    graph_module: fx.GraphModule, tensors: Sequence[torch.Tensor], interpreter: type[fx.Interpreter] = AsCaptured
) -> Sequence[Any]:
    """The flat outputs of a graph in FP32 that is FP32, from one seed; its buffers stay as they were."""
    return run_with(interpreter(graph_module), tensors)


def run_with(interpreter: fx.Interpreter, tensors: Sequence[torch.Tensor], *, times: int = 1) -> Sequence[Any]:
    """Runs an interpreter's graph as `run` does, `times` times; returns the flat outputs of the last call."""
    assert isinstance(interpreter.module, fx.GraphModule)
    with true_fp32(), seeded(), unchanged_buffers(interpreter.module), explained():
        for _ in range(times):
            outputs: Sequence[Any] = interpreter.run(*tensors)
        return outputs


def run_eager(
    eager: Callable[..., Sequence[Any]], tensors: Sequence[torch.Tensor], *, seed: int = SEED, times: int = 1
) -> Sequence[Any]:
    """The flat outputs of a model as its user calls it, in FP32 that is FP32; of several calls the last."""
    with true_fp32(), seeded(seed):
        return eager(tensors, times=times)


def name_outputs(outputs: nesting.Outputs, results: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The tensors among flat outputs, each by its path in what the model returns."""
    names = nesting.output_names(outputs, len(results))
    return {names[i]: plain(results[i]) for i in outputs.positions if isinstance(results[i], torch.Tensor)}


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """What a quantized or a sparse tensor stands for, to be compared; any other as it is."""
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


class Steps:
    """A run that stops where asked."""

    def __init__(self, interpreter: fx.Interpreter, tensors: Sequence[torch.Tensor]) -> None:
        self._interpreter = interpreter
        self._interpreter.args_iter = iter(tensors)
        self._interpreter.env = {}
        assert isinstance(interpreter.module, fx.GraphModule)
        self._nodes = iter(interpreter.module.graph.nodes)
        with seeded():
            self._random = torch.get_rng_state()

    def until(self, name: str) -> tuple[tuple[Any, ...], Any] | None:
        """Goes on to the node shown as `name`: its arguments and its value; None where there is no such node ahead."""
        with seeded():  # another run may go on in between, with random numbers of its own
            torch.set_rng_state(self._random)
            found = self._until(name)
            self._random = torch.get_rng_state()
            return found

    def _until(self, name: str) -> tuple[tuple[Any, ...], Any] | None:
        env, runner = self._interpreter.env, self._interpreter
        for node in self._nodes:
            args: tuple[Any, ...] = ()
            if g.shown_name(node) == name:
                args, _ = runner.fetch_args_kwargs_from_env(node)
            with explained():
                value = env[node] = runner.run_node(node)
            for dead in runner.user_to_last_uses.get(node, ()):
                del env[dead]
            if g.shown_name(node) == name:
                return args, value
        return None
