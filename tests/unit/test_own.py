"""Layers as primitives of their own, with the oneDNN of this machine's PyTorch."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from armopt.bundle.program import Program
from armopt.ir.onednn_names import is_reference
from armopt.ir.records import Op, Precision, Site
from armopt.kernels import table
from armopt.kernels.examples import Example
from armopt.kernels.onednn import implementations, primitives, symbols
from armopt.kernels.onednn.layer import Description, Layer, Wanted, describe
from armopt.kernels.onednn.workspaces import Workspaces
from armopt.plan.threshold_policy import ThresholdPolicy
from armopt.runtime import bind, blas, numbers, own
from armopt.runtime.own import Form
from tests.own_programs import found_api, lowered, random, wrong_at_once
from tests.planning import programs

SITE = Site("fc", Op.LINEAR, 8, 32, 16, (8, 32), (16, 32))
FP32, BF16 = table.get("conv1x1_fp32"), table.get("conv1x1_bf16")
WANTED = Wanted((8, 32), (16, 32), (8, 16), torch.float32, torch.float32, None)


@pytest.fixture(scope="module", autouse=True)
def api() -> primitives.Api:
    return found_api()


@pytest.fixture
def of_another_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    primitives.api.cache_clear()
    yield
    monkeypatch.undo()
    primitives.api.cache_clear()


def layer(api: primitives.Api, rows: int = 8, bias: bool = True) -> tuple[Layer, torch.Tensor, torch.Tensor | None]:
    weight, added = random(16, 32, seed=1), random(16, seed=2) if bias else None
    wanted = replace(WANTED, source=(rows, 32), result=(rows, 16))
    description = describe(api, wanted, bias=bias)
    assert description is not None
    kept = None if added is None else added.clone()
    return Layer(wanted, description, description.pack(weight), kept), weight, added


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.grouped, self.line = nn.Conv2d(16, 32, 3, groups=4), nn.Conv1d(32, 8, 3, dilation=2)
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.deep(torch.relu(self.stem(x))))
        x = torch.sigmoid(self.line(torch.relu(self.grouped(x)).flatten(2)))
        return self.head(x[..., :16]) + 1


NET = Net().eval()
IMAGE = random(2, 3, 16, 16)


def test_a_program_gives_what_pytorchs_calls_give(monkeypatch: pytest.MonkeyPatch) -> None:
    program = lowered(NET, IMAGE)
    module, entries = bind.Binder(False).bind(program)
    assert all(entry.kernel == entry.planned for entry in entries)
    owned = [entry for entry in entries if entry.implementation]
    assert len(owned) >= 4
    assert not any(implementations.is_reference(entry.implementation) for entry in owned)
    monkeypatch.setattr(primitives, "api", lambda: "no symbols")
    called, others = bind.Binder(False).bind(program)
    assert not any(entry.implementation for entry in others)
    assert "mkldnn" not in str(module.graph)
    found, expected = module(IMAGE)[0], called(IMAGE)[0]
    assert found.stride() == expected.stride()
    # sums of up to 144 terms, in another order where another implementation answers
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # however the input lies in memory
    for x in (IMAGE.contiguous(memory_format=torch.channels_last), IMAGE.mT.contiguous().mT):
        assert torch.equal(module(x)[0], found)


def of_any_size(model: nn.Module, x: torch.Tensor, *dynamic: int) -> Program:
    """Lowered with some dimensions of all results dynamic."""
    program = lowered(model, x)
    shapes = {
        name: tuple(None if i in dynamic else size for i, size in enumerate(shape))
        for name, shape in program.shapes.items()
    }
    return replace(program, shapes=shapes)


@pytest.mark.parametrize(
    ("model", "dynamic", "shapes"),
    [
        (nn.Sequential(nn.Linear(32, 16), nn.ReLU()), [0], [(8, 32), (1, 32), (0, 32), (50, 32)]),
        (nn.Linear(32, 16), [0, 1], [(2, 8, 32), (3, 1, 32), (2, 0, 32)]),
        (nn.Sequential(nn.Conv2d(3, 16, 3), nn.SiLU()), [0, 2, 3], [(1, 3, 9, 9), (2, 3, 5, 20), (0, 3, 9, 9)]),
        (nn.Conv2d(16, 16, 3, groups=16), [0, 2, 3], [(1, 16, 9, 9), (2, 16, 5, 20)]),
        (nn.Conv1d(16, 8, 3), [2], [(2, 16, 12), (2, 16, 40)]),
        # with a function behind it
        (nn.Sequential(nn.Linear(32, 16), nn.GELU()), [0], [(8, 32), (1, 32), (0, 32), (50, 32)]),
        (nn.Sequential(nn.Conv1d(16, 8, 3), nn.Tanh()), [2], [(2, 16, 12), (2, 16, 40)]),
    ],
)
@pytest.mark.parametrize("offered", [True, False])
def test_a_layer_of_any_size(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, dynamic: list[int], shapes: list[tuple[int, ...]], offered: bool
) -> None:
    """Also where oneDNN offers nothing for another size."""
    program = of_any_size(model, random(*shapes[0]), *dynamic)
    module, entries = bind.Binder(False).bind(program)
    assert all(entry.implementation for entry in entries)
    if not offered:
        monkeypatch.setattr(Layer, "resized", lambda self, wanted: None)
    for shape in (*shapes, *shapes):
        x = random(*shape)
        with torch.no_grad():
            expected = model(x)
        found = module(x)[0]
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def blas_program(model: nn.Module, x: torch.Tensor, target: str = "graviton2") -> Program:
    return programs(model.eval(), x, target=target, policy=ThresholdPolicy(1000))[0]


@pytest.mark.parametrize("shape", [(1, 32), (8, 32), (2, 3, 32)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("target", "kernel"), [("graviton2", "blas_fp32"), ("graviton3", "blas_fp32_w16")])
def test_a_small_layer_of_blas_is_called_without_pytorch(
    shape: tuple[int, ...], bias: bool, target: str, kernel: str
) -> None:
    """To the bit what PyTorch gives, also where the caller gives the result its place, and however the input lies."""
    x = random(*shape)
    first, last = nn.Linear(32, 48, bias), nn.Linear(48, 16, bias)
    module, entries = bind.Binder(False).bind(blas_program(nn.Sequential(first, nn.ReLU(), last), x, target))
    assert [entry.kernel for entry in entries] == [kernel] * 2
    # without a bias the first, whose input is the caller's, is PyTorch's
    assert sum("mm" in str(node.target) for node in module.graph.nodes) == (not bias)
    weights = [each.weight.bfloat16().float() if kernel[-3:] == "w16" else each.weight for each in (first, last)]

    def multiplied(x: torch.Tensor, weight: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        return x.mm(weight.T.contiguous()) if added is None else torch.addmm(added, x, weight.T.contiguous())

    with torch.no_grad():
        inner = multiplied(x.reshape(-1, 32), weights[0], first.bias).relu()
        expected = multiplied(inner, weights[1], last.bias).reshape(*shape[:-1], 16)
    found = module(x)[0]
    assert torch.equal(found, expected)
    assert module(x)[0].data_ptr() != found.data_ptr()
    lent = torch.full_like(found, torch.nan)
    assert module(x, out=[lent])[0] is lent
    assert torch.equal(lent, found)
    assert torch.equal(module(x.mT.contiguous().mT)[0], found)
    refusal = (ValueError, "bytes") if bias else (RuntimeError, "cannot be multiplied|is invalid for input")
    with pytest.raises(refusal[0], match=refusal[1]):
        module(x[..., :16])


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(32, 16, bias=False), (8, 32)),
        (nn.Linear(32, 16), (0, 32)),
        (nn.Linear(32, 512), (64, 32)),
    ],
)
def test_other_layers_of_blas_are_called_through_pytorch(model: nn.Module, shape: tuple[int, ...]) -> None:
    """On the caller's input without a bias, without rows, and of a result that is large beside a call."""
    x = random(*shape)
    module, _ = bind.Binder(False).bind(blas_program(model, x))
    assert "mm" in module.code
    torch.testing.assert_close(module(x)[0], model(x).detach(), rtol=1e-5, atol=1e-5)


def test_a_layer_of_blas_is_called_through_pytorch_where_blas_has_no_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "functions", lambda: None)
    x = random(8, 32)
    module, _ = bind.Binder(False).bind(blas_program(nn.Linear(32, 16), x))
    assert "addmm" in module.code


def test_sizes_are_forgotten_in_order() -> None:
    module, _ = bind.Binder(False).bind(of_any_size(nn.Linear(32, 16), random(8, 32), 0))
    x = random(100, 32)
    whole = module(x)[0]
    for _ in range(2):
        for rows in range(1, 100):
            torch.testing.assert_close(module(x[:rows])[0], whole[:rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [k.name for k in table.kernels() if k.own and k.precision == Precision.FP32])
def test_numbers_are_those_of_the_sums_in_fp64(name: str) -> None:
    kernel = table.get(name)
    for listed in kernel.examples.values():
        for example in listed[:4]:
            site = _site(kernel.op, example)
            weight = random(*site.weight)
            bias = random(site.n)
            assert own.proven(kernel, site, weight, bias) is not None, example
            assert own.proven(kernel, site, weight, None) is not None, example


def _site(op: Op, example: Example) -> Site:
    if op == Op.LINEAR:
        rows = torch.Size(example.shape[:-1]).numel()
        shape = (example.outputs, example.shape[-1])
        return Site("a", op, rows, example.shape[-1], example.outputs, example.shape, shape, post_op=example.post_op)
    weight = (example.outputs, example.shape[1] // example.groups, *example.filters)
    dims = len(example.filters)
    return Site(
        *("a", op, 1, 1, example.outputs, example.shape, weight),
        stride=(example.stride,) * dims,
        padding=(example.padding,) * dims,
        dilation=(example.dilation,) * dims,
        groups=example.groups,
        output_padding=(0,) * dims,
        post_op=example.post_op,
    )


@pytest.mark.parametrize("wrong", ["weight", "bias"])
def test_wrong_numbers_are_refused(api: primitives.Api, wrong: str) -> None:
    made, weight, bias = layer(api)
    assert bias is not None
    run = own.alone(made, SITE)
    assert numbers.refusal(FP32, SITE, run, weight, bias, "") is None
    (weight if wrong == "weight" else bias).flatten()[0] += 1
    refusal = numbers.refusal(FP32, SITE, run, weight, bias, "")
    assert refusal is not None
    assert refusal.startswith("gives wrong numbers")


@pytest.mark.parametrize("swallows", [False, True])
def test_a_relu_that_swallows_nan_is_refused(api: primitives.Api, swallows: bool) -> None:
    made, weight, bias = layer(api)
    run = own.alone(made, SITE)

    def relu(x: torch.Tensor) -> torch.Tensor:
        return run(x).relu().nan_to_num() if swallows else run(x).relu()

    refusal = numbers.refusal(FP32, replace(SITE, post_op="relu"), relu, weight, bias, "relu")
    assert (refusal is not None) == swallows


@pytest.mark.parametrize("post_op", sorted(primitives.ELTWISE))
def test_in_bf16_a_post_op_joins_the_product_where_that_stays_as_it_is(
    post_op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, weight = replace(SITE, post_op=post_op), random(16, 32, seed=1).bfloat16()
    plain, fused = (
        own.make(BF16, site, lambda: weight, None, lambda layout: [], form) for form in (Form.APART, Form.FUSED)
    )
    if plain is None:
        pytest.skip("this machine has no BF16")
    assert fused is not None
    assert fused.implementation == plain.implementation
    values = BF16.weight_values(weight, site)
    refusal = numbers.refusal(BF16, site, own.alone(fused, site), values, None, post_op)
    assert refusal is None or post_op in ("relu", "relu6")  # which swallow NaN on x86
    made = own.proven(BF16, site, weight, None)
    assert made is not None
    assert made.wanted.post_op == ("" if refusal else post_op)

    def by_another(api: primitives.Api, wanted: Wanted, *, bias: bool) -> Description | None:
        found = describe(api, wanted, bias=bias)
        return found and replace(found, implementation=found.implementation + wanted.post_op)

    monkeypatch.setattr(own, "describe", by_another)  # as on Arm, where the Compute Library takes no post-op in BF16
    assert own.make(BF16, site, lambda: weight, None, lambda layout: [], Form.FUSED) is None
    assert own.make(BF16, site, lambda: weight, None, lambda layout: [], Form.APART) is not None


def test_an_input_of_another_size_is_refused(api: primitives.Api) -> None:
    run = own.alone(layer(api)[0], SITE)
    for x in (random(7, 32), random(8, 31), random(8, 32).bfloat16()):
        with pytest.raises(ValueError, match="expected 1024 bytes"):
            run(x)


def test_strides_do_not_matter(api: primitives.Api) -> None:
    made, weight, bias = layer(api)
    x = random(32, 8).t()
    expected = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(own.alone(made, SITE)(x), expected, rtol=1e-5, atol=1e-5)


def test_the_first_that_is_preferred_is_chosen(api: primitives.Api) -> None:
    """Never a reference, also where it is asked for."""
    wanted = own_wanted()
    first = describe(api, wanted, bias=False)
    assert first is not None
    offered = [first.implementation]
    while api.advance(first.handle):
        offered.append(api.implementation(first.handle))
    useful = [name for name in offered if not implementations.is_reference(name)]
    for name in useful:
        chosen = describe(api, replace(wanted, preferred=("nobody's", name)), bias=False)
        assert chosen is not None
        assert chosen.implementation == name
    refused = describe(api, replace(wanted, preferred=("ref",)), bias=False)
    assert refused is not None
    assert refused.implementation == useful[0]


def own_wanted() -> Wanted:
    assert FP32.own is not None
    return FP32.own(FP32, SITE)


@pytest.mark.parametrize("name", ["ref:any", "gemm:ref", "ref", "x64:ref_int8"])
def test_references_are_known_by_name(name: str) -> None:
    assert implementations.is_reference(name)
    assert not implementations.is_reference("brg_prefetch:sve_256")


def test_threads_run_one_program_at_once() -> None:
    program = lowered(NET, IMAGE)
    module, _ = bind.Binder(False).bind(program)
    assert not wrong_at_once(module, [(random(2, 3, 16, 16, seed=seed),) for seed in range(4)])


def test_another_number_of_threads_is_honoured() -> None:
    before = torch.get_num_threads()
    module, _ = bind.Binder(False).bind(lowered(NET, IMAGE))
    expected = module(IMAGE)[0]
    try:
        for threads in (2, 3, 1):
            torch.set_num_threads(threads)
            torch.testing.assert_close(module(IMAGE)[0], expected, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_workspaces_are_used_again() -> None:
    workspaces = Workspaces()
    one, two = workspaces.take(), workspaces.take()
    assert one is not two
    workspaces.give(one)
    assert workspaces.take() is one


def test_a_call_that_fails_leaves_the_program_usable() -> None:
    module, _ = bind.Binder(False).bind(lowered(nn.Sequential(nn.Linear(32, 16), nn.ReLU()), random(8, 32)))
    expected = module(random(8, 32))[0]
    with pytest.raises(ValueError, match="expected 1024 bytes"):
        module(random(8, 33))
    assert torch.equal(module(random(8, 32))[0], expected)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_what_is_dropped_is_freed(api: primitives.Api) -> None:
    x = random(8, 32)

    def cycles(count: int) -> None:
        for i in range(1, count + 1):
            made, _, _ = layer(api)
            own.alone(made, SITE)(x)
            del made
            if i % 50 == 0:
                gc.collect()

    cycles(100)
    before = resident()
    cycles(1000)
    assert resident() - before < 1 << 20  # a leaked primitive alone would take 4 MB, a leaked weight 2


def test_names_of_implementations_decide_nothing(api: primitives.Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another release calls them: KleidiAI's are ``kai``. What runs, and what it gives, stays the same."""
    program, x = lowered(nn.Sequential(nn.Linear(32, 16), nn.ReLU()), random(8, 32)), random(8, 32)

    def run() -> tuple[torch.Tensor, str, str]:
        module, (entry,) = bind.Binder(False).bind(program)
        return module(x)[0], entry.kernel, entry.implementation

    found, kernel, implementation = run()
    assert implementation
    named = primitives.Api.implementation

    def renamed(self: primitives.Api, description: primitives.Handle) -> str:
        name = named(self, description)
        return name if is_reference(name) else f"kai_{len(name)}:sme"

    monkeypatch.setattr(primitives.Api, "implementation", renamed)
    again, other, called = run()
    assert (other, called) == (kernel, f"kai_{len(implementation)}:sme")
    assert torch.equal(again, found)


@pytest.mark.full
def test_many_shapes_leak_nothing(api: primitives.Api) -> None:
    """More than oneDNN's own cache of primitives holds, so that each is made anew the second time."""

    def shapes() -> None:
        for rows in range(1, 1101):
            own.alone(layer(api, rows)[0], replace(SITE, m=rows, shape=(rows, 32)))(random(rows, 32))
        gc.collect()

    def growth() -> int:
        before = resident()
        shapes()
        return resident() - before

    # oneDNN 3.13 takes three rounds until what it keeps is full; a leak would grow in each
    shapes()
    assert any(growth() < 8 << 20 for _ in range(4))


def test_programs_share_a_weight_where_the_layout_is_the_same() -> None:
    binder = bind.Binder(False)
    program = lowered(nn.Linear(32, 16), random(8, 32))
    binder.bind(program)
    packed = cast("dict[tuple[Any, ...], list[Any]]", binder.packed)
    (before,) = packed.values()
    binder.bind(program)
    assert [*packed.values()] == [before]
    assert len(before) == 1


# --- symbols --------------------------------------------------------------------------------------


def test_places_are_remembered_and_checked(tmp_path: Path) -> None:
    library = symbols.loaded()
    assert library is not None
    names = ["dnnl_primitive_execute", "dnnl_version"]
    found = symbols.addresses(library, names, tmp_path)
    assert set(found) == set(names)
    (file,) = (tmp_path / "symbols").iterdir()
    assert file.stem == library.build_id.hex()
    content = json.loads(file.read_text())
    exchanged = dict(zip(names, reversed([content["places"][name] for name in names]), strict=True))
    for places in (content["places"], exchanged, dict.fromkeys(names, -5), dict.fromkeys(names, 1 << 70), {}, 3):
        file.write_text(json.dumps({**content, "places": places}))
        assert symbols.addresses(library, names, tmp_path) == found
        assert json.loads(file.read_text()) == content
    for text in ("", "{", "[]", '{"schema": 0}', "[" * 100_000):
        file.write_text(text)
        assert symbols.addresses(library, names, tmp_path) == found
    assert symbols.addresses(library, [*names, "dnnl_nothing"], tmp_path) == {}


@pytest.mark.usefixtures("of_another_library")
@pytest.mark.parametrize("case", ["another build", "no build id", "another library", "no library", "no file", "no ELF"])
def test_a_build_without_symbols_runs_pytorchs_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    monkeypatch.setenv("ARMOPT_CACHE", str(tmp_path))
    library = symbols.loaded()
    assert library is not None
    other = symbols.loaded("libtorch_python.so")
    assert other is not None
    (tmp_path / "no.so").write_bytes(b"\x7fELF" + bytes(10))
    found = {
        "another build": replace(library, build_id=b"1"),
        "no build id": replace(library, build_id=b""),
        "another library": other,
        "no library": None,
        "no file": replace(library, path=str(tmp_path / "gone.so")),
        "no ELF": replace(library, path=str(tmp_path / "no.so")),
    }[case]
    monkeypatch.setattr(symbols, "loaded", lambda: found)
    assert own.unavailable()
    program = lowered(nn.Linear(32, 16), random(8, 32))
    module, (entry,) = bind.Binder(False).bind(program)
    assert (entry.kernel, entry.implementation) == (entry.planned, "")
    torch.testing.assert_close(module(random(8, 32)), program.graph_module(random(8, 32)), rtol=1e-5, atol=1e-6)
