"""Whether a capture is the model: both in FP32, on the same inputs, tightly; and if not, where and why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.accuracy import runs
from armopt.accuracy.metrics import is_discrete, real_values
from armopt.accuracy.tasks import Outputs
from armopt.capture import eval_mode
from armopt.capture.eager import Eager
from armopt.ir import graph as g
from armopt.ir.records import Captured

#: How far two ways to add in FP32 may part, relative to the spread of the values: 2^-24 for each of many steps.
_SPREAD = 1e-4
#: How far they may part relative to the values' size, where all values have much in common: some sixteen roundings.
_SIZE = 2.0**-20
#: Of single values: the tail is longer.
_TAIL = 16.0
#: How many times FP32's own error, seen against FP64, the difference of two runs in FP32 may be.
_OWN = 16.0


@dataclass(frozen=True, slots=True)
class Difference:
    """An output in which a capture is not the model.

    Attributes:
        output: Its name.
        what: How far off it is, in words.
        layer: The first module whose result differs, and its class; empty where that is not known.
        reason: The likely one.
    """

    output: str
    what: str
    layer: str
    reason: str

    def __str__(self) -> str:
        first = f", first in {self.layer}" if self.layer else ""
        return f"the capture is not the model: output {self.output} {self.what}{first}. Likely reason: {self.reason}"


def compare(reference: Outputs, captured: Outputs, exact: Outputs | None = None) -> tuple[str, str] | None:
    """The first output in which a capture differs from the model by more than FP32's own rounding.

    Args:
        reference: What the model gives.
        captured: What its capture gives, both in FP32.
        exact: What the capture gives in FP64, if it can: what is that far from FP32 may differ.

    Returns:
        Its name, and how far off it is, in words; None where all agree.
    """
    if reference.keys() != captured.keys():
        return ", ".join(reference.keys() ^ captured.keys()), "is not in both"
    for name, a in reference.items():
        what = _difference(a, captured[name], None if exact is None else exact.get(name))
        if what:
            return name, what
    return None


def _difference(a: torch.Tensor, b: torch.Tensor, exact: torch.Tensor | None) -> str:
    """How far off `b` is, in words; empty where it is FP32's own rounding."""
    if a.shape != b.shape:
        return f"has shape {list(b.shape)} instead of {list(a.shape)}"
    if a.dtype != b.dtype:
        return f"is {b.dtype} instead of {a.dtype}".replace("torch.", "")
    if exact is not None and exact.shape != a.shape:
        exact = None
    if is_discrete(a):
        wrong, unsure = int((a != b).sum()), 0 if exact is None else int((b != exact).sum())
        return f"differs in {wrong} of {a.numel()} values" if wrong > 2 * unsure else ""
    left, right = real_values(a), real_values(b)
    finite = torch.isfinite(left) & torch.isfinite(right)
    if bool((~finite & (left != right) & ~(left.isnan() & right.isnan())).any()):
        return "has values that are not finite elsewhere"
    rounding = max(_SIZE, 4 * torch.finfo(a.dtype).eps)
    return _noise(left[finite], right[finite], None if exact is None else real_values(exact)[finite], rounding)


def _noise(a: torch.Tensor, b: torch.Tensor, exact: torch.Tensor | None, rounding: float) -> str:
    """How finite values differ, given flat and in FP64; `rounding` is relative to their size."""
    if not a.numel():
        return ""
    noise, spread = a - b, a - a.mean()
    own = torch.zeros_like(noise) if exact is None else b - exact
    allowed = max(_SPREAD * float(spread.norm()) + rounding * float(a.norm()), _OWN * float(own.norm()))
    tail = _TAIL * (_SPREAD * float(spread.abs().max()) + rounding * float(a.abs().max()))
    most = max(tail, _OWN * float(own.abs().max()))
    if float(noise.norm()) <= allowed and float(noise.abs().max()) <= most:
        return ""
    size = float(a.norm())
    return f"differs by {float(noise.norm()) / size:.2g} of its size" if size else "differs where the model gives zeros"


class Fidelity:
    """Compares one capture with its model, and finds out why they differ: by asking the model in another way again."""

    def __init__(self, eager: Eager, captured: Captured) -> None:
        self._eager, self._graph_module, self._outputs = eager, captured.graph_module, captured.outputs
        self._order = [spec.name for spec in captured.input_specs]

    def check(self, inputs: Outputs, reference: Outputs, exact: Outputs | None) -> Difference | None:
        """The first difference on these inputs, of this call or of the next one; None where there is none.

        Args:
            inputs: By name.
            reference: What the model gives.
            exact: What the capture gives in FP64, if it can.
        """
        tensors = [inputs[name] for name in self._order]
        captured = self._capture(tensors)
        found = compare(reference, captured, exact)
        if found is not None:
            return Difference(*found, *self._explain(tensors, captured))
        with runs.seeded():
            keeps_state = self._eager.keeps_state(tensors)
        if not keeps_state and not g.written_constants(self._graph_module.graph):
            return None
        found = compare(self._model(tensors, times=2), self._capture(tensors, times=2))
        if found is None:
            return None
        reason = "state that a call leaves in Python's attributes or in buffers, and the next one reads"
        return Difference(found[0], f"{found[1]} at the second call", "", reason)

    def _model(self, tensors: Sequence[torch.Tensor], *, seed: int = runs.SEED, times: int = 1) -> Outputs:
        return runs.name_outputs(self._outputs, runs.run_eager(self._eager, tensors, seed=seed, times=times))

    def _capture(self, tensors: Sequence[torch.Tensor], *, times: int = 1) -> Outputs:
        return runs.name_outputs(
            self._outputs, runs.run_with(runs.AsCaptured(self._graph_module), tensors, times=times)
        )

    def _explain(self, tensors: Sequence[torch.Tensor], captured: Outputs) -> tuple[str, str]:
        """The first layer that differs, and the likely reason."""
        layer = _first_layer(self._eager, self._graph_module, tensors)
        module = self._eager.module
        for reason, suspect in suspects(module):
            with suspect:
                if compare(self._model(tensors), captured) is None:
                    return layer, reason
        with contextlib.ExitStack() as stack:
            together = [(reason, stack.enter_context(suspect)) for reason, suspect in suspects(module)]
            if compare(self._model(tensors), captured) is None:
                return layer, "; and ".join(reason for reason, _ in together)
        return layer, self._other_reason(tensors)

    def _other_reason(self, tensors: Sequence[torch.Tensor]) -> str:
        if compare(self._model(tensors), self._model(tensors, seed=runs.SEED + 1)) is not None:
            drawn = runs.random_nodes(self._graph_module)
            return f"random numbers, which the model draws in another way than {', '.join(drawn) or 'any node'}"
        if compare(self._model(tensors), self._model(tensors, times=2)) is not None:
            return "state that a call leaves in Python's attributes or in buffers, and the next one reads"
        return (
            "Python that decides on data or on state outside of tensors: torch.export took one way, and its constants"
        )


def suspects(module: torch.nn.Module) -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
    """What makes a module run otherwise than torch.export sees it, each with what takes it away."""
    yield (
        "PyTorch's fast path of TransformerEncoder and MultiheadAttention, which captures do not take "
        "(torch.backends.mha.set_fastpath_enabled(False) makes the model do without)",
        _without_fast_path(),
    )
    yield "a branch on torch.compiler.is_compiling() or is_exporting()", _as_if_exporting()
    modes = [name for name, part in module.named_modules() if name and part.training] if not module.training else []
    if modes:
        yield f"{modes[0]} is in training mode, and a capture is in eval mode", _in_eval_mode(module)


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _as_if_exporting() -> Iterator[None]:
    flags: Any = torch.compiler
    before = flags._is_compiling_flag, flags._is_exporting_flag
    flags._is_compiling_flag = flags._is_exporting_flag = True
    try:
        yield
    finally:
        flags._is_compiling_flag, flags._is_exporting_flag = before


@contextlib.contextmanager
def _in_eval_mode(module: torch.nn.Module) -> Iterator[None]:
    with eval_mode(module):
        yield


def _first_layer(eager: Eager, graph_module: fx.GraphModule, tensors: Sequence[torch.Tensor]) -> str:
    """The first module to finish whose result is in none of the nodes that the capture has of it."""
    seen = _results(eager, tensors)
    watch = _Watch(graph_module, {path: y for path, y in seen.items() if y is not None})
    runs.run_with(watch, tensors)
    types = {path: type(module).__name__ for path, module in eager.module.named_modules()}
    differing = [path for path in watch.wanted if path in watch.unmatched - watch.matched]
    never_called = [path for path in watch.called if path not in seen and path in types]
    first = next(iter(differing or never_called), "")
    return f"{first} ({types[first]})" if first else ""


def _results(eager: Eager, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """The first tensor that each module gives, in the order in which they finish; None where it is called again."""
    seen: dict[str, torch.Tensor | None] = {}

    def note(path: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, result: Any) -> None:
            first = next(iter(torch.utils._pytree.tree_leaves(result)), None)
            known = path in seen or not isinstance(first, torch.Tensor) or first.is_nested
            seen[path] = None if known or first is None else first.clone()

        return hook

    parts = [(path, part) for path, part in eager.module.named_modules() if path]
    hooked = [(path, part) for path, part in parts if not isinstance(part, torch.jit.ScriptModule)]
    handles = [part.register_forward_hook(note(path)) for path, part in hooked]
    try:
        runs.run_eager(eager, tensors)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _Watch(runs.AsCaptured):
    """Runs a capture and looks for the results of the model's modules among its values."""

    def __init__(self, graph_module: fx.GraphModule, wanted: dict[str, torch.Tensor]) -> None:
        super().__init__(graph_module)
        self.wanted = wanted
        self.matched: set[str] = set()
        self.unmatched: set[str] = set()
        self.called: dict[str, None] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Compares a node's value with the results of the modules that it is in."""
        value = super().run_node(n)
        stack = n.meta.get("nn_module_stack") or {}
        for path, *_ in stack.values():
            self.called.setdefault(path)
            y = self.wanted.get(path)
            if y is None or not isinstance(value, torch.Tensor) or value.shape != y.shape or path in self.matched:
                continue
            same = value.dtype == y.dtype and not _difference(y, value, None)
            (self.matched if same else self.unmatched).add(path)
        return value
