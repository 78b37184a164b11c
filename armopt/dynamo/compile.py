"""`armopt.compile`: a model that runs armopt's kernels and otherwise stays the module it was."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch._dynamo import exc
from torch.utils._pytree import tree_leaves

from armopt import capture
from armopt.capture import submodules
from armopt.dynamo import backend, graphs
from armopt.dynamo.explain import Explanation, explain
from armopt.dynamo.process import PROCESS
from armopt.errors import ArmoptError, InputError
from armopt.ir.records import Target
from armopt.models import torchvision_ops
from armopt.plan.planner import Policy

_Model = TypeVar("_Model", bound=torch.nn.Module)

#: How deep parts may be called by others than the model's own forward: ``model.model.encoder`` in a generate loop.
_DEPTH = 2


class _Thread(threading.local):
    """Whether a model that falls back is running in this thread: then so do its parts."""

    plain = False


_thread = _Thread()


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

    The result is a module of the model's own class with the same parameters and buffers (not copies), and with its
    submodules and hooks by their names. In eval mode ``forward`` runs what Dynamo makes of it, under no_grad; where
    Python stands in the way (control flow on data, lists of images), it stays Python and the submodules are compiled,
    down to single layers. In training mode, or with an input that requires a gradient, it runs as the model does, after
    one warning. Weights that change are noticed at the next call.

    Args:
        model: With FP32 parameters.
        example_inputs: Positional inputs as a sequence, named ones as a mapping: compiles for them now, and leaves
            buffers as they are. Without them the first call compiles.
        target: A product's name, or ``host``. On a machine that is not the target its portable twins run.
        policy: How kernels are chosen, also as ``--policy`` has it.
        tuning: A file from ``armopt tune`` on this host.
        plans: The most plans for one graph; past them the nearest serves other shapes.
        release_original: Whether to free the FP32 weights that kernels multiply in BF16, here and in the model, as they
            are compiled. They read as NaN from then on, and training or saving them is an error.

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
    name = type(original).__name__
    capture.check_dtypes(original, name)
    options = {"target": target, "plans": plans, "policy": policy, "tuning": str(tuning or "")}
    backend.settings(options)
    torchvision_ops.ensure_torchvision_if_installed()
    made: _Model = _clone(original)
    parts: list[tuple[str, torch.nn.Module]] = [("", made), *_parts(made, _DEPTH)]
    for path, part in parts:
        if path and not submodules.has_layers(part):
            continue
        part.__dict__["forward"] = Forward(part, _own_forward(part), path, options, release_original)
    if release_original:
        made.register_state_dict_pre_hook(_refuse_released)  # type: ignore[no-untyped-call]
    if example_inputs is not None:
        kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
        args = () if kwargs else tuple(example_inputs)
        capture.check_signature(original, args, kwargs, name)
        with capture.eval_mode(made):
            capture.try_once(made, args, kwargs, name)
    return made


def _clone(model: _Model) -> _Model:
    """Another module with modules of its own and the same tensors."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _parts(module: torch.nn.Module, depth: int) -> Iterator[tuple[str, torch.nn.Module]]:
    """Submodules that are called as such, to a depth; lists and dictionaries of modules count as none."""
    if depth == 0:
        return
    for name, child in module.named_children():
        container = isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict))
        if not container:
            yield name, child
        for path, part in _parts(child, depth if container else depth - 1):
            yield f"{name}.{path}", part


def _own_forward(module: torch.nn.Module) -> Callable[..., Any]:
    """A module's forward, as if it had never been compiled."""
    own: Any = module.__dict__.get("forward")
    found: Callable[..., Any] = own.original if isinstance(own, Forward) else module.forward
    return found


class Forward:
    """The ``forward`` of a module that is compiled, or of a part of it.

    Attributes:
        original: The module's own.
        name: Of the part within the model; empty for the model itself.
        divided: Why it stays Python and its parts are compiled; empty where it is compiled whole.
        released: Whether FP32 weights were freed.
    """

    def __init__(
        self,
        owner: torch.nn.Module,
        original: Callable[..., Any],
        name: str,
        options: Mapping[str, Any],
        release_original: bool,
    ) -> None:
        self.owner = owner
        self.original = original
        self.name = name
        self.divided = ""
        self.released = False
        self._options = dict(options)
        self._release = release_original
        self._lock = threading.Lock()
        self._programs = 0
        self._compiled = self._compile(None)
        functools.update_wrapper(self, original)
        self.__signature__ = inspect.signature(original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module.

        Raises:
            InputError: Gradients or training are asked of a model whose weights are released.
        """
        if torch.compiler.is_compiling() or _thread.plain:  # as a part of what is compiled, or falls back, whole
            return self.original(*args, **kwargs)
        reason = self._refusal(args, kwargs)
        if reason is not None:
            if self.released:
                raise InputError(f"its FP32 weights were released, but {reason[0]}", where=self.title, hint=reason[1])
            PROCESS.warn_once(f"{self.title}: {reason[0]}, so PyTorch's own kernels run", reason[1])
            _thread.plain = True
            try:
                return self.original(*args, **kwargs)
            finally:
                _thread.plain = False
        with torch.no_grad():
            result = self._run(args, kwargs)
        if self._release:
            self._release_weights()
        return result

    def explain(self) -> Explanation:
        """What runs where, and the bytes it holds."""
        return explain(self.owner)

    @property
    def title(self) -> str:
        """Its name, for messages."""
        return self.name or type(self.owner).__name__

    def _refusal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, str] | None:
        if self.owner.training:
            return "the model is in training mode", "Call its eval() first"
        if torch.is_grad_enabled() and any(
            isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs))
        ):
            return "an input requires a gradient", "Detach it, or call the model under torch.no_grad()"
        return None

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.divided:
            try:
                return self._compiled(*args, **kwargs)
            except exc.FailOnRecompileLimitHit:
                return self._run_dynamic(args, kwargs)
            except exc.TorchDynamoException as error:  # raised before anything ran
                self._divide(error)
        return self.original(*args, **kwargs)

    def _run_dynamic(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """After too many kinds of shapes: one compilation for all sizes."""
        with self._lock:
            self._compiled = self._compile(True)
        try:
            return self._compiled(*args, **kwargs)
        except exc.TorchDynamoException as error:
            self._divide(error)
        return self.original(*args, **kwargs)

    def _compile(self, dynamic: bool | None) -> Callable[..., Any]:
        # released weights no longer look as when they were traced; graphs.Graph watches them itself
        options: Any = {"guard_filter_fn": _without_weights} if self._release else None
        lowering = backend.Lowering(backend.settings(self._options), self.title, self.name)
        made: Callable[..., Any] = torch.compile(
            _isolated(self.original), backend=lowering, options=options, fullgraph=True, dynamic=dynamic
        )
        return made

    def _divide(self, error: exc.TorchDynamoException) -> None:
        """From now on this module is Python, and its parts are compiled."""
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, ArmoptError):
            raise inner from error
        with self._lock:
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            for path, part in _parts(self.owner, 1):
                if submodules.has_layers(part) and not isinstance(part.forward, Forward):
                    name = f"{self.name}.{path}" if self.name else path
                    made = Forward(part, part.forward, name, self._options, self._release)
                    part.__dict__["forward"] = made
            self.divided = f"Python runs it, its parts are compiled: {first[:200]}"

    def _release_weights(self) -> None:
        """Frees what new programs made superfluous."""
        made = graphs.count()
        if made == self._programs:
            return
        with self._lock:
            self.released = bool(graphs.release(self.owner.parameters())) or self.released
            self._programs = made

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        self._check_unreleased()
        owner, original = copy.deepcopy(self.owner, memo), copy.deepcopy(self.original, memo)
        return Forward(owner, original, self.name, self._options, self._release)

    def __reduce__(self) -> Any:
        self._check_unreleased()
        return Forward, (self.owner, self.original, self.name, self._options, self._release)

    def _check_unreleased(self) -> None:
        if self.released:
            raise _released_error(self.title)


def _released_error(name: str) -> InputError:
    return InputError(
        "its FP32 weights were released, so they can't be copied or saved",
        where=name,
        hint="Copy or save the model before it is compiled with release_original=True",
    )


def _refuse_released(module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    if any(map(graphs.is_released, module.parameters())):
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
