"""Layers as primitives of their own: made and proven as a program is bound, and called in its graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from armopt.bundle.program import Result
from armopt.ir.bf16_flow import operands
from armopt.ir.records import Op, Site
from armopt.kernels import post_ops
from armopt.kernels.base import Kernel, KernelCall
from armopt.kernels.onednn import pointwise, primitives, views
from armopt.kernels.onednn.any_size import AnySize
from armopt.kernels.onednn.attention import Attention
from armopt.kernels.onednn.attention_any_size import AnyAttention
from armopt.kernels.onednn.layer import Description, Layer, Wanted, describe
from armopt.kernels.onednn.workspaces import OneSize, Workspaces
from armopt.runtime import blas, numbers, operations
from armopt.runtime.packings import Packings

_aten = torch.ops.aten


def unavailable() -> str:
    """Why no kernel can own its primitive in this process; empty where they can."""
    api = primitives.api()
    return api if isinstance(api, str) else ""


class Form(IntEnum):
    """Where a layer's post-op runs: as an operation of PyTorch's, in the layer's primitive, or in one behind it."""

    APART = 0
    FUSED = 1
    BEHIND = 2


def forms(kernel: Kernel, site: Site) -> tuple[Form, ...]:
    """The forms of a layer that are to be tried, in order."""
    fused = (Form.FUSED,) if kernel.fuses(site) or _may_fuse(kernel, site) else ()
    behind = (Form.BEHIND,) if pointwise.takes(site.post_op, kernel.activations) else ()
    return (*fused, *behind, Form.APART)


def _may_fuse(kernel: Kernel, site: Site) -> bool:
    """Whether the code that does the product may take a post-op which PyTorch's call of the kernel leaves out.

    In BF16 the Compute Library takes none, and oneDNN would multiply with code of its own; where that multiplies anyhow
    it takes all, before it rounds.
    """
    return kernel.activations == torch.bfloat16 and site.post_op in primitives.ELTWISE


def proven(kernel: Kernel, site: Site, stored: torch.Tensor, bias: torch.Tensor | None) -> Layer | None:
    """A layer alone as its kernel's own primitive, with right numbers; None where it can't be had."""
    values = kernel.weight_values(stored, site)
    for form in forms(kernel, site):
        made = make(kernel, site, lambda: stored, bias, lambda layout: [], form)
        if made is not None and numbers.refusal(kernel, site, alone(made, site), values, bias, made.post_op) is None:
            return made
    return None


def make(
    kernel: Kernel,
    site: Site,
    stored: Callable[[], torch.Tensor],
    bias: torch.Tensor | None,
    packings: Callable[[bytes], Packings],
    form: Form,
) -> Layer | None:
    """A layer as its kernel's own primitive; None where the kernel has none or this build offers none.

    Args:
        kernel: The kernel.
        site: The site.
        stored: Gives the weight as the bundle stores it.
        bias: In the kernel's dtype.
        packings: Of a layout, what is packed so already; what is packed here is added.
        form: Where its post-op runs.
    """
    api = primitives.api()
    if kernel.own is None or isinstance(api, str):
        return None
    where = {at: site.post_op if at == form else "" for at in (Form.FUSED, Form.BEHIND)}
    wanted = replace(kernel.own(kernel, site), post_op=where[Form.FUSED], behind=where[Form.BEHIND])
    try:
        description = describe(api, wanted, bias=bias is not None)
        if description is None or (
            form == Form.FUSED and not kernel.fuses(site) and not _is_at_no_cost(api, wanted, description, bias)
        ):
            return None
        held = packings(api.key(description.layout))
        packed = next((tensor for _, tensor in held), None)
        if packed is None:
            packed = description.pack(kernel.arrange(kernel.weight_values(stored(), site), site).reshape(wanted.weight))
            held.append(((), packed))
        return Layer(wanted, description, packed, None if bias is None else bias.detach().clone())
    except primitives.OneDnnError:
        return None


def _is_at_no_cost(api: primitives.Api, wanted: Wanted, fused: Description, bias: torch.Tensor | None) -> bool:
    """Whether the post-op leaves the product to who does it without."""
    plain = describe(api, replace(wanted, post_op=""), bias=bias is not None)
    return plain is not None and plain.implementation == fused.implementation


def alone(layer: Layer, site: Site) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer, without a post-op that runs apart, as a function of its input."""
    workspaces = Workspaces()
    is_conv = site.op == Op.CONV
    shape = layer.wanted.result if is_conv else (*site.shape[:-1], site.n)
    workspaces.layers.append(OneSize(layer, shape, channels_last=is_conv))
    call = workspaces.layers[0].function(0)

    def run(x: torch.Tensor) -> torch.Tensor:
        workspace = workspaces.take()
        flat = is_conv and x.dim() == 3
        y = call(workspace, x.unsqueeze(2) if flat else x)
        workspaces.give(workspace)
        return y.squeeze(2) if flat else y

    return run


def of_any_size(kernel: Kernel, site: Site, layer: Layer, dims: int) -> AnySize:
    """A layer of dynamic size, of so many dimensions; all sizes that want its weight in one layout share it."""
    is_conv = site.op == Op.CONV

    def wanted(shape: tuple[int, ...]) -> tuple[Wanted, tuple[int, ...]]:
        assert kernel.own is not None
        own_shape = (*shape[:2], *shape[3:]) if is_conv and len(site.shape) == 3 else tuple(shape)
        made = kernel.own(kernel, replace(site, shape=own_shape, m=math.prod(shape[:-1])))
        made = replace(made, post_op=layer.wanted.post_op, behind=layer.wanted.behind)
        return made, made.result if is_conv else (*shape[:-1], site.n)

    def otherwise(x: torch.Tensor) -> torch.Tensor:
        weight = layer.weight().float()
        bias = None if layer.bias is None else layer.bias.float()
        x = x.to(kernel.rounding.products).float()
        if is_conv:
            assert layer.wanted.geometry is not None
            stride, dilation, padding = (list(part) for part in layer.wanted.geometry)
            groups = weight.shape[0] if weight.dim() > x.dim() else 1
            weight = weight.flatten(0, 1) if groups > 1 else weight
            ones = [0] * len(stride)
            y = torch.convolution(x, weight, bias, stride, padding, [d + 1 for d in dilation], False, ones, groups)
        else:
            y = torch.nn.functional.linear(x, weight.reshape(site.weight), bias)
        y = y.to(kernel.activations)
        return post_ops.apply(layer.post_op, y, None) if layer.post_op else y

    return AnySize(layer, wanted, otherwise, dims, channels_last=is_conv)


def packed_weights(graph: fx.Graph) -> tuple[torch.Tensor, ...]:
    """The weights that the primitives of a bound graph hold."""
    owners = (getattr(node.target, "__self__", None) for node in graph.nodes)
    return tuple(
        tensor for owner in owners if isinstance(owner, Workspaces) for layer in owner.layers for tensor in layer.packed
    )


@dataclass(slots=True)
class Calls:
    """The calls of own primitives in one graph: each takes the workspace of the call of the program."""

    graph: fx.Graph
    workspaces: Workspaces
    _workspace: fx.Node | None = None
    _results: dict[fx.Node, int] = field(default_factory=dict)

    def emit(self, call: KernelCall, layer: Layer) -> fx.Node:
        """Inserts the call of a layer in front of its node, and its post-op where that runs apart."""
        is_conv = call.site.op == Op.CONV
        flat = is_conv and len(call.site.shape) == 3
        layers = self.workspaces.layers
        if any(size is None for size in call.shape):
            layers.append(of_any_size(call.kernel, call.site, layer, len(call.shape) + flat))
        else:
            shape = layer.wanted.result if is_conv else tuple(call.shape)
            layers.append(OneSize(layer, shape, channels_last=is_conv))
        run = layers[-1].function(len(layers) - 1)
        run.__name__ = call.node.name
        x = call.call(_aten.unsqueeze.default, call.x, 2) if flat else call.x
        y = call.call(run, self._taken(), x)
        self._results[y] = len(layers) - 1
        y = call.call(_aten.squeeze.dim, y, 2) if flat else y
        return y if layer.post_op else call.post_op(y)

    def emit_product(self, call: KernelCall, product: blas.Product) -> fx.Node:
        """Inserts the call of a layer that BLAS multiplies in front of its node, and a post-op that runs apart."""
        layers = self.workspaces.layers
        layers.append(product)
        run = product.function(len(layers) - 1)
        run.__name__ = call.node.name
        y = call.call(run, self._taken(), call.x)
        self._results[y] = len(layers) - 1
        return y if product.post_op else call.post_op(y)

    def emit_attention(self, node: fx.Node, attention: Attention | AnyAttention) -> int:
        """Makes the call of an attention what a node calls; gives back its index."""
        layers = self.workspaces.layers
        layers.append(attention)
        run = attention.function(len(layers) - 1)
        run.__name__ = node.name
        if isinstance(attention, Attention):
            self._results[node] = len(layers) - 1
        given: tuple[Any, ...] = operands(node)
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        is_given = mask is not None and attention.mask is None
        node.target, node.kwargs = run, {}
        node.args = (self._taken(), *given, mask) if is_given else (self._taken(), *given)
        return len(layers) - 1

    def place_operations(
        self,
        source: fx.Graph,
        mapping: Mapping[fx.Node, fx.Node],
        results: Mapping[str, Result],
        layers: Collection[fx.Node],
    ) -> dict[fx.Node, int]:
        """Lets operations of PyTorch's write to places too; gives back the index of each by its node in `source`.

        Args:
            source: The graph of which this is a copy.
            mapping: From nodes of `source` to those of the copy.
            results: By the names of nodes in `source`.
            layers: Nodes in `source` whose results lie the same however their inputs do.
        """
        placed = {}
        settled = set(layers)
        for old in source.nodes:
            if old.op == "get_attr" or (old.op == "call_function" and settled.issuperset(old.all_input_nodes)):
                settled.add(old)
            node = mapping.get(old)
            if old.op != "call_function" or old.name not in results or node is None or node.target is not old.target:
                continue
            operation = operations.of(node, results[old.name].size, settled=old in settled)
            if operation is None:
                continue
            placed[old] = self._results[node] = len(self.workspaces.layers)
            self.workspaces.layers.append(operation)
            run = operation.function(placed[old])
            run.__name__ = node.name
            node.target, node.args = run, (self._taken(), *node.args)
        return placed

    def _taken(self) -> fx.Node:
        if self._workspace is None:
            with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
                given = self.graph.placeholder("out", default_value=None)
            with self.graph.inserting_after(given):
                self._workspace = self.graph.call_function(self.workspaces.take, (given,))
        return self._workspace

    def finish(self, arena: int = 0, places: Mapping[int, int] = MappingProxyType({})) -> None:
        """Gives the workspace back at the end, and has a first one ready.

        Args:
            arena: Bytes that results share.
            places: The first byte of a layer's result there, by its index.
        """
        if self._workspace is not None:
            self.workspaces.arena, self.workspaces.places = arena, places
            end = self.graph.output_node()
            given = end.args[0] if isinstance(end.args[0], (list, tuple)) else ()
            self.workspaces.outputs = {
                self._results[node]: at
                for at, node in enumerate(given)
                if isinstance(node, fx.Node) and node in self._results
            }
            with self.graph.inserting_before(end):
                self.graph.call_function(self.workspaces.give, (self._workspace,))
            first = self.workspaces.take()
            fixed = first.results
            layers = {node: index for node, index in self._results.items() if index in fixed}
            found = views.find(self.graph, layers, fixed)
            views.replace(self.graph, found, self._workspace)
            self.workspaces.views = tuple(found.values())
            first.views = views.make(self.workspaces.views, fixed)
            self.workspaces.give(first)
