"""Binds a program to this host: each Linear and convolution gets the calls of a kernel that proved itself here."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from armopt.bundle.program import Program
from armopt.errors import first_line
from armopt.ir import arena
from armopt.ir import graph as g
from armopt.ir.bf16_flow import ATTENTION
from armopt.ir.calls import LayerCall, call_of, layers
from armopt.ir.records import Op, Site
from armopt.kernels import post_ops, sites, table
from armopt.kernels.base import Kernel, KernelCall, Use
from armopt.kernels.onednn.attention import Attention, Wanted
from armopt.kernels.onednn.attention_any_size import AnyAttention
from armopt.kernels.onednn.layer import Layer
from armopt.kernels.onednn.workspaces import Workspaces
from armopt.kernels.timings import Timings
from armopt.runtime import attend, between, blas, numbers, own, packings, probe, probe_cache
from armopt.runtime.python_calls import rebind

_aten = torch.ops.aten
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bound:
    """What one node runs on this host: the kernel planned, the kernel chosen, and why where they differ.

    `implementation` is oneDNN's name for what runs, where the kernel has a primitive of its own.
    """

    node: str
    planned: str
    kernel: str
    reason: str = ""
    implementation: str = ""


def _by_name(name: str, weight: torch.Tensor) -> Hashable:
    return name


def _as_it_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


@dataclass(slots=True)
class Binder:
    """Binds the programs of one bundle, which share packed weights and verdicts.

    Attributes:
        fast_math: Whether oneDNN multiplies FP32 in BF16 in this process (DNNL_DEFAULT_FPMATH_MODE).
        tuning: Times of this host, which decide among kernels on the same activations.
        verdicts: Refusals, or None, by :func:`armopt.runtime.probe_cache.key`; filled as probes run.
        remembered: Keys of the verdicts that an earlier process reached. Of refusals and of proofs the first that is
            asked for is probed again: where one is wrong all are forgotten, else the others of its kind are trusted.
        identify: What tells weights apart, from a weight and its name; by default its name in the bundle.
        packed: What is packed already, to be shared.
        bf16_attention: Whether attention works in BF16 where planned: it needs OpenBLAS's product.
        copy: Gives a stored weight in memory of its own, to be packed: no bound program reads what is stored.
    """

    fast_math: bool
    tuning: Timings | None = None
    verdicts: dict[str, str | None] = field(default_factory=dict)
    remembered: set[str] = field(default_factory=set)
    identify: Callable[[str, torch.Tensor], Hashable] = _by_name
    packed: packings.PackedWeights = field(default_factory=packings.nothing)
    bf16_attention: bool = True
    copy: Callable[[torch.Tensor], torch.Tensor] = _as_it_is
    _biases: dict[tuple[str, torch.dtype, float], torch.Tensor] = field(default_factory=dict)

    def bind(self, program: Program) -> tuple[fx.GraphModule, list[Bound]]:
        """A module of the kernels' own calls, and what each node got."""
        source = program.graph_module
        root = torch.nn.Module()
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(source.graph, mapping)
        graph.output(output)
        constants = dict(source.named_buffers(remove_duplicate=False))
        found = list(layers(source.graph))
        bound: dict[fx.Node, Bound] = {}
        calls = own.Calls(graph, Workspaces())
        owned: dict[fx.Node, int] = {}
        # the largest first: what packing and probing it takes meanwhile comes before the rest is in memory
        for old in sorted(found, key=lambda layer: -_work_space(program.sites[layer.name])):
            node = mapping[old]
            layer = _Layer(node, call_of(node), program.sites[old.name], program.shapes[old.name])
            kernel, proven, reasons = self._first_proven(layer, constants)
            answers = proven.implementation if isinstance(proven, Layer) else ""
            bound[old] = Bound(layer.site.node, layer.call.kernel, kernel.name, "; ".join(reasons), answers)
            if kernel.name != layer.call.kernel:
                _log.info(
                    "%s runs %s, planned %s: %s", layer.site.node, kernel.name, layer.call.kernel, bound[old].reason
                )
            bias = self._bias(layer, kernel, constants)
            weight: torch.Tensor | Layer | blas.Product = proven
            if isinstance(proven, torch.Tensor):
                is_given = layer.call.x.op == "placeholder"
                weight = blas.product(kernel, layer.site, proven, bias, layer.output, is_given=is_given) or proven
            if not isinstance(weight, torch.Tensor):
                owned[old] = len(owned)
            _replace(layer, kernel, weight, bias, constants, calls)
        owned |= self._attend(program, mapping, calls)
        between.pool_as_integers(source, mapping, program.shapes)
        if not self.bf16_attention:
            between.attend_in_fp32(source, mapping)
        if calls.workspaces.layers:
            owned |= calls.place_operations(source.graph, mapping, program.results if program.is_fixed else {}, owned)
        memory = arena.plan(source.graph, {old: calls.workspaces.layers[index].size for old, index in owned.items()})
        calls.finish(memory.size, {owned[old]: place for old, place in memory.places.items()})
        return finish(root, graph, constants), [bound[node] for node in found]

    def _first_proven(
        self, layer: _Layer, constants: dict[str, torch.Tensor]
    ) -> tuple[Kernel, torch.Tensor | Layer, list[str]]:
        """The first kernel that is available, takes the site and passes its probe; with its packed weight.

        Of a kernel the primitive of its own comes first, then PyTorch's call.
        """
        site, planned = layer.site, table.get(layer.call.kernel)
        times = self.tuning.of(site) if self.tuning is not None else {}
        quicker, fallbacks = alternatives(planned, times)
        reasons: list[str] = []
        for kernel in dict.fromkeys((*quicker, planned, *fallbacks)):
            weight: torch.Tensor | Layer | None = None
            reason = kernel.refuses(site)
            if reason is None:
                weight = self._own(kernel, layer, constants)
                if weight is None and (reason := self._unavailable(kernel)) is None:
                    weight, reason = self._prove(kernel, layer, constants)
                if weight is not None and reason is None:
                    if kernel in quicker:
                        reasons.append(f"tuned: {times[planned.name] / times[kernel.name]:.2f}x the speed")
                    return kernel, weight, reasons
            if kernel is planned or kernel.precision == planned.precision:
                reasons.append(f"{kernel.name}: {reason}")
        raise AssertionError("plain ATen takes every site")

    def _unavailable(self, kernel: Kernel) -> str | None:
        missing = kernel.fast_math and not self.fast_math
        return "DNNL_DEFAULT_FPMATH_MODE=BF16 was not set when oneDNN started" if missing else None

    def _own(self, kernel: Kernel, layer: _Layer, constants: dict[str, torch.Tensor]) -> Layer | None:
        """The layer as a primitive of its kernel's own, with right numbers; None where it can't be had."""
        if kernel.own is None or own.unavailable():
            return None
        for form in own.forms(kernel, layer.site):
            made = self._own_as(kernel, layer, constants, form)
            if made is not None:
                return made
        return None

    def _own_as(
        self, kernel: Kernel, layer: _Layer, constants: dict[str, torch.Tensor], form: own.Form
    ) -> Layer | None:
        """A layer's own primitive for one kernel, in a form."""
        site, stored = layer.site, constants[layer.site.weight_key]
        key = probe_cache.key(kernel.name, site, (int(form),))
        if self.verdicts.get(key) is not None and key not in self.remembered:
            return None
        bias = self._bias(layer, kernel, constants)
        facts = (self.identify(site.weight_key, stored), kernel.scale(site), kernel.rounding.weights)
        weight = functools.partial(self.copy, stored)
        made = own.make(kernel, site, weight, bias, lambda layout: self.packed[(layout, *facts)], form)
        if made is None:
            return None

        def probed() -> str | None:
            values = kernel.weight_values(weight(), site)
            return numbers.refusal(kernel, site, own.alone(made, site), values, bias, made.post_op)

        said = f"{kernel.name} as {made.implementation} for {site.node}"
        return made if self._judge(key, probed, said) is None else None

    def _attend(self, program: Program, mapping: Mapping[fx.Node, fx.Node], calls: own.Calls) -> dict[fx.Node, int]:
        """Gives attention to primitives of its own; gives back the index of each whose result has one size."""
        found: dict[fx.Node, int] = {}
        sizes: dict[Wanted, Attention | None] = {}
        first: int | None = None
        for old in g.calls_to(program.graph_module.graph, ATTENTION):
            attention = self._attention(old, program)
            if attention is None:
                continue
            if program.is_fixed:
                found[old] = calls.emit_attention(mapping[old], attention)
                continue
            first = len(calls.workspaces.layers) if first is None else first
            of_any = AnyAttention(attention, sizes, first, multiplies_bf16=self.bf16_attention)
            calls.emit_attention(mapping[old], of_any)
        return found

    def _attention(self, node: fx.Node, program: Program) -> Attention | None:
        """The attention of a node as primitives of its own, with right numbers; None where it can't be had."""
        planned = attend.planned(node, program)
        how = {"multiplies_bf16": self.bf16_attention, "of_any_size": not program.is_fixed}
        made = None if planned is None else attend.make(planned, **how)
        if planned is None or made is None:
            return None
        said = f"attention as {made.implementation} for {g.shown_name(node)}"
        refused = self._judge(planned.key, functools.partial(attend.refusal, planned, made), said)
        return made if refused is None else None

    def _judge(self, key: str, probe: Callable[[], str | None], said: str) -> str | None:
        """What a probe says, now or earlier."""
        if key not in self.verdicts or key in self.remembered:
            refusal = probe()
            self._compare(key, refusal)
            self.verdicts[key] = refusal
            _log.debug("%s: %s", said, refusal or "proven")
        return self.verdicts[key]

    def _prove(
        self, kernel: Kernel, layer: _Layer, constants: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, str | None]:
        """A packed weight with which the kernel passes its probe: one packed for another shape, or a new one."""
        site, stored = layer.site, constants[layer.site.weight_key]
        identity = self.identify(site.weight_key, stored)
        key = (kernel.name, identity, kernel.scale(site), site.stride, site.padding, site.dilation, site.groups)
        held = self.packed[key]
        for packed_for, weight in held:
            if self._verdict(kernel, layer, packed_for, weight, constants) is None:
                return weight, None
        own = probe_cache.key(kernel.name, site, site.shape)
        known = self.verdicts.get(own)
        if known is not None and own not in self.remembered:
            return stored, known
        try:
            weight = kernel.packed_weight(self.copy(stored), site)
        except RuntimeError as error:  # e.g. oneDNN on x86 packs BF16 with AVX-512 alone
            return stored, f"can't be packed here: {first_line(error)}"
        reason = self._verdict(kernel, layer, site.shape, weight, constants)
        if reason is None:
            held.append((site.shape, weight))
        return weight, reason

    def _verdict(
        self,
        kernel: Kernel,
        layer: _Layer,
        packed_for: tuple[int, ...],
        weight: torch.Tensor,
        constants: dict[str, torch.Tensor],
    ) -> str | None:
        """What the probe says, now or earlier, of a kernel with a weight that was packed for a shape."""
        key = probe_cache.key(kernel.name, layer.site, packed_for)

        def probed() -> str | None:
            run = single(kernel, layer.site, weight, self._bias(layer, kernel, constants))
            refusal = probe.refusal(kernel, layer.site, run)
            del run.graph_module.weight  # a graph is a cycle: a refused kernel's weight would stay in memory
            return refusal

        return self._judge(key, probed, f"probe of {kernel.name} for {layer.site.node}")

    def _compare(self, key: str, refusal: str | None) -> None:
        """Trusts what is remembered, or forgets it, after a probe of one of those verdicts."""
        if key not in self.remembered:
            return
        proven = self.verdicts[key] is None
        if proven == (refusal is None):
            self.remembered -= {each for each in self.remembered if (self.verdicts[each] is None) == proven}
            return
        _log.warning("forgot all that was remembered of kernels: %s", refusal or "what was refused is proven now")
        for each in self.remembered:
            del self.verdicts[each]
        self.remembered.clear()

    def _bias(self, layer: _Layer, kernel: Kernel, constants: dict[str, torch.Tensor]) -> torch.Tensor | None:
        if layer.call.bias is None:
            return None
        key = (str(layer.call.bias.target), kernel.activations, kernel.scale(layer.site))
        if key not in self._biases:
            self._biases[key] = kernel.packed_bias(self.copy(constants[key[0]]), layer.site)
        return self._biases[key]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A node to bind: its call, its site, and the shape of its result (None where dynamic)."""

    node: fx.Node
    call: LayerCall[fx.Node]
    site: Site
    output: Sequence[int | None]


def _work_space(site: Site) -> int:
    """Values that packing and probing a site holds for a while: the weight, the rows that it meets, and the result."""
    return math.prod(site.weight) + site.m * (site.k + site.n)


def alternatives(planned: Kernel, times: Mapping[str, float]) -> tuple[list[Kernel], list[Kernel]]:
    """What this host's times prefer to the planned kernel, the quickest first; and what to fall back to, in order."""
    others = [kernel for kernel in table.kernels(planned.op, Use.FALLBACK) if kernel is not planned]
    # the planned arithmetic first, then the planned dtype of activations, which needs no casts
    others.sort(key=lambda k: (k.precision != planned.precision, k.activations != planned.activations))
    # nothing that the plan has in FP32, and that was validated so, is rounded here
    allowed = [k for k in others if k.steps_out_of_bf16 >= planned.steps_out_of_bf16]
    quicker = [k for k in allowed if k.activations == planned.activations and _is_quicker(k, planned, times)]
    return sorted(quicker, key=lambda kernel: times[kernel.name]), allowed


def _is_quicker(kernel: Kernel, planned: Kernel, times: Mapping[str, float]) -> bool:
    """Whether this host's times speak for another kernel by more than their noise."""
    return kernel.name in times and planned.name in times and times[kernel.name] < 0.95 * times[planned.name]


@dataclass(frozen=True, slots=True)
class Single:
    """The calls of one kernel on one site, with inputs."""

    graph_module: fx.GraphModule
    inputs: Sequence[torch.Tensor]

    def __call__(self) -> Any:
        """Runs them."""
        return self.graph_module.forward(*self.inputs)


def single(kernel: Kernel, site: Site, weight: torch.Tensor | Layer, bias: torch.Tensor | None) -> Single:
    """The kernel's own calls for one site alone, on zeros.

    Args:
        kernel: The kernel.
        site: The site; its shape is that of the input.
        weight: Packed by the kernel, or the kernel's own primitive.
        bias: In the kernel's dtype; that of a primitive is part of it.
    """
    graph = fx.Graph()
    constants: dict[str, torch.Tensor] = {}
    x = graph.placeholder("x")
    inputs = [torch.zeros(site.shape, dtype=kernel.activations)]
    other = None
    if site.post_op in (post_ops.ADD, post_ops.ADD_RELU):
        other = graph.placeholder("other")
        inputs.append(torch.zeros(list(sites.result_shape(site)), dtype=kernel.activations))
    place = graph.call_function(_aten.alias.default, (x,))
    end = graph.output(place)
    call = functools.partial(KernelCall, kernel, site, place, x, other=other, shape=list(sites.result_shape(site)))
    if isinstance(weight, Layer):
        calls = own.Calls(graph, Workspaces())
        result = calls.emit(call(weight=None, bias=None), weight)
        calls.finish()
    else:
        weight_node = _attribute(constants, place, "weight", weight)
        bias_node = None if bias is None else _attribute(constants, place, "bias", bias)
        result = kernel.emit(call(weight=weight_node, bias=bias_node))
    end.args = (result,)
    graph.erase_node(place)
    # a convolution's neighbours hand it channels_last
    if site.op == Op.CONV:
        inputs = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs]
    return Single(finish(torch.nn.Module(), graph, constants), inputs)


def _replace(
    layer: _Layer,
    kernel: Kernel,
    weight: torch.Tensor | Layer | blas.Product,
    bias: torch.Tensor | None,
    constants: dict[str, torch.Tensor],
    calls: own.Calls,
) -> None:
    """Puts a kernel's calls in the place of an armopt node, with casts where its dtype is not the planned one's."""
    node, call = layer.node, layer.call
    planned = table.get(call.kernel)
    x, other = call.x, call.other
    if kernel.activations != planned.activations:
        x = between.cast(node, x, kernel.activations)
        other = None if other is None else between.cast(node, other, kernel.activations)
    if not isinstance(weight, torch.Tensor):
        emit = KernelCall(kernel, layer.site, node, x, None, None, other, layer.output)
        result = calls.emit(emit, weight) if isinstance(weight, Layer) else calls.emit_product(emit, weight)
    else:
        weight_node = _attribute(constants, node, f"{node.name}_packed", weight)
        bias_node = None if bias is None else _attribute(constants, node, f"{node.name}_bias", bias)
        shape = _dynamic_shape(node, x, layer.output)
        result = kernel.emit(KernelCall(kernel, layer.site, node, x, weight_node, bias_node, other, shape))
    if kernel.activations != planned.activations:
        result = between.cast(node, result, planned.activations)
    g.replace_and_erase(node, result)


def _dynamic_shape(node: fx.Node, x: fx.Node, output: Sequence[int | None]) -> list[Any]:
    """The output shape with -1 for one dynamic dimension; for more, the sizes are read from the input."""
    dynamic = [i for i, size in enumerate(output) if size is None]
    if len(dynamic) <= 1:
        return [-1 if size is None else size for size in output]
    graph = node.graph
    with graph.inserting_before(node):
        return [
            graph.call_function(_aten.sym_size.int, (x, i)) if size is None else size for i, size in enumerate(output)
        ]


def _attribute(constants: dict[str, torch.Tensor], before: fx.Node, name: str, value: torch.Tensor) -> fx.Node:
    constants[name] = value
    with before.graph.inserting_before(before):
        return before.graph.get_attr(name)


def finish(root: torch.nn.Module, graph: fx.Graph, constants: dict[str, torch.Tensor]) -> fx.GraphModule:
    """A module of the cheapest Python: bindings for operations, and constants as plain attributes, because
    nn.Module's lookup would cost on every call."""
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
        elif node.op == "call_function":
            rebind(node)
    module = fx.GraphModule(root, fx.Graph())
    for node in graph.nodes:
        if node.op == "get_attr":
            object.__setattr__(module, str(node.target), constants[str(node.target)])
    module.graph = graph
    return module
