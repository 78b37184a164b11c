"""Calls of a model: whether inputs fit its forward, how they nest, another batch size, a first run."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from armopt.capture.refusals import user_line
from armopt.errors import ArmoptError, CaptureError, InputError, first_line, printable
from armopt.ir import nesting
from armopt.ir.nesting import Inputs

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


def placeholders(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The placeholders, in order."""
    return (node for node in graph_module.graph.nodes if node.op == "placeholder")


def is_tensor(leaf: Any) -> bool:
    """Whether a leaf of nested values is a tensor."""
    return isinstance(leaf, torch.Tensor)


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """A model in eval mode, every part of it; afterwards as it was."""
    training = [part for part in model.modules() if getattr(part, "training", False)]  # frozen TorchScript has none
    if training:
        model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def check_signature(model: torch.nn.Module, args: Args, kwargs: Kwargs, source: str) -> tuple[Args, dict[str, Any]]:
    """The inputs, if forward takes them.

    Raises:
        InputError: It does not, or one has no values here.
    """
    for leaf in torch.utils._pytree.tree_leaves((args, dict(kwargs))):
        if type(leaf).__module__ == "numpy":
            what = f"an example input is a numpy.{type(leaf).__name__}, no tensor"
            raise InputError(what, where=source, hint="Convert it with torch.from_numpy() or torch.tensor()")
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = [name for name in signature.parameters if name not in ("args", "kwargs")]
        raise InputError(
            f"the inputs don't fit forward({', '.join(names)}): {error}",
            where=source,
            hint=f"Name them as forward does: {', '.join(names)}",
        ) from None
    for tensor in filter(is_tensor, torch.utils._pytree.tree_leaves((args, kwargs))):
        check_device(tensor, "an example input", source)
    return tuple(args), dict(kwargs)


def check_device(tensor: torch.Tensor, what: str, source: str) -> None:
    """Refuses a tensor that is elsewhere, or has no values at all.

    Raises:
        InputError: It is not on the CPU.
    """
    if tensor.device.type != "cpu":
        raise InputError(
            f"{what} is on the device {tensor.device}, the model works on the CPU",
            where=source,
            hint="Give tensors and a model with values on the CPU",
        )


def describe_inputs(
    args: Args, kwargs: Kwargs, names: Sequence[str] = (), defaults: Kwargs = MappingProxyType({})
) -> tuple[Inputs, list[torch.Tensor]]:
    """How the inputs of a call nest, and their tensors in order; `names` are those of the parameters.

    `defaults` are what parameters have that are not given.

    Raises:
        InputError: They hold something that a bundle can't describe.
    """
    return nesting.describe_inputs(args, kwargs, tuple(names), is_tensor, defaults)


def register_dataclasses(tree: Any) -> None:
    """Lets torch look into the dataclasses among nested values, as `torch.export.register_dataclass` does."""
    items: Any = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type) and not items:
        if type(tree) not in torch.utils._pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(tree))
        items = [getattr(tree, each.name) for each in dataclasses.fields(tree)]
    for item in items:
        register_dataclasses(item)


def try_once(model: torch.nn.Module, args: Args, kwargs: Kwargs, source: str) -> Any:
    """Runs the model, whose own error on unfit inputs says more than an export's.

    Buffers, and the random numbers to come, stay as they were.

    Returns:
        What it gives.

    Raises:
        InputError: The model fails.
    """
    try:
        with unchanged(model, attributes=False), torch.random.fork_rng(devices=[]):
            return model(*args, **kwargs)
    except ArmoptError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("torch._dynamo"):
            raise CaptureError(
                f"PyTorch can't trace its control flow on data (torch.cond, while_loop…): {first_line(error)}",
                where=source,
                hint='Use Python\'s if and for with kind="module", or armopt.compile',
            ) from error
        line = user_line(error)
        raise InputError(
            f"the model fails on the example inputs: {_said(model, error)}{f', at {line}' if line else ''}",
            where=source,
            hint="Check the names, shapes and dtypes of example_inputs (--input)",
        ) from error


def _said(model: torch.nn.Module, error: Exception) -> str:
    """What failed, in a line; TorchScript says where first."""
    if isinstance(model, torch.jit.ScriptModule) and (lines := str(error).strip().splitlines()):
        return printable(lines[-1])
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def unchanged(module: torch.nn.Module, *, attributes: bool = True) -> Iterator[Callable[[], bool]]:
    """Undoes what calls change of a module: values of buffers, and which attributes its parts have, but for `forward`.

    Args:
        module: What is called.
        attributes: Whether attributes that are no buffers count.

    Yields:
        Whether something is changed by now.
    """
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    held_by = [(part, dict(part.__dict__)) for part in parts] if attributes else []
    registered = [(part._buffers, dict(part._buffers)) for part in parts]
    values = [(buffer, buffer.clone()) for buffer in module.buffers() if _may_change(buffer)]

    def changed() -> bool:
        return (
            any(_other(part.__dict__, held) for part, held in held_by)
            or any(_other(now, held) for now, held in registered)
            or any(not _same(buffer, value) for buffer, value in values)
        )

    try:
        yield changed
    finally:
        for now, held in (*((part.__dict__, held) for part, held in held_by), *registered):
            if _other(now, held):
                forward = {name: now[name] for name in ("forward",) if name in now}
                now.clear()
                now.update(held | forward)
        with torch.no_grad():
            for buffer, value in values:
                if not _same(buffer, value):
                    buffer.copy_(value)


def held_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """All tensors that its modules hold: parameters, buffers and plain attributes."""
    held = torch.utils._pytree.tree_leaves([[*vars(module).values()] for module in model.modules()])
    return [each for each in held if isinstance(each, torch.Tensor)]


def _may_change(buffer: torch.Tensor) -> bool:
    """Whether a call may write into a buffer: not into an inference tensor, and layers don't into sparse ones."""
    return buffer.layout is torch.strided and not buffer.is_inference()


def _same(buffer: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a buffer holds what it held: batch norm in training mode writes without counting a version."""
    return bool(torch.equal(buffer, value))


def _other(now: dict[str, Any], held: dict[str, Any]) -> bool:
    return now.keys() != held.keys() or any(now[name] is not value for name, value in held.items())
