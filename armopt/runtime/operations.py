"""PyTorch's operations that write their result to a place in the arena, or to where the caller wants it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.kernels.onednn.arguments import kept_in, lies_as
from armopt.kernels.onednn.workspaces import Workspace
from armopt.runtime.python_calls import BINDINGS

_aten = torch.ops.aten


@dataclass(slots=True)
class Result:
    """Where the result of an operation lies in one workspace.

    Attributes:
        place: Where it may lie; None where each call makes one.
        size: Bytes of it.
        kept: The result there: the same tensor for each call, as the first call's lay.
        lent: The result of this call, where its caller gave one that lies as results do.
        like: A result without memory; None before the first call.
        operands: How the operands of the first call lay.
    """

    place: torch.Tensor | None
    size: int
    kept: torch.Tensor | None = None
    lent: torch.Tensor | None = None
    like: torch.Tensor | None = None
    operands: Any = None

    @torch.inference_mode(False)  # as the memory of a workspace is
    def learn(self, y: torch.Tensor) -> None:
        """Takes from the first call's result how results lie."""
        if y.nbytes != self.size or y.untyped_storage().nbytes() != self.size:
            return
        self.like = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device="meta")
        if self.place is not None:
            self.kept = kept_in(self.place, self.like)

    def lend(self, y: torch.Tensor | None) -> None:
        """Takes what the next result is to be, where it is as that lies; None where the call makes one."""
        self.lent = y if y is not None and self.like is not None and lies_as(y, self.like) else None


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of an operation in a program whose sizes are fixed; see `workspaces.Call`.

    Attributes:
        target: The operation, called as it is the first time.
        writes: The same, with a tensor to write to in front.
        size: Bytes of its result.
        settled: Whether its operands lie as they did in every call, whatever callers give.
    """

    target: Callable[..., torch.Tensor]
    writes: Callable[..., torch.Tensor]
    size: int
    settled: bool

    @property
    def packed(self) -> tuple[torch.Tensor, ...]:
        """It holds no weight."""
        return ()

    def prepare(self, threads: int) -> int:
        """It needs no scratchpad."""
        return 0

    def arguments(self, threads: int, scratch: torch.Tensor, place: torch.Tensor | None) -> Result:
        """Where its result lies."""
        return Result(place, self.size)

    def function(self, index: int) -> Callable[..., torch.Tensor]:
        """A function of a workspace, in which its result is at `index`, and of the operation's arguments."""
        target, writes, settled = self.target, self.writes, self.settled

        def run(workspace: Workspace, *args: Any, **kwargs: Any) -> torch.Tensor:
            result: Result = workspace.arguments[index]
            y = result.kept if result.lent is None else result.lent
            if y is not None and (settled or _lie(args) == result.operands):
                return writes(y, *args, **kwargs)
            y = target(*args, **kwargs)
            if result.like is None:
                result.learn(y)
                result.operands = _lie(args)
            return y

        return run


def _lie(args: Sequence[Any]) -> list[Any]:
    """How the tensors among arguments lie, on which it depends how a result does."""
    return [
        each.stride() if isinstance(each, torch.Tensor) else _lie(each)
        for each in args
        if isinstance(each, (torch.Tensor, list, tuple))
    ]


def of(node: fx.Node, size: int, *, settled: bool = False) -> Operation | None:
    """The call of a node, with so many bytes of result; None where its operation can't write to a tensor."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if target is _aten.clone.default or (target is _aten._to_copy.default and set(node.kwargs) <= {"dtype"}):
        return Operation(BINDINGS.get(target, target), _copy, size, settled)
    out = _out(target)
    if out is None:
        return None
    call = BINDINGS.get(target)
    return Operation(call or target, _writing(call or out), size, settled)


def _copy(y: torch.Tensor, x: torch.Tensor, **how: Any) -> torch.Tensor:
    return y.copy_(x)


def _writing(call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def write(y: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return call(*args, out=y, **kwargs)

    return write


@functools.cache
def _out(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The overload that takes the same and a tensor to write to, where it doesn't make another and copy it."""
    if len(target._schema.returns) != 1 or target._schema.returns[0].alias_info is not None:
        return None
    names = [each.name for each in target._schema.arguments]
    for name in target.overloadpacket.overloads():
        other = getattr(target.overloadpacket, name)
        *taken, last = other._schema.arguments
        if last.is_out and [each.name for each in taken] == names and torch.Tag.generated not in other.tags:
            same = all(str(a.type) == str(b.type) for a, b in zip(taken, target._schema.arguments, strict=True))
            if same:
                return other  # type: ignore[no-any-return]
    return None
