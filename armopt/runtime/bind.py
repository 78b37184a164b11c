"""Binds a program to this host: each Linear and convolution gets the calls of a kernel that proved itself here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from armopt.bundle.program import Program
from armopt.errors import first_line
from armopt.ir import graph as g
from armopt.ir.bf16_flow import ATTENTION, OPERANDS, origin
from armopt.ir.records import Site
from armopt.kernels import max_pool, post_ops, sites, table
from armopt.kernels.base import Call, Kernel
from armopt.kernels.geometry import output_size
from armopt.kernels.ops import KERNEL, POST_OP
from armopt.kernels.timings import Timings
from armopt.runtime import probe, probe_cache
from armopt.runtime.python_calls import rebind

_aten = torch.ops.aten

#: What to try, in order, when a planned kernel can't be had; plain ATen always can.
FALLBACKS = {
    "linear": ("conv1x1_bf16", "conv1x1_fastmath", "blas_fp32_w16", "blas_fp32", "aten_linear"),
    "conv": ("conv_bf16", "conv_fastmath", "conv_fp32", "conv_merged_fp32", "conv_transpose_fp32", "aten_conv"),
}


@dataclass(frozen=True, slots=True)
class Bound:
    """What one node runs on this host: the kernel planned, the kernel chosen, and why where they differ."""

    node: str
    planned: str
    kernel: str
    reason: str = ""


class Packings(Protocol):
    """One weight packed by one kernel: pairs of the shape that it was packed for and the packed tensor."""

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]: ...

    def append(self, entry: tuple[tuple[int, ...], torch.Tensor], /) -> None:
        """Adds one more."""


class PackedWeights(Protocol):
    """Packed weights by kernel, weight and geometry; what is not there yet is an empty list."""

    def __getitem__(self, key: tuple[Any, ...], /) -> Packings: ...


def _by_name(name: str, weight: torch.Tensor) -> Hashable:
    return name


def _nothing_packed() -> PackedWeights:
    found: defaultdict[tuple[Any, ...], list[tuple[tuple[int, ...], torch.Tensor]]] = defaultdict(list)
    return found


def _keep(weight: torch.Tensor) -> None:
    pass


@dataclass(slots=True)
class Binder:
    """Binds the programs of one bundle, which share packed weights and verdicts.

    Attributes:
        fast_math: Whether oneDNN multiplies FP32 in BF16 in this process (DNNL_DEFAULT_FPMATH_MODE).
        tuning: Times of this host, which decide among kernels on the same activations.
        verdicts: Refusals, or None, by :func:`armopt.runtime.probe_cache.key`; filled as probes run.
        identify: What tells weights apart, from a weight and its name; by default its name in the bundle.
        packed: What is packed already, to be shared.
        bf16_attention: Whether attention works in BF16 where planned: it needs OpenBLAS's product.
        release: Is told each stored weight once it is packed: no bound program reads it.
    """

    fast_math: bool
    tuning: Timings | None = None
    verdicts: dict[str, str | None] = field(default_factory=dict)
    identify: Callable[[str, torch.Tensor], Hashable] = _by_name
    packed: PackedWeights = field(default_factory=_nothing_packed)
    bf16_attention: bool = True
    release: Callable[[torch.Tensor], None] = _keep
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
        layers = list(sites.layers(source.graph))
        bound: dict[fx.Node, Bound] = {}
        # the largest first: what packing and probing it takes meanwhile comes before the rest is in memory
        for old in sorted(layers, key=lambda layer: -_work_space(program.sites[layer.name])):
            node = mapping[old]
            site = program.sites[old.name]
            planned = table.get(str(node.args[KERNEL[node.target]]))
            kernel, weight, reasons = self._first_proven(site, planned, node, constants)
            bound[old] = Bound(site.node, planned.name, kernel.name, "; ".join(reasons))
            _replace(
                graph,
                constants,
                node,
                kernel,
                weight,
                self._bias(node, kernel, site, constants),
                program.shapes[old.name],
                site,
            )
        _pool_as_integers(source, mapping, program.shapes)
        if not self.bf16_attention:
            _attend_in_fp32(source, mapping)
        return finish(root, graph, constants), [bound[node] for node in layers]

    def _first_proven(
        self, site: Site, planned: Kernel, node: fx.Node, constants: dict[str, torch.Tensor]
    ) -> tuple[Kernel, torch.Tensor, list[str]]:
        """The first kernel that is available, takes the site and passes its probe; with its packed weight."""
        reasons: list[str] = []
        others = [table.get(name) for name in FALLBACKS[site.op] if name != planned.name]
        # the planned arithmetic first, then the planned dtype of activations, which needs no casts
        others.sort(key=lambda k: (k.precision != planned.precision, k.activations != planned.activations))
        # a node planned in FP32 stays in FP32
        allowed = [k for k in others if planned.precision != "fp32" or k.precision == "fp32"]
        stored = constants[site.weight_key]
        times = self.tuning.of(site) if self.tuning is not None else {}
        quicker = [k for k in allowed if k.activations == planned.activations and _is_quicker(k, planned, times)]
        quicker.sort(key=lambda kernel: times[kernel.name])
        for kernel in dict.fromkeys((*quicker, planned, *allowed)):
            reason: str | None = None
            if kernel.fast_math and not self.fast_math:
                reason = "DNNL_DEFAULT_FPMATH_MODE=BF16 was not set when oneDNN started"
            reason = reason or kernel.refuses(site)
            if reason is None:
                weight, reason = self._prove(kernel, site, node, stored, constants)
                if reason is None:
                    if kernel in quicker:
                        reasons.append(f"tuned: {times[planned.name] / times[kernel.name]:.2f}x the speed")
                    return kernel, weight, reasons
            if kernel is planned or kernel.precision == planned.precision:
                reasons.append(f"{kernel.name}: {reason}")
        raise AssertionError("plain ATen takes every site")

    def _prove(
        self, kernel: Kernel, site: Site, node: fx.Node, stored: torch.Tensor, constants: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, str | None]:
        """A packed weight with which the kernel passes its probe: one packed for another shape, or a new one."""
        identity = self.identify(site.weight_key, stored)
        key = (kernel.name, identity, kernel.scale(site), site.stride, site.padding, site.dilation, site.groups)
        held = self.packed[key]
        for packed_for, weight in held:
            if self._verdict(kernel, site, packed_for, node, weight, constants) is None:
                return weight, None
        known = self.verdicts.get(probe_cache.key(kernel.name, site, site.shape))
        if known is not None:
            return stored, known
        try:
            weight = kernel.packed_weight(stored, site)
        except RuntimeError as error:  # e.g. oneDNN on x86 packs BF16 with AVX-512 alone
            return stored, f"can't be packed here: {first_line(error)}"
        self.release(stored)
        reason = self._verdict(kernel, site, site.shape, node, weight, constants)
        if reason is None:
            held.append((site.shape, weight))
        return weight, reason

    def _verdict(
        self,
        kernel: Kernel,
        site: Site,
        packed_for: tuple[int, ...],
        node: fx.Node,
        weight: torch.Tensor,
        constants: dict[str, torch.Tensor],
    ) -> str | None:
        """What the probe says, now or earlier, of a kernel with a weight that was packed for a shape."""
        key = probe_cache.key(kernel.name, site, packed_for)
        if key not in self.verdicts:
            run = single(kernel, site, weight, self._bias(node, kernel, site, constants))
            self.verdicts[key] = probe.refusal(kernel, site, run)
            del run.graph_module.weight  # a graph is a cycle: a refused kernel's weight would stay in memory
        return self.verdicts[key]

    def _bias(
        self, node: fx.Node, kernel: Kernel, site: Site, constants: dict[str, torch.Tensor]
    ) -> torch.Tensor | None:
        bias = node.args[2]
        if not isinstance(bias, fx.Node):
            return None
        key = (str(bias.target), kernel.activations, kernel.scale(site))
        if key not in self._biases:
            self._biases[key] = kernel.packed_bias(constants[key[0]], site)
        return self._biases[key]


def _work_space(site: Site) -> int:
    """Values that packing and probing a site holds for a while: the weight, the rows that it meets, and the result."""
    return math.prod(site.weight) + site.m * (site.k + site.n)


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


def single(kernel: Kernel, site: Site, weight: torch.Tensor, bias: torch.Tensor | None) -> Single:
    """The kernel's own calls for one site alone, on zeros.

    Args:
        kernel: The kernel.
        site: The site; its shape is that of the input.
        weight: Packed by the kernel.
        bias: In the kernel's dtype.
    """
    graph = fx.Graph()
    constants = {"weight": weight}
    x = graph.placeholder("x")
    inputs = [torch.zeros(site.shape, dtype=kernel.activations)]
    other = None
    if site.post_op in (post_ops.ADD, post_ops.ADD_RELU):
        other = graph.placeholder("other")
        inputs.append(torch.zeros(_output_shape(site), dtype=kernel.activations))
    weight_node = graph.get_attr("weight")
    bias_node = None
    if bias is not None:
        constants["bias"] = bias
        bias_node = graph.get_attr("bias")
    place = graph.call_function(_aten.alias.default, (x,))
    graph.output(
        kernel.emit(
            Call(place, x, weight_node, bias_node, other, site.post_op, _output_shape(site), site, kernel.activations)
        )
    )
    graph.erase_node(place)
    # a convolution's neighbours hand it channels_last
    if site.op == "conv":
        inputs = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs]
    return Single(finish(torch.nn.Module(), graph, constants), inputs)


def _output_shape(site: Site) -> list[int]:
    if site.op == "linear":
        return [*site.shape[:-1], site.n]
    spatial = output_size(
        site.shape[2:],
        site.weight[2:],
        site.stride,
        site.padding,
        site.dilation,
        site.transposed,
        site.output_padding,
    )
    return [site.shape[0], site.n, *spatial]


def _replace(
    graph: fx.Graph,
    constants: dict[str, torch.Tensor],
    node: fx.Node,
    kernel: Kernel,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: Sequence[int | None],
    site: Site,
) -> None:
    """Puts a kernel's calls in the place of an armopt node, with casts where its dtype is not the planned one's."""
    planned = table.get(str(node.args[KERNEL[node.target]]))
    x, other = node.args[0], node.args[3]
    assert isinstance(x, fx.Node)
    if kernel.activations != planned.activations:
        x = _cast(graph, node, x, kernel.activations)
        other = _cast(graph, node, other, kernel.activations) if isinstance(other, fx.Node) else None
    weight_node = _attribute(graph, constants, node, f"{node.name}_packed", weight)
    bias_node = None if bias is None else _attribute(graph, constants, node, f"{node.name}_bias", bias)
    shape = _dynamic_shape(graph, node, x, output)
    call = Call(node, x, weight_node, bias_node, other, site.post_op, shape, site, kernel.activations)  # type: ignore[arg-type]
    result = kernel.emit(call)
    if kernel.activations != planned.activations:
        result = _cast(graph, node, result, planned.activations)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _pool_as_integers(
    source: fx.GraphModule, mapping: Mapping[fx.Node, fx.Node], shapes: Mapping[str, Sequence[int | None]]
) -> None:
    """Max pools right behind a layer in BF16 that gives nothing negative, where the size of its image is known."""
    for old in g.calls(source.graph, _aten.max_pool2d.default):
        layer = old.args[0]
        if not isinstance(layer, fx.Node) or layer.name not in shapes:
            continue
        post_op, kernel = layer.args[POST_OP[layer.target]], table.get(str(layer.args[KERNEL[layer.target]]))
        height, width = shapes[layer.name][-2:]
        window = max_pool.window(old)
        positive = post_op in max_pool.NOT_NEGATIVE and kernel.activations == torch.bfloat16
        if positive and window is not None and height is not None and width is not None:
            max_pool.emit(mapping[old], window, (height, width))


def _attend_in_fp32(source: fx.GraphModule, mapping: Mapping[fx.Node, fx.Node]) -> None:
    """Attention planned in BF16, between casts: without a BF16 product in BLAS torch 2.13 calls oneDNN's ``ref`` for
    each head, 27 times the instructions of FP32 (12 heads of 128x64)."""
    for old in g.calls(source.graph, ATTENTION):
        made = origin(old.args[0])
        if made.target not in KERNEL or table.get(str(made.args[KERNEL[made.target]])).activations != torch.bfloat16:
            continue
        node = mapping[old]
        graph, count = node.graph, OPERANDS[ATTENTION]
        wide = tuple(_cast(graph, node, x, torch.float32) for x in node.args[:count])  # type: ignore[arg-type]
        node.args = (*wide, *node.args[count:])
        with graph.inserting_after(node):
            narrow = graph.call_function(_aten._to_copy.default, (node,), {"dtype": torch.bfloat16})
        node.replace_all_uses_with(narrow, delete_user_cb=lambda user, narrow=narrow: user is not narrow)  # type: ignore[misc]


def _dynamic_shape(graph: fx.Graph, node: fx.Node, x: fx.Node, output: Sequence[int | None]) -> list[Any]:
    """The output shape with -1 for one dynamic dimension; for more, the sizes are read from the input."""
    dynamic = [i for i, size in enumerate(output) if size is None]
    if len(dynamic) <= 1:
        return [-1 if size is None else size for size in output]
    with graph.inserting_before(node):
        return [
            graph.call_function(_aten.sym_size.int, (x, i)) if size is None else size for i, size in enumerate(output)
        ]


def _cast(graph: fx.Graph, before: fx.Node, source: fx.Node, dtype: torch.dtype) -> fx.Node:
    with graph.inserting_before(before):
        return graph.call_function(_aten._to_copy.default, (source,), {"dtype": dtype})


def _attribute(
    graph: fx.Graph, constants: dict[str, torch.Tensor], before: fx.Node, wanted: str, value: torch.Tensor
) -> fx.Node:
    constants[wanted] = value
    with graph.inserting_before(before):
        return graph.get_attr(wanted)


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
