"""`armopt.compile`: a model that runs armopt's kernels and otherwise stays the module it was."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._dynamo import exc
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_leaves

from armopt import capture
from armopt.capture import submodules
from armopt.capture.calls import held_tensors
from armopt.capture.widening import in_fp32, is_half, say_if_half, widen_values
from armopt.compiler.checks import Checks
from armopt.dynamo import backend, graphs
from armopt.dynamo.checking import Outcome, Subject, check
from armopt.dynamo.explain import Explanation, explain
from armopt.dynamo.isolated import isolated, without_weights
from armopt.dynamo.process import PROCESS
from armopt.dynamo.programs import Settings
from armopt.errors import ArmoptError, InputError, first_line
from armopt.ir.records import Target
from armopt.models import padded_encoder, torchvision_ops
from armopt.plan import pinning
from armopt.plan.planner import Policy

_Model = TypeVar("_Model", bound=torch.nn.Module)

#: What Dynamo raises where it can't trace a forward: before anything of it ran.
_UNTRACED = (exc.TorchDynamoException, GuardOnDataDependentSymNode)

#: How deep parts may be called by others than the model's own forward: ``model.model.encoder`` in a generate loop.
_DEPTH = 2


class _Thread(threading.local):
    """What goes on in this thread.

    Attributes:
        plain: A model that falls back is running: then so do its parts.
        inside: A compiled model is running: its parts are not checked by themselves.
        checked: A model is being checked: no weights are released.
    """

    plain = False
    inside = False
    checked = False

    @contextlib.contextmanager
    def set(self, **flags: bool) -> Iterator[None]:
        """Sets flags for a while."""
        before = {name: getattr(self, name) for name in flags}
        self.__dict__.update(flags)
        try:
            yield
        finally:
            self.__dict__.update(before)


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
    checks: Checks | None = Checks(),
) -> _Model:
    """A model that runs armopt's kernels, for what can't be captured whole or is not to be deployed as a bundle.

    The result is a module of the model's own class with the same parameters and buffers (not copies), and with its
    submodules and hooks by their names. In eval mode ``forward`` runs what Dynamo makes of it, under no_grad; where
    Python stands in the way (control flow on data, lists of images), it stays Python and the submodules are compiled,
    down to single layers. In training mode, or with an input that requires a gradient, it runs as the model does, after
    one warning. Weights that change are noticed at the next call.

    Args:
        model: With parameters in FP32, or in BF16 and FP16: kernels take those as FP32, and it is compared with FP32.
        example_inputs: Positional inputs as a sequence, named ones as a mapping: compiles for them now, and leaves
            buffers as they are. Without them the first call compiles.
        checks: What has to hold on the example inputs, against the module itself: gated and repaired as `optimize`
            does; with ``Checks(first_call=True)`` on the inputs of the first call. None checks nothing.
        target: A product's name, or ``host``. On a machine that is not the target its portable twins run.
        policy: How kernels are chosen, also as ``--policy`` has it.
        tuning: A file from ``armopt tune`` on this host.
        plans: The most plans for one graph; past them the nearest serves other shapes.
        release_original: Whether to free the FP32 weights that kernels multiply in BF16, here and in the model, as they
            are compiled. They read as NaN from then on, and training or saving them is an error.

    Returns:
        The module. ``result.forward.explain()`` says what runs where, how many bytes it holds, and how it was judged.
        Where a gate fails after all, a warning says so.

    Raises:
        InputError: It is no module, a parameter is of another dtype, or an argument is unusable.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"expected an nn.Module, found a {type(model).__name__}",
            where="armopt.compile",
            hint="Pass the model; for a function use torch.compile(function, backend='armopt')",
        )
    original: Any = getattr(model, "_orig_mod", model)  # of torch.compile's wrapper
    name = type(original).__name__
    say_if_half(original, name)
    if not is_half(original):
        capture.check_dtypes(original, name)
    options: dict[str, Any] = {"target": target, "plans": plans, "policy": policy, "tuning": str(tuning or "")}
    checks = _usable(checks)
    options["keep_fp32"] = _pinned(original, checks)
    common = _Common(backend.settings(options), options, release_original, checks)
    torchvision_ops.ensure_torchvision_if_installed()
    made: _Model = _clone(original)
    padded_encoder.match_eager(made)
    parts: list[tuple[str, torch.nn.Module]] = [("", made), *_parts(made, _DEPTH)]
    for path, part in parts:
        if path and not submodules.has_layers(part):
            continue
        pending = checks is not None and checks.first_call and example_inputs is None
        part.__dict__["forward"] = Forward(part, _own_forward(part), path, common, pending=pending)
    if release_original:
        made.register_state_dict_pre_hook(_refuse_released)  # type: ignore[no-untyped-call]
    if example_inputs is not None:
        if isinstance(example_inputs, torch.Tensor):
            example_inputs = (example_inputs,)
        kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
        args = () if kwargs else tuple(example_inputs)
        capture.check_signature(original, args, kwargs, name)
        with capture.eval_mode(made):
            if checks is None:
                capture.try_once(made, args, kwargs, name)
            else:
                forward: Any = made.forward
                forward.check_now(args, kwargs)
    return made


def _usable(checks: Checks | None) -> Checks | None:
    """Refuses what only a bundle can be checked for.

    Raises:
        InputError: Naming the setting.
    """
    if checks is None:
        return None
    if checks.inputs is not None:
        what = "a compiled model is checked on its example inputs"
        raise InputError(what, where="checks.inputs", hint="Pass example_inputs")
    if checks.against != "model":
        what = "a compiled model has no capture to be compared with"
        raise InputError(what, where="checks.against", hint="Leave it out")
    checks.bounds()
    return checks


def _clone(model: _Model) -> _Model:
    """Another module with modules of its own and the same tensors, plain attributes of modules among them."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in held_tensors(model)}
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


def _pinned(model: torch.nn.Module, checks: Checks | None) -> tuple[str, ...]:
    """The patterns of layers that stay in FP32.

    Raises:
        InputError: One names no module with a matrix.
    """
    if checks is None:
        return ()
    pinning.check(checks.keep_fp32, {name.rpartition(".")[0] for name, x in model.named_parameters() if x.dim() > 1})
    return checks.keep_fp32


def _own_forward(module: torch.nn.Module) -> Callable[..., Any]:
    """A module's forward, as if it had never been compiled."""
    own: Any = module.__dict__.get("forward")
    found: Callable[..., Any] = own.original if isinstance(own, Forward) else module.forward
    return found


@dataclass(frozen=True)
class _Common:
    """What all parts of one compiled model share.

    Attributes:
        settings: How graphs are planned.
        options: The settings as the user gave them.
        release: Whether FP32 weights are freed as they are compiled.
        checks: What has to hold; None for nothing.
    """

    settings: Settings
    options: Mapping[str, Any]
    release: bool
    checks: Checks | None

    def again(self) -> _Common:
        """What the parts of a copy of the model share: its layers are not repaired yet."""
        return replace(self, settings=backend.settings(self.options))


class Forward:
    """The ``forward`` of a module that is compiled, or of a part of it.

    Attributes:
        original: The module's own.
        name: Of the part within the model; empty for the model itself.
        divided: Why it stays Python and its parts are compiled; empty where it is compiled whole.
        released: Whether FP32 weights were freed.
        outcome: What was measured of it against the module, and repaired; None where nothing was.
    """

    def __init__(
        self, owner: torch.nn.Module, original: Callable[..., Any], name: str, common: _Common, *, pending: bool
    ) -> None:
        self.owner = owner
        self.original = original
        self.name = name
        self.divided = ""
        self.released = False
        self.outcome: Outcome | None = None
        self._common = common
        self._pending = pending
        self._lock = threading.Lock()
        self._checking = threading.RLock()
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
            with _thread.set(plain=True):
                return self.original(*args, **kwargs)
        if self._pending and not _thread.inside:
            with self._checking:
                self._check(self.original, self._whole, args, kwargs)
        with torch.no_grad(), _thread.set(inside=True):
            result = self._run(args, kwargs)
        if self._common.release and not _thread.checked:
            self._release_weights()
        return result

    def _whole(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(args, kwargs)

    def check_now(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compares the whole module, hooks and all, with what PyTorch makes of it, and repairs what breaks a gate."""
        with _thread.set(checked=True, inside=True):
            capture.try_once(self.owner, args, kwargs, self.title)
        self._pending = True
        self._check(self.owner, self.owner, args, kwargs)
        if self._common.release:
            self._release_weights()

    def _check(
        self, original: Callable[..., Any], compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Judges it on one call, once."""
        checks = self._common.checks
        if not self._pending or checks is None:
            return
        self._pending = False
        reference = self._in_fp32(original) if is_half(self.owner) else original

        def plainly(*args: Any, **kwargs: Any) -> Any:
            with _thread.set(plain=True):
                return reference(*args, **kwargs)

        with _thread.set(checked=True, inside=True):
            self.outcome = check(Subject(self.owner, plainly, compiled, self.title), args, kwargs, checks)

    def _in_fp32(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The module in FP32 to compare with, whole, or its forward where that is what is called."""
        wide: Any = in_fp32(self.owner, self.title)
        if original is self.owner:
            return wide  # type: ignore[no-any-return]
        return lambda *args, **kwargs: wide.forward.original(*widen_values(args), **widen_values(kwargs))

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
            except _UNTRACED as error:
                self._divide(error)
        return self.original(*args, **kwargs)

    def _run_dynamic(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """After too many kinds of shapes: one compilation for all sizes."""
        with self._lock:
            self._compiled = self._compile(True)
        try:
            return self._compiled(*args, **kwargs)
        except _UNTRACED as error:
            self._divide(error)
        return self.original(*args, **kwargs)

    def _compile(self, dynamic: bool | None) -> Callable[..., Any]:
        # released weights no longer look as when they were traced; graphs.Graph watches them itself
        options: Any = {"guard_filter_fn": without_weights} if self._common.release else None
        lowering = backend.Lowering(self._common.settings, self.title, self.name)
        made: Callable[..., Any] = torch.compile(
            isolated(self.original), backend=lowering, options=options, fullgraph=True, dynamic=dynamic
        )
        return made

    def _divide(self, error: Exception) -> None:
        """From now on this module is Python, and its parts are compiled."""
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, ArmoptError):
            raise inner from error
        with self._lock:
            for path, part in _parts(self.owner, 1):
                if submodules.has_layers(part) and not isinstance(part.forward, Forward):
                    name = f"{self.name}.{path}" if self.name else path
                    made = Forward(part, part.forward, name, self._common, pending=False)
                    part.__dict__["forward"] = made
            self.divided = f"Python runs it, its parts are compiled: {first_line(error)}"

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
        return Forward(owner, original, self.name, self._common.again(), pending=self._is_checked)

    def __reduce__(self) -> Any:
        self._check_unreleased()
        common = self._common
        arguments = self.owner, self.original, self.name, common.options, common.release, common.checks
        return _again, (*arguments, self._is_checked)

    @property
    def _is_checked(self) -> bool:
        """Whether a copy has to be checked at its first call, as this one was or is to be."""
        return self._pending or self.outcome is not None

    def _check_unreleased(self) -> None:
        if self.released:
            raise _released_error(self.title)


def _again(
    owner: torch.nn.Module,
    original: Callable[..., Any],
    name: str,
    options: Mapping[str, Any],
    release: bool,
    checks: Checks | None,
    pending: bool,
) -> Forward:
    """A forward out of a pickle."""
    common = _Common(backend.settings(options), options, release, checks)
    return Forward(owner, original, name, common, pending=pending)


def _released_error(name: str) -> InputError:
    return InputError(
        "its FP32 weights were released, so they can't be copied or saved",
        where=name,
        hint="Copy or save the model before it is compiled with release_original=True",
    )


def _refuse_released(module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    if any(map(graphs.is_released, module.parameters())):
        raise _released_error(type(module).__name__)
