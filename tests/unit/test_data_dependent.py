"""Models whose shapes or paths depend on data, run in every way: the model's own result, or a clean error."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import data_dependent_models as models
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import armopt
from armopt.dynamo import graphs
from armopt.dynamo.process import PROCESS
from armopt.errors import ArmoptError, ArmoptWarning, CaptureError, PassError
from armopt.kernels import table
from armopt.kernels.onednn_convolution import multiply_rows
from armopt.passes import FusePointwise, RemoveIdentities, pipeline

_TARGET = "graviton2"  # plans in FP32, so that results are the model's own
_MASK, _MOE = "mask", "experts"


class Around(nn.Module):
    """Python that nothing captures around a model that may be: what bundles of kind "module" are for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return self.inner(x + 1 if x.sum() > 1e9 else x, *others)


@pytest.fixture(autouse=True)
def _quiet(fresh_dynamo: None) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _compile(model: nn.Module, inputs: tuple[Tensor, ...], place: Path) -> Any:
    return armopt.compile(model, target=_TARGET)(*inputs)


def _backend(model: nn.Module, inputs: tuple[Tensor, ...], place: Path, **options: Any) -> Any:
    return torch.compile(model, backend="armopt", options={"target": _TARGET}, **options)(*inputs)


def _fullgraph(model: nn.Module, inputs: tuple[Tensor, ...], place: Path) -> Any:
    return _backend(model, inputs, place, fullgraph=True)


def _bundle(model: nn.Module, inputs: tuple[Tensor, ...], place: Path) -> Any:
    armopt.optimize(model, inputs, output=place / "bundle", target=_TARGET)
    return armopt.load(place / "bundle")(*inputs)


def _module(model: nn.Module, inputs: tuple[Tensor, ...], place: Path) -> Any:
    whole = Around(model).eval()
    armopt.optimize(whole, [inputs], kind="module", output=place / "bundle", target=_TARGET)
    return armopt.load(place / "bundle", model=lambda: whole)(*inputs)


_WAYS: Mapping[str, Callable[[nn.Module, tuple[Tensor, ...], Path], Any]] = {
    "compile": _compile,
    "backend": _backend,
    "fullgraph": _fullgraph,
    "bundle": _bundle,
    "module": _module,
}
#: What can't be: Dynamo's own refusals with fullgraph=True, and what a bundle can't hold.
_REFUSED: Mapping[tuple[str, str], str] = {
    ("branch", "fullgraph"): "Data-dependent branching",
    ("item_bool", "fullgraph"): "Could not guard on data-dependent expression",
    ("branch", "bundle"): r"data_dependent_models.py:\d+: .*Could not guard on data-dependent expression",
    ("item_bool", "bundle"): "Could not guard on data-dependent expression",
    ("split_rows", "fullgraph"): "Could not extract specialized integer from data-dependent expression",
    ("split_rows", "bundle"): r"data_dependent_models.py:\d+: .*Could not extract specialized integer",
    ("images", "fullgraph"): "Could not guard on data-dependent expression",
    ("images", "bundle"): r"data_dependent_models.py:\d+: .*Could not guard on data-dependent expression",
    ("cond", "bundle"): r"data_dependent_models.py:\d+: the model has control flow on data \(torch.cond",
    ("while", "bundle"): r"data_dependent_models.py:\d+: the model has control flow on data \(torch.cond",
    ("cond", "module"): "nothing in the model can be captured",
}
_SAMPLE = {
    *((_MASK, way) for way in _WAYS),
    *(("branch", "compile"), ("cond", "backend"), ("cond", "bundle"), ("split_list", "compile"), (_MOE, "bundle")),
    *(
        ("check_all", "bundle"),
        ("mask_empty", "bundle"),
        ("split_rows", "compile"),
        ("check_zero", "fullgraph"),
        ("unique", "bundle"),
        ("topk_item", "fullgraph"),
    ),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[] if (name, way) in _SAMPLE else [pytest.mark.full])
        for name in models.CASES
        for way in _WAYS
    ],
)
def test_it_gives_what_the_model_gives_or_says_why_not(name: str, way: str, tmp_path: Path) -> None:
    model, inputs = models.make(name)
    with torch.no_grad():
        expected = model(*inputs)
        if refused := _REFUSED.get((name, way)):
            kind = Exception if way == "fullgraph" else ArmoptError  # Dynamo's, as with any backend
            with pytest.raises(kind, match=refused):
                _WAYS[way](model, inputs, tmp_path)
            return
        try:
            found = _WAYS[way](model, inputs, tmp_path)
        except CaptureError:  # right where this PyTorch's own export can't take it either, as 2.10's
            assert way == "bundle"
            with pytest.raises((RuntimeError, IndexError), match=r"used as indices|not tracked"):
                torch.export.export(model, inputs, strict=False).run_decompositions({})
            return
    assert len(tree_leaves(found)) == len(tree_leaves(expected))
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_graph_that_depends_on_data_is_planned_not_left_alone() -> None:
    model, inputs = models.make(_MASK)
    compiled = armopt.compile(model, target="graviton3")
    compiled(*inputs)
    assert [layer.node for layer in compiled.forward.explain().layers] == ["before", "after"]
    assert compiled.forward.divided == ""


def test_sizes_change_from_call_to_call() -> None:
    model, _ = models.make(_MOE)
    compiled = armopt.compile(model, target=_TARGET)
    with torch.no_grad():
        for rows in (6, 5, 1):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


class Positive(nn.Module):
    """How many values are positive is another number where products are rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 512)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[y > 0]


@pytest.mark.parametrize("repair", [True, False])
def test_rounding_that_changes_a_size_is_repaired_or_said(repair: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Positive().eval(), torch.randn(32, 64)
    checks = armopt.Checks(repair=repair)
    output = armopt.Output(tmp_path / "bundle", report=tmp_path / "report.html")
    result = armopt.optimize(model, (x,), output=output, target="graviton3", checks=checks)
    found = armopt.load(tmp_path / "bundle")(x)
    assert result.manifest.accuracy.passed == repair
    assert (found.shape == model(x).shape) == repair
    if not repair:
        said = rf"output has the sizes \[{len(found)}\], in FP32 \[{len(model(x))}\]"
        assert any(re.fullmatch(said, remark) for remark in result.manifest.accuracy.remarks)
        assert re.search(said, (tmp_path / "report.html").read_text())


@pytest.mark.parametrize(
    "compose", [lambda y: torch.where(y > 0)[0], lambda y: y.repeat_interleave((y[:, 0] > 0) + 1, 0)]
)
def test_a_bundle_holds_composites_whose_sizes_depend_on_data(compose: Any, tmp_path: Path) -> None:
    class Composed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            return compose(self.layer(x))

    model, x = Composed().eval(), torch.randn(6, 8)
    with torch.no_grad():
        torch.testing.assert_close(_bundle(model, (x,), tmp_path), model(x), atol=1e-4, rtol=1e-4)


def test_a_check_of_the_models_holds_in_a_bundle_too(tmp_path: Path) -> None:
    model, (x, _) = models.make("check")
    armopt.optimize(model, (x, torch.tensor(3)), output=tmp_path / "bundle", target=_TARGET)
    loaded = armopt.load(tmp_path / "bundle")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, torch.tensor(6)), model(x, torch.tensor(6)), atol=1e-4, rtol=1e-4)
    for wrong in (7, -1):
        with pytest.raises(Exception, match=r"u0|Expected"):
            loaded(x, torch.tensor(wrong))


@pytest.fixture
def broken_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FusePointwise, graph_module: fx.GraphModule) -> Any:
        raise KeyError("val")

    monkeypatch.setattr(FusePointwise, "__call__", fail)


@pytest.mark.parametrize("way", ["compile", "backend"])
def test_an_error_inside_a_pass_leaves_the_graph_to_pytorch_with_one_warning(
    way: str, broken_pass: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(graphs.RAISE)
    model, inputs = models.make(_MASK)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        found = [_WAYS[way](model, inputs, tmp_path) for _ in range(2)]
        expected = model(*inputs)
    said = [str(each.message) for each in caught if issubclass(each.category, ArmoptWarning)]
    assert len(said) == 1
    assert re.search(
        r"PyTorch's own kernels run it, as armopt failed at it: .*FusePointwise .*KeyError: 'val'", said[0]
    )
    assert all(torch.equal(each, expected) for each in found)
    assert any("armopt failed at it" in skip.reason for skip in armopt.explain(model).left_alone)


def test_an_error_inside_a_pass_is_raised_in_tests(broken_pass: None, tmp_path: Path) -> None:
    model, inputs = models.make(_MASK)
    with torch.no_grad(), pytest.raises(PassError, match="FusePointwise"):
        _backend(model, inputs, tmp_path)


@pytest.mark.parametrize("fails", [False, True])
def test_weights_that_a_failed_graph_reads_are_not_released(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two graphs of one layer: armopt fails at the second, the first multiplies its weight in BF16."""
    monkeypatch.delenv(graphs.RAISE)
    layer = nn.Linear(256, 256).eval()
    first = torch.compile(lambda x: layer(x), backend="armopt", options={"target": "graviton3"})
    second = torch.compile(lambda x: layer(x).cos(), backend="armopt", options={"target": "graviton3"})
    x = torch.randn(256, 256)
    with torch.no_grad():
        first(x)
        if fails:
            monkeypatch.setattr(RemoveIdentities, "__call__", lambda *_: 1 / 0)
        expected = second(x)
        assert bool(graphs.release([layer.weight])) is not fails
        torch.testing.assert_close(second(x), expected)


def test_once_weights_are_released_an_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch would multiply with NaN."""
    monkeypatch.delenv(graphs.RAISE)
    layer = nn.Linear(8, 8).eval()
    run = torch.compile(layer, backend="armopt", options={"target": _TARGET})
    monkeypatch.setattr(RemoveIdentities, "__call__", lambda *_: 1 / 0)
    with torch.no_grad():
        PROCESS.released[layer.weight] = layer.weight.detach().bfloat16()
        with pytest.raises(PassError, match="ZeroDivisionError"):
            run(torch.randn(4, 8))


def test_what_a_pass_makes_has_a_value_and_what_torch_made_may_have_none() -> None:
    graph = fx.Graph()
    graph.call_function(torch.ops.aten._assert_scalar.default, (True, "never"))
    graph.output(())
    module = fx.GraphModule(nn.Module(), graph)

    def adds(graph_module: fx.GraphModule) -> Any:
        graph_module.graph.call_function(torch.ops.aten._assert_scalar.default, (True, "new"))
        return armopt.passes.PassResult(graph_module, True)

    pipeline.run(module, [RemoveIdentities()])
    assert len(module.graph.nodes) == 2
    with pytest.raises(PassError, match="_assert_scalar_default_1 has no meta"):
        pipeline.run(module, [adds])


def test_sizes_are_compared_as_they_are_written_not_decided_for_the_example() -> None:
    """Two numbers of rows that depend on data: whether they are equal can't be known, and must not be asked."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, m: Tensor) -> Tensor:
            return self.layer(x[m]) + self.layer(x[~m])

    m = torch.tensor([True, False] * 3)
    x = torch.randn(6, 8)
    model = Two().eval()
    compiled = armopt.compile(model, target=_TARGET)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, m), model(x, m), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["conv1x1_fp32", "conv1x1_fastmath", "conv1x1_bf16"])
def test_kernels_of_linears_take_no_rows(kernel: str) -> None:
    """Packed on x86 in FP32: oneDNN's convolution refuses the empty image that no rows are."""
    from armopt.ir.records import Op, Site
    from armopt.kernels.base import KernelCall
    from armopt.kernels.onednn_convolution import emit_linear, pack_linear_as_convolution

    site = Site("n", Op.LINEAR, 4, 8, 16, (4, 8), (16, 8), weight_key="w")
    assert table.get(kernel).emit is emit_linear
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    node = graph.call_function(torch.ops.aten.alias.default, (x,))
    y = emit_linear(KernelCall(table.get(kernel), site, node, x, weight, None, None, [-1, 16]))
    graph.output(y)
    run = fx.GraphModule(nn.Module(), graph)
    packed = pack_linear_as_convolution(torch.randn(16, 8), site)
    assert any(each.target is multiply_rows for each in graph.nodes)
    assert run(torch.randn(0, 8), packed).shape == (0, 16)
    assert run(torch.randn(3, 8), packed).shape == (3, 16)
