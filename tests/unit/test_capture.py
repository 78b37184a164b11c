from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo_models
from torch import Tensor, nn

from armopt import capture
from armopt.errors import CaptureError, InputError
from armopt.ir import graph as g
from armopt.ir import nesting


class Model(nn.Module):
    """`function` as forward of a module with one linear."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(1))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["nested_outputs", "keyword_only"])
def test_inputs_and_outputs_nest_as_they_do(name: str) -> None:
    model, example = zoo_models.MODELS[name](), zoo_models.EXAMPLES[name]()
    captured = capture.module(model, (), example)
    tensors = nesting.flatten(captured.inputs.tree, {"args": [], "kwargs": example}, "inputs")
    assert [tuple(t.shape) for t in tensors] == [spec.shape for spec in captured.input_specs]
    results = captured.graph_module(*tensors)
    built = nesting.builder(captured.outputs.tree)([results[i] for i in captured.outputs.positions])
    with torch.no_grad():
        expected = model(**example)
    assert type(built) is type(expected)
    leaves, expected_leaves = (torch.utils._pytree.tree_leaves(tree) for tree in (built, expected))
    for a, b in zip(leaves, expected_leaves, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b  # the same operations


def test_dictionaries_in_any_order() -> None:
    model, example = zoo_models.keyword_only(), zoo_models.EXAMPLES["keyword_only"]()
    example = dict(reversed(example.items()))
    captured = capture.module(model, (), example)
    tensors = nesting.flatten(captured.inputs.tree, {"args": [], "kwargs": example}, "inputs")
    with torch.no_grad():
        assert torch.equal(captured.graph_module(*tensors)[0], model(**example))


def test_weights_are_shared_with_the_model_and_it_stays_as_it_was() -> None:
    model = Model(lambda s, x: nn.functional.dropout(s.fc(x), 0.5, s.training)).train()
    captured = capture.module(model, (X,))
    assert model.training
    assert model.fc.training
    held = {t.data_ptr() for t in captured.graph_module.buffers()}
    assert held == {model.fc.weight.data_ptr(), model.fc.bias.data_ptr()}
    assert torch.equal(captured.graph_module(X)[0], model.fc(X))


def test_tied_weights_are_one() -> None:
    captured = capture.module(zoo_models.shared_weights(), (torch.zeros(2, 64),))
    assert len(list(captured.graph_module.buffers())) == 3


def counting(s: Model, x: Tensor) -> Tensor:
    s.count.add_(1)
    return s.fc(x) + s.count


def test_a_buffer_that_is_written_to_counts_on() -> None:
    captured = capture.module(Model(counting), (X,))
    graph_module = g.copy(captured.graph_module)
    graph_module.count.zero_()
    first, second = graph_module(X)[0].clone(), graph_module(X)[0].clone()
    # FP32 additions of numbers near 1
    assert torch.allclose(second - first, torch.ones(2, 4), atol=1e-6)
    assert float(graph_module.count) == 2


def test_capturing_leaves_the_buffers_as_they_were() -> None:
    model = Model(counting)
    capture.module(model, (X,))
    assert float(model.count) == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(4, 4).double(), "weight is float64, not float32.*model.float"),
        (lambda: nn.Linear(4, 4, dtype=torch.complex128), "weight is complex128, not float32.*before quantization"),
    ],
)
def test_another_dtype_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture.module(build(), (X,))


class Quantizable(nn.Module):
    """Prepared for quantization by its author, as torchvision's quantizable models are; in FP32 until it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.layer = nn.Linear(4, 4)
        self.add = torch.ao.nn.quantized.FloatFunctional()
        self.more = torch.ao.nn.quantized.FXFloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        y = self.quant(x)
        return self.dequant(self.more.mul(self.add.add_relu(self.layer(y), y), y))


def test_a_model_that_may_be_quantized_is_in_fp32_until_it_is() -> None:
    model, x = Quantizable().eval(), torch.randn(2, 4)
    captured = capture.module(model, (x,))
    with torch.no_grad():
        assert captured.graph_module(x)[0].equal(model(x))


def test_a_quantized_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    with pytest.raises(InputError, match=r"int8.*FP32 model"):
        capture.module(quantized, (X,))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"don't fit forward\(x\).*missing"),
        ((X, X), {}, "don't fit forward"),
        ((), {"y": X}, "don't fit forward.*Name them as forward does: x"),
        ((torch.zeros(2, 5),), {}, "fails on the example inputs: RuntimeError"),
        ((X.double(),), {}, "fails on the example inputs"),
        (("text",), {}, "fails on the example inputs"),
    ],
)
def test_inputs_that_do_not_fit_are_named(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as found:
        capture.module(Model(lambda s, x: s.fc(x)), args, kwargs, source="here")
    assert found.value.where == "here"


def test_a_dynamic_batch() -> None:
    captured = capture.module(Model(lambda s, x: {"y": s.fc(x), "n": x.sum(0)}), (X,), batch=(1, 8))
    (symbol,) = captured.symbols
    assert (symbol.name, captured.input_specs[0].shape) == ("batch", ("batch", 4))
    for rows in (1, 2, 9):
        assert captured.graph_module(torch.zeros(rows, 4))[0].shape == (rows, 4)


def test_one_batch_size_is_static() -> None:
    captured = capture.module(Model(lambda s, x: s.fc(x)), (X,), batch=(5,))
    assert captured.symbols == ()
    assert captured.input_specs[0].shape == (5, 4)
    assert captured.example[0].shape == (5, 4)


@pytest.mark.parametrize("function", [lambda s, x: s.fc(x.view(8, 4)), lambda s, x: s.fc(x) + torch.ones(8, 4)])
def test_a_model_that_fixes_its_batch_says_so(function: Callable[..., Any]) -> None:
    with pytest.raises(CaptureError, match=r"fixes its batch size.*one size in batch \(--batch\)"):
        capture.module(Model(function), (X,), batch=(1, 8))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s, x: s.fc(x) if x.sum() > 0 else x, "can't take the model whole"),
        (lambda s, x: x.add_(1), "writes into its input.*Clone it"),
        (lambda s, x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)), "control flow on data"),
        (lambda s, x: {1: x}, "dictionary key is 1"),
    ],
    ids=["data-dependent branch", "writes its input", "cond", "integer key"],
)
def test_what_can_not_be_captured_says_why(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture.module(Model(function), (X.clone(),))


def test_the_digest_follows_weights_and_graph() -> None:
    torch.manual_seed(0)
    model = Model(lambda s, x: s.fc(x))
    first = capture.module(model, (X,)).digest
    assert capture.module(model, (X,)).digest == first
    with torch.no_grad():
        model.fc.weight[0, 0] += 1
    changed = capture.module(model, (X,)).digest
    model.function = lambda s, x: s.fc(x).relu()
    assert len({first, changed, capture.module(model, (X,)).digest}) == 3


def test_every_node_knows_its_value() -> None:
    captured = capture.module(zoo_models.linear_norm(), (torch.zeros(2, 32),))
    assert all("val" in n.meta for n in captured.graph_module.graph.nodes if n.op in ("placeholder", "get_attr"))
    assert not any(n.op == "call_module" for n in captured.graph_module.graph.nodes)


def test_an_exported_program_keeps_its_own_inputs_and_dynamic_shapes() -> None:
    program = torch.export.export(
        Model(lambda s, x: s.fc(x)), (X,), dynamic_shapes={"x": {0: torch.export.Dim("n", max=64)}}
    )
    captured = capture.exported(program, source="m.pt2")
    assert torch.equal(captured.example[0], X)
    assert (captured.symbols[0].name, captured.symbols[0].most) == ("batch", 64)
    program._example_inputs = None
    with pytest.raises(InputError, match=r"no example inputs.*--input"):
        capture.exported(program, source="m.pt2")


class Selecting(torch.nn.Module):
    """Decides on a size that depends on data: torch prints the whole graph when it refuses that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.where(x > 0)[0]
        return x[rows] if rows.numel() > 3 else x


def test_what_torch_prints_of_a_failed_export_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError):
        capture.module(Selecting(), (torch.randn(3, 4),), {}, source="Selecting")
    assert capfd.readouterr().err == ""


def test_sparse_inputs_and_outputs_are_refused_by_name() -> None:
    class Sparse(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to_sparse()

    with pytest.raises(CaptureError, match=r"to_sparse is a sparse tensor \(sparse_coo\)"):
        capture.module(Sparse(), (torch.eye(2),))
