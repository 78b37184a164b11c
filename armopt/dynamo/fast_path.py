"""PyTorch's fused operations for transformers in terms of what kernels can be planned for.

In eval mode nn.TransformerEncoderLayer and nn.MultiheadAttention with ``batch_first=True`` call one operation for the
whole layer. Dynamo traces that call; torch.export goes around it. Taken apart here, while a graph is compiled, nothing
of the module or of PyTorch's settings changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

_ATTENTION = torch.ops.aten._native_multi_head_attention.default
_ENCODER_LAYER = torch.ops.aten._transformer_encoder_layer_fwd.default


def _masked(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    """Which scores take part, broadcast to [batch, heads, query, key]; all that is not 0 in `mask` is left out."""
    if mask is None:
        return None
    kept = mask.to(torch.bool).logical_not()
    if mask_type == 1:  # of keys: [batch, key]
        return kept[:, None, None, :]
    return kept  # [query, key], or of all four dimensions


def _heads(x: Tensor, count: int) -> Tensor:
    """[batch, rows, features] -> [batch, heads, rows, features / heads]."""
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count).transpose(1, 2)


def _named(operation: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> SimpleNamespace:
    """The arguments of a call by the names in the operation's schema."""
    arguments = operation._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    given |= dict(zip((argument.name for argument in arguments), args, strict=False))
    return SimpleNamespace(**{**given, **kwargs})


def _attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """aten::_native_multi_head_attention, of tensors [batch, rows, features]."""
    of = _named(_ATTENTION, args, kwargs)
    if of.query is of.key and of.key is of.value:
        parts = functional.linear(of.query, of.qkv_weight, of.qkv_bias).chunk(3, dim=-1)
    else:
        weights, biases = of.qkv_weight.chunk(3), of.qkv_bias.chunk(3)
        parts = tuple(map(functional.linear, (of.query, of.key, of.value), weights, biases))
    q, k, v = (_heads(part, of.num_head) for part in parts)
    kept = _masked(of.mask, of.mask_type)
    attended = q.new_empty(0)
    if of.need_weights:
        scores = (q * (q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
        if kept is not None:
            scores = scores.masked_fill(kept.logical_not(), float("-inf"))
        attended = scores.softmax(dim=-1)
        y = attended @ v
        attended = attended.mean(dim=1) if of.average_attn_weights else attended
    else:
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=kept)
        if kept is not None:  # where nothing takes part that gives zeros, and the operation NaN
            y = y.masked_fill(kept.any(dim=-1, keepdim=True).logical_not(), float("nan"))
    return functional.linear(y.transpose(1, 2).flatten(-2), of.proj_weight, of.proj_bias), attended


def _encoder_layer(*args: Any, **kwargs: Any) -> Tensor:
    """aten::_transformer_encoder_layer_fwd, of a tensor [batch, rows, features]."""
    of = _named(_ENCODER_LAYER, args, kwargs)

    def attend(x: Tensor) -> Tensor:
        projections = (of.qkv_weight, of.qkv_bias, of.proj_weight, of.proj_bias)
        return _attention(
            *(x, x, x, of.embed_dim, of.num_heads, *projections, of.mask), need_weights=False, mask_type=of.mask_type
        )[0]

    def feed_forward(x: Tensor) -> Tensor:
        hidden = functional.linear(x, of.ffn_weight_1, of.ffn_bias_1)
        hidden = functional.gelu(hidden) if of.use_gelu else functional.relu(hidden)
        return functional.linear(hidden, of.ffn_weight_2, of.ffn_bias_2)

    def first(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (of.embed_dim,), of.norm_weight_1, of.norm_bias_1, of.eps)

    def second(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (of.embed_dim,), of.norm_weight_2, of.norm_bias_2, of.eps)

    src: Tensor = of.src
    if of.norm_first:
        src = src + attend(first(src))
        return src + feed_forward(second(src))
    src = first(src + attend(src))
    return second(src + feed_forward(src))


def leaves_padding(graph: fx.Graph) -> bool:
    """Whether a graph of Dynamo's computes padded rows into which eager mode writes zeros.

    It does so in an nn.TransformerEncoder that has padding alone to mask, and layers that normalize last.
    """
    for node in graph.find_nodes(op="call_function", target=torch._transformer_encoder_layer_fwd):
        of = _named(_ENCODER_LAYER, node.args, node.kwargs)
        stack = (node.meta.get("nn_module_stack") or {}).values()
        if of.mask_type == 1 and not of.norm_first and any(kind is torch.nn.TransformerEncoder for _, kind in stack):
            return True
    return False


#: Operation -> what it is made of: a table of decompositions.
DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    _ATTENTION: _attention,
    _ENCODER_LAYER: _encoder_layer,
}
