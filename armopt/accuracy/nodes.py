"""Per node: the error that its own rounding adds, the error carried along, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.accuracy.metrics import relative_error
from armopt.accuracy.runs import InFp32, Steps, true_fp32, unchanged_buffers
from armopt.bundle.program import Program
from armopt.errors import InputError
from armopt.ir import graph as g
from armopt.ir.calls import LayerCall, call_from, call_of, layers
from armopt.ir.records import Op, Precision
from armopt.kernels import table

#: Told how many nodes are done, of how many.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class NodeError:
    """What rounding does at one Linear or convolution. Errors are norms, relative to the node's FP32 result.

    Attributes:
        node: Its name.
        op: Its kind.
        kernel: What it is planned for.
        precision: Of that kernel.
        shape: Of its input.
        isolated: Error of the node alone, on FP32's inputs.
        cumulative: Error of its result in the program, with what came before.
        weights: Error of the node alone where only its weights are rounded.
        activations: Error of the node alone where only its input, its sum and its result are rounded.
    """

    node: str
    op: Op
    kernel: str
    precision: Precision
    shape: tuple[int, ...]
    isolated: float
    cumulative: float
    weights: float
    activations: float

    @property
    def comes_from(self) -> str:
        """The larger part of the isolated error: ``weights``, ``activations``, ``both`` (within 1.5x), or nothing."""
        if not self.isolated:
            return "-"
        if self.weights > 1.5 * self.activations:
            return "weights"
        return "activations" if self.activations > 1.5 * self.weights else "both"


def errors(
    program: Program,
    reference: fx.GraphModule | None,
    tensors: Sequence[torch.Tensor],
    progress: Progress = lambda done, total: None,
) -> list[NodeError]:
    """Runs a program's twins beside the prepared FP32 graph, layer by layer; in the order of the graph.

    Args:
        program: The lowered graph.
        reference: The prepared FP32 graph, whose layers have the same names, or a lowered one, which runs in FP32 with
            the weights that it holds; None for the program's own, which leaves the rounding of weights out.
        tensors: Inputs of both.
        progress: Told of each node.

    Raises:
        InputError: The two are not of one model.
    """
    planned = list(layers(program.graph_module.graph))
    exact = program.graph_module if reference is None else reference
    calls = [call_of(layer) for layer in layers(exact.graph)]
    lowered = any(call.kernel != table.plain(call.op).name for call in calls)
    runner = InFp32(exact) if lowered else fx.Interpreter(exact)
    found = []
    with true_fp32(), unchanged_buffers(exact), unchanged_buffers(program.graph_module):
        left, right = Steps(runner, tensors), Steps(fx.Interpreter(program.graph_module), tensors)
        for done, layer in enumerate(planned):
            progress(done, len(planned))
            name = g.shown_name(layer)
            wanted, carried = left.until(name), right.until(name)
            if wanted is None or carried is None:
                raise InputError(
                    f"has no layer {name}", where="the original", hint="Is the bundle made from this model?"
                )
            found.append(_compare(program, layer, wanted, carried))
    return found


def entries(errors: Sequence[NodeError]) -> list[dict[str, Any]]:
    """Nodes as reports have them, the worst alone first; an infinite error as null."""
    ranked = sorted(errors, key=lambda error: -error.isolated)
    return [
        {
            "node": error.node,
            "op": error.op,
            "kernel": error.kernel,
            "precision": error.precision,
            "shape": list(error.shape),
            "comes_from": error.comes_from,
            **{
                part: value if (value := getattr(error, part)) != float("inf") else None
                for part in ("isolated", "cumulative", "weights", "activations")
            },
        }
        for error in ranked
    ]


class OnlyThese(fx.Interpreter):
    """The FP32 graph with some layers as a program has them: what those alone do to the outputs."""

    def __init__(self, reference: fx.GraphModule, program: Program, names: Collection[str]) -> None:
        super().__init__(reference)
        self._program = program.graph_module
        shown = {g.shown_name(layer): layer for layer in layers(self._program.graph)}
        self._layers = {name: layer for name, layer in shown.items() if name in names}

    def run_node(self, n: fx.Node) -> Any:
        """The layer as planned where it is one of these, else as it is; results in FP32."""
        layer = self._layers.get(g.shown_name(n))
        if layer is None:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        planned = call_of(layer)
        return _run(planned, call_from(n.target, args), getattr(self._program, planned.weight_name)).float()


def _compare(
    program: Program, layer: fx.Node, wanted: tuple[tuple[Any, ...], Any], carried: tuple[tuple[Any, ...], Any]
) -> NodeError:
    (args, y), (planned_args, value) = wanted, carried
    exact, planned = call_from(layer.target, args), call_from(layer.target, planned_args)
    kernel, site = table.get(planned.kernel), program.sites[layer.name]
    stored = planned.weight
    plain = planned.replace(kernel=table.plain(planned.op).name, block=0)
    return NodeError(
        node=site.node,
        op=site.op,
        kernel=kernel.name,
        precision=kernel.precision,
        shape=site.shape,
        isolated=relative_error(y, _run(planned, exact, stored)),
        cumulative=relative_error(y, value),
        weights=relative_error(y, _run(plain, exact, stored.float())),
        activations=relative_error(y, _run(planned, exact, exact.weight)),
    )


def _run(planned: LayerCall[Any], exact: LayerCall[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """A planned layer on the tensors of the FP32 one and a weight."""
    dtype = table.get(planned.kernel).activations
    other = None if exact.other is None else exact.other.to(dtype)
    return planned.replace(x=exact.x.to(dtype), weight=weight, bias=exact.bias, other=other).run()
