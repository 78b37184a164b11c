"""Every binding does what its operation does, called as graphs call it: positionally and by the schema's names."""

import pytest
import torch
from torch import fx

from armopt.runtime.python_calls import BINDINGS, CASTS, rebind

X = torch.arange(24.0).reshape(2, 3, 4) / 10 - 1
IMAGE = torch.arange(96.0).reshape(1, 2, 6, 8) / 50 - 1
SQUARE = torch.arange(16.0).reshape(4, 4) / 8 - 1
CALLS = {
    "add.Tensor": [((X, X), {}), ((X, X), {"alpha": 2}), ((X, 1.5), {})],
    "add_.Tensor": [((X, X), {}), ((X, X), {"alpha": 2})],
    "adaptive_avg_pool2d.default": [((IMAGE, [2, 2]), {})],
    "addcmul_.default": [((X, X, X + 1), {}), ((X, X, X + 1), {"value": 2})],
    "addmm.default": [((SQUARE[0], SQUARE, SQUARE), {}), ((SQUARE[0], SQUARE, SQUARE), {"beta": 2, "alpha": 3})],
    "avg_pool2d.default": [((IMAGE, [2, 2]), {}), ((IMAGE, [3, 3], [1, 1], [1, 1], True, False), {})],
    "bitwise_and.Scalar": [((X.bfloat16().view(torch.int16), 0x7FFF), {})],
    "bmm.default": [((X, X.transpose(1, 2)), {})],
    "cat.default": [(([X, X], -1), {}), (([X],), {})],
    "clone.default": [((IMAGE,), {}), ((IMAGE,), {"memory_format": torch.channels_last})],
    "constant_pad_nd.default": [((IMAGE, [1, 2, 0, 3]), {}), ((X, [1, -1], 2.0), {})],
    "convolution.default": [((IMAGE, torch.ones(3, 2, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1), {})],
    "copy_.default": [((X, X + 1), {}), ((X, X + 1, False), {})],
    "div.Tensor": [((X, X + 3), {}), ((X, 8.0), {})],
    "embedding.default": [((SQUARE, torch.tensor([1, 3])), {}), ((SQUARE, torch.tensor([0, 2]), 1), {})],
    "expand.default": [((SQUARE[:1], [4, -1]), {})],
    "flatten.using_ints": [((X, 1), {}), ((X, 0, 1), {})],
    "hardtanh.default": [((X, 0.0, 0.5), {}), ((X,), {})],
    "hardtanh_.default": [((X, 0.0, 0.5), {})],
    "gelu.default": [((X,), {}), ((X,), {"approximate": "tanh"})],
    "gelu_.default": [((X,), {}), ((X,), {"approximate": "tanh"})],
    "layer_norm.default": [((X, [4], SQUARE[0], SQUARE[1], 1e-6), {}), ((X, [4]), {})],
    "armopt.join_rows.default": [(([X[0], X[1]], X.flatten(0, 1)), {})],
    "armopt.split_rows.default": [((X, torch.tensor([1, 1, 2])), {})],
    "linear.default": [((X, SQUARE), {}), ((X, SQUARE, SQUARE[0]), {})],
    "matmul.default": [((X, SQUARE), {})],
    "max_pool2d.default": [((IMAGE, [3, 3], [2, 2], [1, 1]), {}), ((IMAGE, [2, 2], [2, 2], [0, 0], [1, 1], True), {})],
    "maximum.default": [((X, X.flip(0)), {})],
    "mean.dim": [((X, [1, 2], True), {}), ((X, [-1]), {"dtype": torch.float64})],
    "mm.default": [((SQUARE, SQUARE), {})],
    "mul.Tensor": [((X, X), {}), ((X, 3), {})],
    "mul_.Tensor": [((X, X), {})],
    "narrow.default": [((X, -1, 1, 2), {})],
    "permute.default": [((X, [2, 0, 1]), {})],
    "reshape.default": [((X, [4, -1]), {})],
    "rsqrt.default": [((X + 2,), {})],
    "scaled_dot_product_attention.default": [
        ((IMAGE, IMAGE, IMAGE), {}),
        ((IMAGE, IMAGE, IMAGE, None, 0.0, True), {}),
        ((IMAGE, IMAGE, IMAGE, torch.zeros(6, 6)), {"scale": 0.5}),
    ],
    "select.int": [((X, 1, 2), {})],
    "softmax.int": [((X, -1), {}), ((X, -1, torch.float64), {})],
    "split.Tensor": [((X, 2, -1), {})],
    "split_with_sizes.default": [((X, [1, 3], -1), {})],
    "squeeze.dim": [((X[:1], 0), {})],
    "squeeze.dims": [((X[:1], [0, 1]), {})],
    "stack.default": [(([X, X], -1), {}), (([X, X],), {})],
    "sub.Tensor": [((X, X + 1), {}), ((X, X), {"alpha": 2})],
    "threshold_.default": [((X, 0.5, 2), {}), ((X.bfloat16().view(torch.int16), -128, 0), {})],
    "transpose.int": [((X, 0, 2), {})],
    "unbind.int": [((X, 2), {}), ((X,), {})],
    "unflatten.int": [((X, -1, [2, 2]), {})],
    "unsqueeze.default": [((X, 1), {})],
    "view.default": [((X, [6, 4]), {})],
    "view.dtype": [((X.bfloat16(), torch.int16), {})],
}


def _name(operation):
    return str(operation).removeprefix("aten.")


@pytest.mark.parametrize("operation", BINDINGS, ids=_name)
def test_a_binding_gives_what_its_operation_gives(operation):
    for args, kwargs in CALLS.get(_name(operation), [((X,), {})]):
        expected, found = (
            call(*[a.clone() if isinstance(a, torch.Tensor) and i == 0 else a for i, a in enumerate(args)], **kwargs)
            for call in (operation, BINDINGS[operation])
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        if isinstance(expected, torch.Tensor):
            assert found.stride() == expected.stride()


@pytest.mark.parametrize("operation", [op for op in BINDINGS if _name(op).split(".")[0].endswith("_")], ids=_name)
def test_in_place_operations_stay_in_place(operation):
    args, kwargs = CALLS.get(_name(operation), [((X,), {})])[0]
    x = args[0].clone()
    assert BINDINGS[operation](x, *args[1:], **kwargs) is x


def test_views_stay_views():
    for name in ("view.default", "reshape.default", "permute.default", "transpose.int", "select.int"):
        operation = next(op for op in BINDINGS if _name(op) == name)
        args, kwargs = CALLS[name][0]
        assert BINDINGS[operation](*args, **kwargs).untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_casts(before, after):
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.aten._to_copy.default, (x,), {"dtype": after})
    graph.output(node)
    rebind(node)
    assert node.target is CASTS[after]
    given = X.to(before)
    torch.testing.assert_close(fx.GraphModule(torch.nn.Module(), graph)(given), given.to(after), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("operation", "kwargs"),
    [
        (torch.ops.aten._to_copy.default, {"dtype": torch.int64}),
        (torch.ops.aten._to_copy.default, {"dtype": torch.float32, "memory_format": torch.channels_last}),
        (torch.ops.aten.alias.default, {}),
    ],
)
def test_an_operation_without_a_binding_stays(operation, kwargs):
    graph = fx.Graph()
    node = graph.call_function(operation, (graph.placeholder("x"),), kwargs)
    rebind(node)
    assert (node.target, dict(node.kwargs)) == (operation, kwargs)
