"""Max pooling and relu on the bits of BF16 values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx

from armopt.ir.records import Site
from armopt.kernels import max_pool, post_ops, table
from armopt.kernels.base import KernelCall

_aten = torch.ops.aten


def pooled(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, set[Any]]:
    graph = fx.Graph()
    node = graph.call_function(_aten.max_pool2d.default, (graph.placeholder("x"), *args))
    graph.output(node)
    window = max_pool.window(node)
    assert window is not None
    max_pool.emit(node, window, x.shape[-2:])
    return fx.GraphModule(torch.nn.Module(), graph)(x), {each.target for each in graph.nodes}


@pytest.mark.parametrize(
    "args", [([3, 3], [2, 2], [1, 1]), ([2, 2],), ([2, 2], [2, 2]), ([3, 2], [1, 3], [1, 0]), ([3], [2], [0], [1])]
)
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 3)])
def test_the_largest_of_each_window(args: Any, size: tuple[int, int]) -> None:
    x = torch.randn(2, 5, *size).relu().bfloat16().contiguous(memory_format=torch.channels_last)
    x[0, 0, 1, 1] = float("inf")
    found, targets = pooled(x, *args)
    expected = torch.nn.functional.max_pool2d(x.float(), *args).bfloat16()
    assert torch.equal(found, expected)
    assert found.dtype == torch.bfloat16
    assert _aten.max_pool2d.default not in targets


def test_an_image_without_a_batch() -> None:
    x = torch.randn(5, 7, 9).relu().bfloat16()
    found, _ = pooled(x, [3, 3], [2, 2], [1, 1])
    assert torch.equal(found, torch.nn.functional.max_pool2d(x.float(), 3, 2, 1).bfloat16())


@pytest.mark.parametrize("args", [([2, 2], [2, 2], [0, 0], [2, 2]), ([2, 2], [2, 2], [0, 0], [1, 1], True)])
def test_dilated_windows_and_ceil_stay(args: Any) -> None:
    graph = fx.Graph()
    assert max_pool.window(graph.call_function(_aten.max_pool2d.default, (graph.placeholder("x"), *args))) is None


def every_number() -> torch.Tensor:
    """All BF16 values: both signs of infinity, and of each NaN."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("sign", [0x7FFF, 0xFFFF], ids=["plus", "minus"])
@pytest.mark.parametrize("args", [([3, 3], [2, 2], [1, 1]), ([2, 2],)])
def test_nan_of_either_sign_is_the_largest(args: Any, sign: int) -> None:
    numbers = every_number()
    x = torch.randn(1 << 10, 1, 6, 6).relu().bfloat16()
    wanted = numbers[numbers.isnan() | numbers.isinf()]
    places = torch.randint(36, (len(wanted),), generator=torch.Generator().manual_seed(0))
    x.flatten(1)[torch.arange(len(wanted)), places] = wanted.abs() if sign == 0x7FFF else -wanted.abs()
    x = torch.where(x == -math.inf, math.inf, x)  # what is in front gives nothing negative
    found, _ = pooled(x, *args)
    expected = torch.nn.functional.max_pool2d(x.float(), *args)
    assert expected.isnan().any()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("post_op", ["relu", "add_relu"])
@pytest.mark.parametrize("rows", [2, 1 << 13])
def test_relu_of_bf16(post_op: str, rows: int) -> None:
    """From some size on as integers; all values are the same, NaN of both signs and infinities included."""
    site = Site("layer", "linear", rows, 4, 8, (rows, 4), (8, 4), post_op=post_op)
    graph = fx.Graph()
    y, other = graph.placeholder("y"), graph.placeholder("other")
    place = graph.call_function(_aten.alias.default, (y,))
    call = KernelCall(table.get("conv1x1_bf16"), site, place, y, y, None, other, [rows, 8])
    graph.output(call.with_post_op(y))
    graph.erase_node(place)
    module = fx.GraphModule(torch.nn.Module(), graph)
    assert (_aten.threshold_.default in {node.target for node in graph.nodes}) == (
        rows * 8 >= post_ops.RELU_AS_INTEGERS
    )
    y = every_number()[:: (1 << 13) // rows].reshape(rows, 8)
    other = every_number().flip(0)[: rows * 8].reshape(rows, 8)
    total = y if post_op == "relu" else y + other
    torch.testing.assert_close(module(y.clone(), other), total.relu(), rtol=0, atol=0, equal_nan=True)
