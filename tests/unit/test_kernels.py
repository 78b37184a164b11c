"""The portable twins against slow references, and the kernels' own calls on this host against their twins."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from armopt.errors import InputError
from armopt.ir import strides
from armopt.ir.operations import CONV, LINEAR
from armopt.ir.records import Op, Site
from armopt.kernels import post_ops, sites, table
from armopt.kernels.base import Use
from armopt.kernels.geometry import output_size
from armopt.runtime import bind

BF16 = torch.bfloat16


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor) -> Tensor:
    return x.to(BF16).float()


def slow_linear(x: Tensor, weight: Tensor, bias: Tensor | None, block: int) -> Tensor:
    """One output at a time: FP64 sums of `block` BF16 products, added and rounded to BF16 after each."""
    y = torch.zeros(x.shape[0], weight.shape[0])
    for i, j in itertools.product(range(x.shape[0]), range(weight.shape[0])):
        total = torch.tensor(0.0)
        for start in range(0, x.shape[1], block or x.shape[1]):
            part = slice(start, start + (block or x.shape[1]))
            products = (rounded(x[i, part]).double() * rounded(weight[j, part]).double()).sum()
            if start == 0 and bias is not None:
                products = products + rounded(bias)[j].double()
            total = rounded((total.double() + products).float())
        y[i, j] = total
    return y


@pytest.mark.parametrize("block", [0, 3, 4, 7, 16, 20])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_rounds_after_each_block(block: int, with_bias: bool) -> None:
    x, weight, bias = noise(3, 16), noise(5, 16, seed=1), noise(5, seed=2) if with_bias else None
    found = LINEAR(x.to(BF16), weight.to(BF16), bias, None, "none", "conv1x1_bf16", block)
    assert found.dtype == BF16
    # a sum near the middle of two BF16 numbers may fall either way: one unit of 8 bits
    expected = slow_linear(x, weight, bias, block)
    assert ((found.float() - expected).abs() <= 2**-8 * expected.abs() + 1e-3).all()
    assert (found.float() == expected).float().mean() >= 0.9


def test_blocks_change_the_result() -> None:
    """Otherwise the tests above would pass for a twin that ignores them."""
    x, weight = noise(8, 64).to(BF16), noise(32, 64, seed=1).to(BF16)
    whole, parts = (LINEAR(x, weight, None, None, "none", "conv1x1_bf16", block) for block in (0, 8))
    assert not torch.equal(whole, parts)


def slow_conv(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, block: int) -> Tensor:
    """im2col by loops: terms run over kernel rows, columns, then channels padded to four."""
    n, channels, height, width = x.shape
    extra = -channels % 4
    x, weight = (F.pad(t, (0, 0, 0, 0, 0, extra)) for t in (x, weight))
    x = F.pad(x, (padding,) * 4)
    kh, kw = weight.shape[2:]
    oh, ow = output_size((height, width), (kh, kw), (stride,) * 2, (padding,) * 2, (dilation,) * 2, False, (0, 0))
    rows = []
    for b, i, j in itertools.product(range(n), range(oh), range(ow)):
        taps = [x[b, :, i * stride + r * dilation, j * stride + c * dilation] for r in range(kh) for c in range(kw)]
        rows.append(torch.cat(taps))
    flat = torch.stack([torch.cat([w[:, r, c] for r in range(kh) for c in range(kw)]) for w in weight])
    return slow_linear(torch.stack(rows), flat, None, block).reshape(n, oh, ow, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("channels", [3, 4])
def test_conv_rounds_after_each_block(stride: int, padding: int, dilation: int, channels: int) -> None:
    x, weight = noise(1, channels, 6, 5), noise(2, channels, 3, 2, seed=1)
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], 1)
    found = CONV(x.to(BF16), weight.to(BF16), None, None, *geometry, "none", "conv_bf16", 8).float()
    expected = slow_conv(x, weight, stride, padding, dilation, 8)
    assert found.shape == expected.shape
    # as above: one unit of 8 bits where a sum falls between two numbers
    assert ((found - expected).abs() <= 2**-7 * expected.abs() + 1e-3).all()
    assert (found == expected).float().mean() >= 0.9


def test_conv1d_in_blocks_is_conv2d_of_one_row() -> None:
    x, weight = noise(2, 5, 9).to(BF16), noise(3, 5, 3, seed=1).to(BF16)
    flat = CONV(x, weight, None, None, [1], [1], [1], False, [0], 1, "none", "conv_bf16", 4)
    tall = CONV(
        x[:, :, None], weight[:, :, None], None, None, [1, 1], [0, 1], [1, 1], False, [0, 0], 1, "none", "conv_bf16", 4
    )
    assert torch.equal(flat, tall[:, :, 0])


@pytest.mark.parametrize("kernel", table.kernels(Op.LINEAR), ids=lambda k: k.name)
def test_the_twin_of_each_linear_kernel(kernel: Any) -> None:
    x, weight, bias = noise(4, 16), noise(6, 16, seed=1), noise(6, seed=2)
    given = weight.to(kernel.rounding.weights)
    found = LINEAR(x.to(kernel.activations), given, bias, None, "none", kernel.name, 0)
    x = x.to(kernel.activations).to(kernel.rounding.products).double()
    exact = x @ given.double().T + bias.to(kernel.activations).double()
    assert found.dtype == kernel.activations
    # one rounding to the result's 8 or 24 bits; FP32 sums of 16 terms
    unit = 2**-8 if kernel.activations == BF16 else 2**-22
    assert ((found.double() - exact).abs() <= unit * exact.abs() + 2**-21 * exact.abs().max()).all()


GEOMETRIES = {
    "dense": ((2, 4, 6, 7), (6, 4, 3, 3), 1, False),
    "1d": ((2, 4, 9), (6, 4, 3), 1, False),
    "3d": ((1, 4, 4, 5, 5), (6, 4, 2, 3, 3), 1, False),
    "grouped": ((1, 4, 6, 6), (6, 2, 3, 3), 2, False),
    "depthwise": ((1, 4, 6, 6), (4, 1, 3, 3), 4, False),
    "transposed": ((1, 4, 5, 5), (4, 6, 3, 3), 1, True),
}


def conv_site(name: str, post_op: str = "none", **changes: Any) -> Site:
    shape, weight, groups, transposed = GEOMETRIES[name]
    spatial = len(shape) - 2
    geometry = {"stride": 2, "padding": 1, "dilation": 1, **changes}
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    args = (x, w, None, None, *[[geometry[k]] * spatial for k in ("stride", "padding", "dilation")])
    node = graph.call_function(CONV, (*args, transposed, [int(transposed)] * spatial, groups, post_op, "aten_conv", 0))
    return sites.describe(node, shape, weight)


def agree(kernel: Any, site: Site, twin: Any, x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None) -> None:
    """The kernel's own calls on this host against its twin."""
    if kernel.activations == BF16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN packs BF16 on x86 with AVX-512 alone; this host has none")
    given = weight.to(kernel.rounding.weights)
    packed = kernel.packed_weight(given, site)
    run = bind.single(kernel, site, packed, kernel.packed_bias(bias, site))
    for tensor, value in zip(run.inputs, (x, other) if other is not None else (x,), strict=True):
        tensor.copy_(value)
    expected = twin(run.inputs[0].clone(), given, bias, None if other is None else run.inputs[1].clone())
    with torch.no_grad():
        found = run()
    found = found[0] if isinstance(found, (tuple, list)) else found
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert strides.are_equal(found, expected)
    # FP32: sums of at most 72 terms in another order. BF16: the product, and a post-op on it, may each fall to the
    # neighbour of 8 bits. Fast math is off on this host, so those kernels differ by the rounding of their operands.
    bits = {"bf16": 2**-6, "bf16-weights": 2**-20, "fp32": 2**-20}[kernel.precision]
    assert (found.float() - expected.float()).abs().max() <= bits * expected.float().abs().max()


@pytest.mark.parametrize("post_op", ["none", *post_ops.UNARY, post_ops.ADD, post_ops.ADD_RELU])
@pytest.mark.parametrize("kernel", table.kernels(Op.LINEAR), ids=lambda k: k.name)
def test_linear_calls_agree_with_their_twin(kernel: Any, post_op: str) -> None:
    site = Site("fc", "linear", 6, 16, 8, (2, 3, 16), (8, 16), post_op=post_op, weight_key="weight")
    x, weight, bias = noise(2, 3, 16), noise(8, 16, seed=1) / 4, noise(8, seed=2)
    other = noise(2, 3, 8, seed=3) if post_op.startswith("add") else None
    agree(kernel, site, lambda x, w, b, o: LINEAR(x, w, b, o, post_op, kernel.name, 0), x, weight, bias, other)


EVERY = table.kernels()
REPAIRS = [kernel for kernel in EVERY if kernel.uses == {Use.REPAIR}]
#: Plain ATen reads its geometry from the node: test_bind.py runs it.
PAIRS = [(k, name) for k in EVERY for name in GEOMETRIES if k.op == "conv" and not k.refuses(conv_site(name))]
PAIRS = [(kernel, name) for kernel, name in PAIRS if kernel.backend != "aten"]


@pytest.mark.parametrize("post_op", ["none", "relu", "gelu", "relu6", post_ops.ADD_RELU])
@pytest.mark.parametrize(("kernel", "name"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_conv_calls_agree_with_their_twin(kernel: Any, name: str, post_op: str) -> None:
    site = conv_site(name, post_op)
    geometry = (site.stride, site.padding, site.dilation, site.transposed, site.output_padding, site.groups)
    x, weight, bias = noise(*site.shape), noise(*site.weight, seed=1) / 4, noise(site.n, seed=2)
    shape = (site.shape[0], site.n, *output_size(site.shape[2:], site.weight[2:], *geometry[:-1]))
    other = noise(*shape, seed=3) if post_op.startswith("add") else None

    def twin(x: Tensor, w: Tensor, b: Tensor, o: Tensor | None) -> Tensor:
        return CONV(x, w, b, o, *[list(g) if isinstance(g, tuple) else g for g in geometry], post_op, kernel.name, 0)

    agree(kernel, site, twin, x, weight, bias, other)


@pytest.mark.parametrize("kernel", REPAIRS, ids=lambda kernel: kernel.name)
def test_dilated_convolutions_through_blas(kernel: Any) -> None:
    site = conv_site("dense", dilation=2, padding=2)
    x, weight, bias = noise(*site.shape), noise(*site.weight, seed=1) / 4, noise(site.n, seed=2)
    geometry = ([2, 2], [2, 2], [2, 2], False, [0, 0], 1)
    agree(kernel, site, lambda x, w, b, o: CONV(x, w, b, o, *geometry, "none", kernel.name, 0), x, weight, bias, None)


def test_no_policy_chooses_what_is_for_repair() -> None:
    assert REPAIRS
    assert not set(table.kernels(None, Use.PLAN, Use.FALLBACK)) & set(REPAIRS)


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.booleans())
@settings(max_examples=60, deadline=None)
def test_output_size_is_torchs(
    size: int, kernel: int, stride: int, padding: int, dilation: int, transposed: bool
) -> None:
    expected = output_size([size], [kernel], [stride], [padding], [dilation], transposed, [0])[0]
    x, w = torch.zeros(1, 1, size), torch.zeros(1, 1, kernel)
    run = F.conv_transpose1d if transposed else F.conv1d
    if expected < 1 or size + 2 * padding < dilation * (kernel - 1) + 1:
        return
    assert run(x, w, None, stride, padding, dilation=dilation).shape[2] == expected


def test_every_kernel_has_a_name_a_summary_and_a_fallback() -> None:
    names = [kernel.name for kernel in EVERY]
    assert len(names) == len(set(names))
    assert all(kernel.summary and table.get(kernel.name) is kernel for kernel in EVERY)
    for op in Op:
        fallbacks = table.kernels(op, Use.FALLBACK)
        assert all(kernel.op == op for kernel in fallbacks)
        assert fallbacks[-1] is table.plain(op)
        assert fallbacks[-1].name == f"aten_{op}"
    with pytest.raises(InputError, match=r"unknown kernel 'nothing'.*another version"):
        table.get("nothing")


@pytest.mark.parametrize("name", post_ops.UNARY)
def test_post_ops_in_place_do_the_same(name: str) -> None:
    x = 4 * noise(50)
    post = post_ops.UNARY[name]
    kwargs = {"approximate": "tanh"} if post.algorithm == "tanh" else {}
    assert torch.equal(post.inplace(x.clone(), *post.inplace_args, **kwargs), post_ops.apply(name, x, None))


def test_the_residual_is_added_to_the_rounded_product() -> None:
    x, weight, other = noise(3, 8).to(BF16), noise(4, 8, seed=1).to(BF16), noise(3, 4, seed=2).to(BF16)
    plain = LINEAR(x, weight, None, None, "none", "conv1x1_bf16", 0)
    assert torch.equal(LINEAR(x, weight, None, other, "add", "conv1x1_bf16", 0), plain + other)
    assert torch.equal(LINEAR(x, weight, None, other, "add_relu", "conv1x1_bf16", 0), (plain + other).relu())


def test_nn_modules_agree_with_the_fp32_twin() -> None:
    conv, x = nn.Conv2d(4, 6, 3, 2, 1), noise(2, 4, 6, 7)
    found = CONV(x, conv.weight, conv.bias, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, "none", "conv_fp32", 0)
    assert torch.equal(found, conv(x))
