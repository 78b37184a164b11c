"""``torch.compile(model, backend="armopt")``: Dynamo's graphs through the same passes, plan, kernels and probe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext
from torch.export import exported_program

from armopt import targets
from armopt.capture.widening import are_half, names_of, narrow_operation
from armopt.compiler.recipe import Recipe
from armopt.dynamo import programs
from armopt.dynamo.fast_path import DECOMPOSITIONS, leaves_padding
from armopt.dynamo.graphs import Graph
from armopt.dynamo.process import PROCESS
from armopt.errors import ArmoptError, InputError
from armopt.ir.records import Target
from armopt.models import torchvision_ops
from armopt.plan import policies

_aten = torch.ops.aten

#: What `options` may hold, and what it is.
OPTIONS: Mapping[str, str] = {
    "target": "a product of armopt targets, or host (the default)",
    "policy": "as armopt optimize --policy",
    "tuning": "a file from armopt tune",
    "plans": "the most plans for one graph, 8 by default",
    "keep_fp32": "patterns of layers that stay in FP32, as armopt optimize --keep-fp32",
}
#: Operations that training alone has.
_TRAINING = (
    *(_aten.native_dropout.default, _aten.bernoulli.default, _aten.bernoulli.p, _aten.rand_like.default),
    *(_aten._native_batch_norm_legit_functional.default, _aten.native_batch_norm.default),
)
#: What Dynamo's names of weights hold beside the names of modules.
_PLUMBING = ("_modules", "_parameters", "_buffers", "__self__")
#: Folders whose lines say nothing of where a graph comes from.
_LIBRARIES = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """A backend of ``torch.compile``, registered as ``armopt``.

    Args:
        graph_module: Dynamo's graph.
        example_inputs: Fake tensors and sizes, one for each of its inputs.
        options: See :data:`OPTIONS`.
        mode: Ignored but for the default: armopt has none.

    Returns:
        What runs the graph. Gradients and training run as PyTorch runs them, after one warning.

    Raises:
        InputError: When the result is called: an unknown option, or a wrong value of one.
    """
    try:
        chosen = settings(options, mode)
    except ArmoptError as error:
        return _raising(error)  # raised here, it would reach the caller wrapped into one of Dynamo's
    return Lowering(chosen)(graph_module, example_inputs)


@dataclass(frozen=True)
class Lowering:
    """What :func:`backend` does, with options that are checked already.

    Attributes:
        settings: How graphs are planned.
        title: Of the module whose graphs they are, for messages; without it its line in the source serves.
        prefix: What names of its weights begin with: its path in the model.
    """

    settings: programs.Settings
    title: str = ""
    prefix: str = ""

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Gives back what runs a graph."""
        if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs):
            PROCESS.warn_once(
                "gradients are recorded, so PyTorch's own kernels run",
                "Call the model under torch.no_grad() or torch.inference_mode()",
            )
            return graph_module.forward
        matrices = [t for t in (*example_inputs, *graph_module.parameters()) if isinstance(t, torch.nn.Parameter)]
        if all(matrix.dim() < 2 for matrix in matrices):
            return graph_module.forward  # nothing to multiply with
        half = are_half(matrices)
        prefix = f"{self.prefix}_" if self.prefix else ""
        names = [prefix + name for name in _names(graph_module)]
        where = self.title or _place(graph_module)

        def compile_inference(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            reason = _refusal(gm) or (_narrow(gm) if half else None)
            if reason is not None:
                PROCESS.warn_once(*reason)
                return _Boxed(gm.forward)
            return Graph(gm, self.settings, where, _weights(names, example_inputs), half=half)

        if not self.title:
            _say(graph_module, matrices if half else [], where)
        with _undecomposed():
            compiled = aot_module_simplified(
                graph_module,
                example_inputs,
                fw_compiler=compile_inference,
                inference_compiler=compile_inference,
                decompositions=dict(DECOMPOSITIONS),
                keep_inference_input_mutations=True,
            )
        disable: Any = torch._dynamo.disable
        running: Callable[..., Any] = disable(compiled, reason="armopt has compiled it")
        return running


def _say(graph_module: fx.GraphModule, half: Sequence[torch.Tensor], where: str) -> None:
    """What may surprise in the results of a graph, whose matrices in half precision are given."""
    if leaves_padding(graph_module.graph):
        PROCESS.warn_once(
            f"{where}: nn.TransformerEncoder gives values in padded rows, as under torch.compile with any backend. "
            "In eager mode, unless made with enable_nested_tensor=False, it gives zeros there",
            "armopt.compile gives what eager mode does",
        )
    if half:
        said = f"its weights are in {names_of(half)}, and kernels take them as float32, which changes no value"
        PROCESS.warn_once(f"{where}: {said}", "Results have the model's own dtypes", said)


def _weights(names: Sequence[str], inputs: Sequence[Any]) -> dict[int, str]:
    """Which inputs of AOTAutograd's graph are the model's own tensors, and their names."""
    context = TracingContext.try_get()
    lifted = len(context.params_flat or ()) if context else 0
    static = set(context.fw_metadata.static_input_indices or ()) if context and context.fw_metadata else set()
    if len(inputs) != lifted + len(names):  # inputs that share memory were merged: then positions mean nothing
        return {}
    return {
        i: names[i - lifted] if i >= lifted else f"constant{i}"
        for i, value in enumerate(inputs)
        if (i < lifted or i in static) and isinstance(value, torch.Tensor)
    }


def settings(options: Mapping[str, Any] | None = None, mode: str | None = None) -> programs.Settings:
    """Checks options and looks up what they name.

    Raises:
        InputError: An unknown option, or a wrong value of one.
    """
    given = dict(options or {})
    known = "; ".join(f"{name}: {meaning}" for name, meaning in OPTIONS.items())
    if unknown := [name for name in given if name not in OPTIONS]:
        raise InputError(f"unknown option {unknown[0]!r}", where="armopt", hint=f"Known are {known}")
    if mode not in (None, "default"):
        raise InputError(f"armopt has no mode {mode!r}", where="torch.compile", hint=f"Pass options instead. {known}")
    target, policy, tuning = given.get("target", "host"), given.get("policy"), given.get("tuning") or ""
    plans = given.get("plans", 8)
    if not isinstance(target, (str, Target)):
        raise InputError(f"target is a {type(target).__name__}", where="armopt", hint="Give a name or a Target")
    if isinstance(plans, bool) or not isinstance(plans, int) or plans < 1:
        raise InputError(f"plans is {plans!r}", where="armopt", hint="Give a whole number from 1")
    product = target if isinstance(target, Target) else targets.load(target)
    path = Path(tuning) if tuning else None
    recipe = Recipe(product, policies.find_policy(policy, product, path), keep_fp32=_patterns(given.get("keep_fp32")))
    return programs.Settings(recipe, plans, str(tuning))


def _patterns(given: Any) -> tuple[str, ...]:
    """Patterns of layers' names.

    Raises:
        InputError: They are something else.
    """
    if given is None:
        return ()
    if not isinstance(given, (list, tuple)) or not all(isinstance(each, str) for each in given):
        hint = 'Give patterns as a list: ["head", "layers.0.*"]'
        raise InputError(f"keep_fp32 is {given!r}", where="armopt", hint=hint)
    return tuple(given)


def _raising(error: ArmoptError) -> Callable[..., Any]:
    def fail(*args: Any) -> Any:
        raise error

    return fail


class _Boxed:
    """A function of tensors as AOTAutograd calls it: with a list."""

    _boxed_call = True

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, args: list[Any]) -> Any:
        inputs = list(args)
        args.clear()
        return self._function(*inputs)


def _refusal(flat: fx.GraphModule) -> tuple[str, str] | None:
    """Why a graph runs as PyTorch runs it, and what to do; None where it need not."""
    for node in flat.graph.nodes:
        if node.op == "call_function" and (node.target in _TRAINING or _is_training_norm(node)):
            return "the model is in training mode, so PyTorch's own kernels run", "Call model.eval() first"
        if node.op == "get_attr" and not isinstance(getattr(flat, str(node.target), None), torch.Tensor):
            return (
                "a graph with control flow inside (torch.cond, map, scan) runs with PyTorch's own kernels",
                "Use Python's if and for: then the parts between them are optimized",
            )
    return None


def _narrow(flat: fx.GraphModule) -> tuple[str, str] | None:
    """Why a graph in half precision has no form in FP32."""
    node = narrow_operation(flat.graph)
    if node is None:
        return None
    what = f"{node.target} is called in half precision and may mean something else in float32"
    return f"{what}, so PyTorch's own kernels run", "Give it the model in FP32: armopt rounds weights itself"


def _is_training_norm(node: fx.Node) -> bool:
    return node.target is _aten.batch_norm.default and node.args[5] is True


def _names(graph_module: fx.GraphModule) -> list[str]:
    """A name for each input, from where the model holds it: ``encoder_layers_0_weight``."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            source = getattr(node, "_dynamo_source", None)
            name = getattr(source, "name", "")
            text = name() if callable(name) else str(name)
            parts = re.findall(r"\['?([^\]']+)'?\]|\.(\w+)", text)
            kept = [a or b for a, b in parts if (a or b) not in _PLUMBING]
            found.append("_".join(kept[1:]) or str(node.target))
    return found


def _place(graph_module: fx.GraphModule) -> str:
    """Where a graph comes from: the first line of the user's Python in it."""
    for node in graph_module.graph.nodes:
        trace = node.meta.get("stack_trace") if node.op != "placeholder" else None
        lines = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', trace or "")
        if own := [line for line in lines if not line[0].startswith(_LIBRARIES)]:
            file, line, function = next((entry for entry in own if entry[2] == "forward"), own[0])
            return f"{Path(file).name}:{line} ({function})"
    return "a graph"


@cache
def _composite() -> Any:
    """The operations that torch.export keeps whole; so does this backend, so that passes meet one form."""
    found, _ = exported_program._split_decomp_table_to_cia_and_python_decomp({})
    return found


def _undecomposed() -> Any:
    torchvision_ops.ensure_torchvision_if_installed()
    return exported_program._override_composite_implicit_decomp(_composite())
