"""What the tests of all passes share: cases, the text form of a graph, and the tests that every pass has.

A test file lists its :class:`Case` objects in a subclass of :class:`Contract`, which tests each: golden text, what is
declared of it, idempotence, numerics against the graph before, and true metadata on every node.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from armopt import capture, targets
from armopt.compiler.graph_text import graph_text, operation_name, type_text
from armopt.ir import graph as g
from armopt.ir.records import Captured, Decision, PassResult, Plan
from armopt.kernels import sites, table
from armopt.passes import PREPARE, Pass, pipeline
from armopt.passes.keep_strides import KeepStrides

GOLDEN = Path(__file__).parent / "golden"


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A module in eval mode whose parameters and statistics are random and far from a batch norm's 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                for name, tensor in part.state_dict().items():
                    if tensor.is_floating_point():
                        tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor))
    return model


def until(last: type | None) -> tuple[Pass, ...]:
    """The passes of PREPARE in front of `last`; all of them for None.

    KeepStrides is left out: of a graph that ends in a convolution it would add to each text the same call.
    """
    steps = tuple(step for step in PREPARE if type(step) is not KeepStrides)
    return steps if last is None else steps[: [type(step) for step in steps].index(last)]


def plan_for(target: str, graph_module: fx.GraphModule, rows: int = 64) -> Plan:
    """A plan by a rule of its own, so that these tests don't depend on the planner: for a static graph."""
    chosen = targets.load(target)
    decisions = []
    for site in sites.find(graph_module, {}):
        if site.op == "linear":
            name = "conv1x1" if site.m >= rows and site.n > 1 else "blas"
            name = {"conv1x1": "conv1x1_bf16", "blas": "blas_fp32_w16"}[name] if chosen.bf16 else f"{name}_fp32"
        elif site.transposed:
            name = "conv_transpose_fp32" if len(site.shape) == 4 and site.groups == 1 else "aten_conv"
        else:
            name = "conv_bf16" if chosen.bf16 and site.groups == 1 and len(site.shape) < 5 else "conv_fp32"
        precision = table.get(name).precision
        decisions.append(Decision(site.node, site.op, name, precision, "plain", site.shape, f"the tests want {name}"))
    return Plan(chosen, "tests", {}, tuple(decisions))


@dataclass(frozen=True, eq=False)
class Case:
    """One model in front of one pass.

    Attributes:
        name: Also of its golden file.
        model: Builds the module; seeded.
        inputs: By position.
        batch: As ``--batch``; two sizes make the first dimension dynamic.
        ops: Operations that must be there afterwards, and how often.
        absent: Operations that must be gone.
        skips: The reasons for which nodes are skipped, in order.
        rewritten: How many nodes are rewritten; None where the golden text says it well enough.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    batch: tuple[int, ...] = ()
    ops: Mapping[str, int] = field(default_factory=dict)
    absent: Sequence[str] = ()
    skips: Sequence[str] = ()
    rewritten: int | None = None

    def __str__(self) -> str:
        return self.name


@functools.cache
def _captured(case: Case) -> Captured:
    return capture.module(seeded(case.model), case.inputs, batch=case.batch, source=case.name)


class Contract:
    """The tests of one pass. A subclass says which pass it is, what runs in front of it, and on what."""

    cases: Sequence[Case] = ()
    #: For golden files: the pass's file name.
    folder = ""
    #: Largest allowed error as a share of the largest value of the graph before; the subclass says why.
    tolerance = 0.0

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """What runs in front of the pass."""
        raise NotImplementedError

    def make(self, graph_module: fx.GraphModule) -> Pass:
        """The pass; it may depend on the graph, as a plan does."""
        raise NotImplementedError

    def graphs(self, case: Case) -> tuple[fx.GraphModule, fx.GraphModule, PassResult, Captured]:
        """The graph before, the graph after, what the pass said, and what was captured."""
        captured, before = _prepared(type(self), case)
        result = self.make(before)(g.copy(before))
        return before, result.graph_module, result, captured

    def test_golden(self, case: Case, update_golden: bool) -> None:
        before, after, result, _ = self.graphs(case)
        found = golden_text(case, self, before, after, result)
        path = GOLDEN / self.folder / f"{case.name}.txt"
        if update_golden:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found)
        assert path.exists(), f"no {path}: look at `git diff` after pytest tests/passes --update-golden"
        assert numbered(found) == numbered(path.read_text()), (
            "if this change is meant: pytest tests/passes --update-golden"
        )

    def test_declared(self, case: Case) -> None:
        _, after, result, _ = self.graphs(case)
        names = [operation_name(node.target) for node in after.graph.nodes if node.op == "call_function"]
        assert {op: names.count(op) for op in case.ops} == dict(case.ops)
        assert not set(case.absent) & set(names)
        assert [skip.reason for skip in result.skipped] == list(case.skips)
        assert all(skip.node for skip in result.skipped)
        assert case.rewritten is None or len(result.rewritten) == case.rewritten
        assert result.modified == bool(result.rewritten)

    def test_idempotent(self, case: Case) -> None:
        before, after, _, _ = self.graphs(case)
        text = graph_text(after)
        second = self.make(before)(after)
        assert second.modified is False
        assert second.rewritten == ()
        assert graph_text(second.graph_module) == text

    def test_numerics(self, case: Case) -> None:
        before, after, _, captured = self.graphs(case)
        with torch.no_grad():
            expected, found = before(*captured.example), after(*captured.example)
        assert len(expected) == len(found) > 0
        for a, b in zip(expected, found, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert torch.isfinite(b).all()
            if a.numel():
                error = float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-30))
                assert error <= self.tolerance, f"off by {error} of the largest value"

    def test_metadata(self, case: Case) -> None:
        _, after, _, captured = self.graphs(case)
        pipeline.check_invariants(after)
        check_metadata(after, captured.example)


@functools.cache
def _prepared(contract: type[Contract], case: Case) -> tuple[Captured, fx.GraphModule]:
    """The capture and the graph before, once for all tests of a case; nobody may change them."""
    captured = _captured(case)
    return captured, contract().before(g.copy(captured.graph_module))


class TrueMetadata(fx.Interpreter):
    """Runs a graph and compares every value with its node's ``meta["val"]``: shape (symbols too) and dtype."""

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        super().__init__(graph_module)
        self.checked = 0
        self.sizes: dict[str, int] = {}
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        for node, tensor in zip(placeholders, inputs, strict=True):
            for size, real in zip(node.meta["val"].shape, tensor.shape, strict=True):
                if not isinstance(size, int) and size.node.expr.is_symbol:
                    self.sizes[str(size.node.expr)] = real

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            self._compare(n, n.meta["val"], result)
            self.checked += 1
        return result

    def _compare(self, node: fx.Node, said: Any, found: Any) -> None:
        if isinstance(said, (tuple, list)):
            for part, real in zip(said, found, strict=True):
                self._compare(node, part, real)
        elif isinstance(said, Tensor):
            assert said.dtype == found.dtype, f"{node.name} is {found.dtype}, its metadata says {said.dtype}"
            for size, real in zip(said.shape, found.shape, strict=True):
                if not isinstance(size, int) and size.node.expr.is_symbol:  # what depends on data is met here first
                    self.sizes.setdefault(str(size.node.expr), real)
            expected = g.shape_at(said.shape, self.sizes)
            assert expected == tuple(found.shape), f"{node.name} is {tuple(found.shape)}, not {expected}"
        elif isinstance(said, (int, torch.SymInt)):
            assert g.size_at(said, self.sizes) == int(found)


def check_metadata(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Every node's ``meta["val"]`` is what the node gives on real inputs."""
    interpreter = TrueMetadata(graph_module, inputs)
    with torch.no_grad():
        interpreter.run(*inputs)
    assert interpreter.checked == len(graph_module.graph.nodes) - 1


def golden_text(
    case: Case, contract: Contract, before: fx.GraphModule, after: fx.GraphModule, result: PassResult
) -> str:
    """The golden file's content."""
    module = str(seeded(case.model)).replace("\n", "\n    ")
    # before torch 2.13 batch norms didn't say that they have a bias
    module = re.sub(r"affine=(True|False), (?=track_running_stats)", r"\g<0>bias=\1, ", module)
    shapes = ", ".join(type_text(tensor) for tensor in case.inputs)
    parts = [
        f"# pytest tests/passes --update-golden writes this file; {type(contract).__name__}[{case.name}] compares",
        f"module: {module}",
        f"inputs: {shapes}" + (f", --batch {','.join(map(str, case.batch))}" if case.batch else ""),
        f"\nbefore:\n{graph_text(before)}",
        f"\nafter:\n{graph_text(after)}",
        "\nrewritten: " + (", ".join(result.rewritten) or "nothing"),
        *[f"skipped: {skip.node}: {skip.reason}" for skip in result.skipped],
    ]
    return "\n".join(parts) + "\n"


def numbered(text: str) -> str:
    """The text of a graph with nodes of one name counted in their order: releases of torch leave other gaps."""
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name in re.findall(r"^ *(\w+): ", text, re.MULTILINE):
        if name not in names:
            base = re.sub(r"(?<=[a-zA-Z])_\d+$", "", name)
            names[name] = f"{base}_{counts[base]}" if base in counts else base
            counts[base] = counts.get(base, 0) + 1
    return re.sub(r"(?<![.\w])\w+(?![.\w])", lambda word: names.get(word[0], word[0]), text)


def run_pass(step: Pass, model: Callable[[], nn.Module], *inputs: Tensor, before: Sequence[Pass] = ()) -> PassResult:
    """The result of one pass on a captured model, after `before`."""
    captured = capture.module(seeded(model), inputs)
    graph_module, _ = pipeline.run(g.copy(captured.graph_module), before)
    return step(graph_module)


def by_hand(*inputs: Tensor, constants: Mapping[str, Tensor], build: Callable[..., Any]) -> fx.GraphModule:
    """A graph written by hand, for what torch.export never emits. `build(call, x…, **constants)` returns the result.

    ``call(target, *args)`` inserts a call with true metadata.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    root = nn.Module()
    graph = fx.Graph()
    placed = []
    for i, tensor in enumerate(inputs):
        node = graph.placeholder(f"x{i}")
        node.meta["val"] = mode.from_tensor(tensor)
        placed.append(node)
    held = {}
    for name, tensor in constants.items():
        root.register_buffer(name, tensor)
        held[name] = graph.get_attr(name)
        held[name].meta["val"] = mode.from_tensor(tensor)

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        with mode:
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)
        return node

    graph.output((build(call, *placed, **held),))
    return fx.GraphModule(root, graph)


def storages(graph_module: fx.GraphModule) -> int:
    """How many different pieces of memory the constants take."""
    return len({tensor.untyped_storage().data_ptr() for tensor in graph_module.buffers()})


class Forward(nn.Module):
    """Runs a function of its parts and the inputs: ``Forward(lambda s, x: s.conv(x), conv=nn.Conv2d(…))``."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self._function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Any:
        return self._function(self, x)


class Forward2(Forward):
    """The same with two inputs, ``x`` and ``y``."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self._function(self, x, y)
