"""`armopt.compile`: a model that runs armopt's kernels and otherwise stays the module it was."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from armopt import capture, dynamo, jit, zoo
from armopt.errors import InputError
from armopt.explain import Explanation, explain
from armopt.ir import Target
from armopt.plan import Policy

_Model = TypeVar("_Model", bound=torch.nn.Module)


def compile(
    model: _Model,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    target: str | Target = "host",
    policy: Policy | str | None = None,
    tuning: str | Path | None = None,
    plans: int = 8,
    release_original: bool = False,
) -> _Model:
    """A model that runs armopt's kernels, for what can't be captured whole or is not to be deployed as a bundle.

    The result is a module of the model's own class. It shares parameters, buffers, submodules and hooks with the model,
    by their names; only ``forward`` is another, with the same signature. In eval mode it runs what Dynamo finds in
    ``forward`` through armopt, under no_grad. In training mode, or with an input that requires a gradient, it runs as
    the model does, after one warning. Weights that change are noticed at the next call.

    Args:
        model: With FP32 parameters.
        example_inputs: Positional inputs as a sequence, named ones as a mapping: compiles for them now, and leaves
            buffers as they are. Without them the first call compiles.
        target: A product's name, or ``host``. On a machine that is not the target its portable twins run.
        policy: How kernels are chosen, also as ``--policy`` has it.
        tuning: A file from ``armopt tune`` on this host.
        plans: The most plans for one graph; past them the nearest serves other shapes.
        release_original: Whether to free the FP32 weights that kernels multiply in BF16, here and in the model, after
            each compilation. They read as NaN from then on, and training or saving them is an error.

    Returns:
        The module. ``result.forward.explain()`` says what runs where, and how many bytes it holds.

    Raises:
        InputError: It is no module, its parameters are not FP32, or an argument is unusable.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"expected an nn.Module, found a {type(model).__name__}",
            where="armopt.compile",
            hint="Pass the model; for a function use torch.compile(function, backend='armopt')",
        )
    original: Any = getattr(model, "_orig_mod", model)  # of torch.compile's wrapper
    capture.check_dtypes(original, type(original).__name__)
    options = {"target": target, "plans": plans, "policy": policy, "tuning": str(tuning or "")}
    dynamo.settings(options)
    made = _sharing(original)
    made.__dict__["forward"] = Forward(made, _own_forward(original, made), options, release_original)
    if release_original:
        made.register_state_dict_pre_hook(_refuse_released)
    if example_inputs is not None:
        kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
        args = () if kwargs else tuple(example_inputs)
        capture.check_signature(original, args, kwargs, type(original).__name__)
        with capture.eval_mode(made):
            capture.try_once(made, args, kwargs, type(original).__name__)
    return made  # type: ignore[no-any-return]


def _sharing(model: Any) -> Any:
    """Another module of the same class with the same parameters, buffers, submodules and hooks."""
    cls: Any = type(model)
    made = cls.__new__(cls)
    made.__dict__.update(model.__dict__)
    return made


def _own_forward(model: torch.nn.Module, made: torch.nn.Module) -> Callable[..., Any]:
    """A model's forward, bound to the module made of it."""
    own: Any = model.__dict__.get("forward")
    if isinstance(own, Forward):
        own = own.original
    if own is None or getattr(own, "__self__", None) is model:
        return MethodType(type(model).forward if own is None else own.__func__, made)
    found: Callable[..., Any] = own
    return found


class Forward:
    """The ``forward`` of a compiled module.

    Attributes:
        original: The model's own.
        released: Whether FP32 weights were freed.
    """

    def __init__(
        self, owner: torch.nn.Module, original: Callable[..., Any], options: Mapping[str, Any], release_original: bool
    ) -> None:
        self.owner = owner
        self.original = original
        self.released = False
        self._options = dict(options)
        self._release = release_original
        self._lock = threading.Lock()
        self._programs = 0
        functools.update_wrapper(self, original)
        self.__signature__ = inspect.signature(original)
        passed = dict(options)
        if release_original:  # released weights no longer look as when they were traced; jit.Graph watches them itself
            passed["guard_filter_fn"] = _without_weights
        zoo.ensure_torchvision_if_installed()
        self._compiled = torch.compile(_isolated(original), backend=dynamo.backend, options=passed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model.

        Raises:
            InputError: Gradients or training are asked of a model whose weights are released.
        """
        reason = self._refusal(args, kwargs)
        if reason is not None:
            if self.released:
                raise InputError(f"its FP32 weights were released, but {reason[0]}", where=self._name, hint=reason[1])
            dynamo.fall_back(f"{self._name}: {reason[0]}, so PyTorch's own kernels run", reason[1])
            return self.original(*args, **kwargs)
        with torch.no_grad():
            result = self._compiled(*args, **kwargs)
        if self._release:
            self._release_weights()
        return result

    def explain(self) -> Explanation:
        """What runs where, and the bytes it holds."""
        return explain(self.owner)

    @property
    def _name(self) -> str:
        return type(self.owner).__name__

    def _refusal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, str] | None:
        if self.owner.training:
            return "the model is in training mode", "Call its eval() first"
        if torch.is_grad_enabled() and any(
            isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs))
        ):
            return "an input requires a gradient", "Detach it, or call the model under torch.no_grad()"
        return None

    def _release_weights(self) -> None:
        """Frees what new programs made superfluous."""
        made = jit.count()
        if made == self._programs:
            return
        with self._lock:
            self.released = bool(jit.release(self.owner.parameters())) or self.released
            self._programs = made

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        self._check_unreleased()
        owner, original = copy.deepcopy(self.owner, memo), copy.deepcopy(self.original, memo)
        return Forward(owner, original, self._options, self._release)

    def __reduce__(self) -> Any:
        self._check_unreleased()
        return Forward, (self.owner, self.original, self._options, self._release)

    def _check_unreleased(self) -> None:
        if self.released:
            raise _released_error(self._name)


def _released_error(name: str) -> InputError:
    return InputError(
        "its FP32 weights were released, so they can't be copied or saved",
        where=name,
        hint="Copy or save the model before it is compiled with release_original=True",
    )


def _refuse_released(module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    if any(map(jit.is_released, module.parameters())):
        raise _released_error(type(module).__name__)


def _without_weights(guards: Sequence[Any]) -> list[bool]:
    """The guards but for those of parameters."""
    return [not (guard.guard_type == "TENSOR_MATCH" and "_parameters" in guard.name) for guard in guards]


def _isolated(method: Any) -> Callable[..., Any]:
    """The same with a code object of its own.

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
