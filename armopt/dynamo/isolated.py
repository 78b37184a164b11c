"""What keeps one compiled module from another's, and from its own released weights, in Dynamo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any


def without_weights(guards: Sequence[Any]) -> list[bool]:
    """The guards but for those of parameters."""
    return [not (guard.guard_type == "TENSOR_MATCH" and "_parameters" in guard.name) for guard in guards]


def isolated(method: Any) -> Callable[..., Any]:
    """The same function or method with a code object of its own.

    Dynamo counts compilations for each code object and gives up at a limit: models of one class share it otherwise.
    """
    function = getattr(method, "__func__", None)
    if not isinstance(function, FunctionType) or function.__module__.startswith("torch."):

        def call(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs)

        return _with_own_code(call)
    return MethodType(_with_own_code(function), method.__self__)


def _with_own_code(function: Any) -> FunctionType:
    made = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__module__ = function.__module__
    return made
