"""What a bundle says of shapes and dtypes comes out before a kernel runs, or the bundle is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

import armopt
from armopt.bundle import dry_run, reader
from armopt.bundle.mapped_weights import MappedTensors
from armopt.bundle.program import Program
from armopt.environment import memory_for_process
from armopt.errors import BundleError, CaptureError
from armopt.ir import nesting
from armopt.ir.records import ExampleSpec, Signature, Symbol
from armopt.runtime import load
from tests.unit.test_hostile import Graph, check_refused, insert, programs, rewrite

pytestmark = pytest.mark.filterwarnings("ignore::armopt.errors.ArmoptWarning")
aten = torch.ops.aten


@pytest.fixture
def bundle(mlp_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mlp_bundle, tmp_path / "bundle"))


def every_layer(change: Callable[[Graph], Any]) -> Callable[[Graph], None]:
    def changed(graph: Graph) -> None:
        for program in programs(graph):
            for node in program["nodes"]:
                if node.get("shape"):
                    change(node)

    return changed


def _swap_weights(graph: Graph) -> None:
    for program in programs(graph):
        first, second = [node for node in program["nodes"] if node["op"] == "weight" and "bf16" in node["target"]]
        first["target"], second["target"] = second["target"], first["target"]


def _number_for_tensor(graph: Graph) -> None:
    insert("aten.sym_size.int", ["x", 0])(graph)
    for program in programs(graph):
        layer = next(node for node in program["nodes"] if node.get("shape"))
        program["nodes"].sort(key=lambda node: node["name"] != "x" and node["name"] != "more")
        layer["args"][0] = {"kind": "node", "name": "more"}


REFUSED: dict[str, tuple[Callable[[Graph], Any], str]] = {
    "more bytes than there are addresses": (insert("aten.full.default", [[1 << 60], 0]), "node more: can't run: "),
    "more bytes than 64 bits hold": (insert("aten.zeros.default", [[1 << 62, 1 << 62]]), "node more: can't run: "),
    "more memory than this machine has": (
        insert("aten.repeat.default", ["x", [1 << 40, 1]]),
        "node more: would take",
    ),
    "shapes that don't fit": (insert("aten.mm.default", ["x", "x"]), "node more: can't run: "),
    "a dimension that is not there": (insert("aten.select.int", ["x", 7, 0]), "node more: can't run: "),
    "another input than is recorded": (
        every_layer(lambda node: node["shape"].__setitem__(-1, node["shape"][-1] + 1)),
        "its input is 2x16 float32, and 2x17 float32 is recorded",
    ),
    "another output than is recorded": (
        every_layer(lambda node: node["output"].__setitem__(-1, node["output"][-1] + 1)),
        "its output is 2x32 float32, and ?x33 float32 is recorded",
    ),
    "another rank than is recorded": (
        every_layer(lambda node: node["output"].append(1)),
        "its output is 2x32 float32, and ?x32x1 float32 is recorded",
    ),
    "a kernel of another dtype": (
        every_layer(lambda node: node["args"].__setitem__(5, "conv1x1_bf16")),
        "its input is 2x16 float32, and 2x16 bfloat16 is recorded",
    ),
    "a weight of another shape": (_swap_weights, "node first: its input is 2x16 float32, and its weight 8x32 bfloat16"),
    "a sum in blocks of less than nothing": (
        every_layer(lambda node: node["args"].__setitem__(6, -1)),
        "node first: it rounds after -1 terms",
    ),
    "a number for a tensor": (_number_for_tensor, "node first: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_come_out_is_refused(bundle: Path, name: str) -> None:
    check_refused(bundle, *REFUSED[name])


def test_nothing_runs_before(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at load, nor while the whole graph is looked at."""
    rewrite(bundle, insert("aten.repeat.default", ["x", [1 << 40, 1]]))
    monkeypatch.setattr(load.Model, "run_flat", None)
    monkeypatch.setattr(load.Binder, "bind", None)
    monkeypatch.setattr(MappedTensors, "copy", None)
    with pytest.raises(BundleError, match="would take"):
        armopt.load(bundle)


@pytest.mark.parametrize(
    "change",
    [insert("aten.nonzero.default", ["x"]), insert("aten.unique_dim.default", ["x", 0])],
    ids=["nonzero", "unique"],
)
def test_sizes_that_depend_on_data_may_be_any(
    bundle: Path, change: Callable[[Graph], Any], mlp_inputs: tuple[torch.Tensor, ...]
) -> None:
    rewrite(bundle, change)
    assert armopt.load(bundle)(*mlp_inputs)["logits"].shape == (4, 8)


def test_weights_are_of_the_shape_that_layers_are_for(bundle: Path) -> None:
    weights = load_file(bundle / "weights.safetensors")
    name = next(name for name, tensor in weights.items() if tensor.dtype == torch.float32 and tensor.dim() == 1)
    weights[name] = weights[name][:-1].clone()
    save_file(weights, bundle / "weights.safetensors", metadata={"format": "pt"})
    rewrite(bundle)
    with pytest.raises(BundleError, match=r"node (first|second): its bias is \d+ float32, and its weight"):
        reader.read(bundle)


def _program(build: Callable[[fx.Graph, fx.Node], Any]) -> Program:
    graph = fx.Graph()
    graph.output((build(graph, graph.placeholder("x")),))
    return Program({"batch": 4}, fx.GraphModule(nn.Module(), graph), {}, {})


def _signature(*shape: int | str) -> Signature:
    tree = nesting.Inputs((nesting.Tensor(0),), {}, ("x",))
    outputs = nesting.Outputs(nesting.Tensor(0), (0,))
    return Signature(tree, outputs, (ExampleSpec("x", shape, "float32"),), (Symbol("batch", "s77", 1, None),))


@pytest.mark.parametrize("shape", [("batch", 3), ("2*s77", 3), ("s77 // 2 + 1 - 1", 3), ((4), 3)])
def test_dimensions_that_are_arithmetic_on_others(shape: tuple[int | str, ...]) -> None:
    program = _program(lambda graph, x: graph.call_function(aten.relu.default, (x,)))
    dry_run.check(program, _signature(*shape), {"batch": 4}, sys.maxsize, "here")


@pytest.mark.parametrize(
    "size", ["other", "__import__('os')", "s77**9999999", "(" * 5000, "f(s77)", "s77 //", "s77//0"]
)
def test_a_dimension_that_nothing_gives_is_refused(size: str) -> None:
    program = _program(lambda graph, x: x)
    with pytest.raises(BundleError):
        dry_run.check(program, _signature(size, 3), {"batch": 4}, sys.maxsize, "here")


def test_values_count_as_long_as_they_live() -> None:
    """A chain of ten results of 1 MB takes two at a time; ten that are all read at the end take ten."""
    chain = _program(lambda graph, x: _repeated(graph, x, 10))
    dry_run.check(chain, _signature(1 << 18), {}, 3 << 20, "here")
    held = _program(lambda graph, x: graph.call_function(aten.cat.default, ([x, _repeated(graph, x, 1)],)))
    with pytest.raises(BundleError, match="would take 4194304 bytes of memory, this process may have 3000000"):
        dry_run.check(held, _signature(1 << 18), {}, 3_000_000, "here")


def _repeated(graph: fx.Graph, x: fx.Node, count: int) -> fx.Node:
    for _ in range(count):
        x = graph.call_function(aten.sin.default, (x,))
    return x


def test_views_take_nothing() -> None:
    program = _program(lambda graph, x: graph.call_function(aten.expand.default, (x, [1 << 40, 1 << 10])))
    dry_run.check(program, _signature(1 << 10), {}, 1 << 16, "here")


def test_no_bundle_is_written_that_would_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise BundleError("its input is none", where=": node fc")

    monkeypatch.setattr(dry_run, "check", refuse)
    with pytest.raises(CaptureError, match="the graph can't be held in a bundle: its input is none"):
        armopt.optimize(nn.Linear(4, 4).eval(), (torch.ones(1, 4),), output=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_the_memory_of_a_process(tmp_path: Path) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory_for_process() <= whole
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (tmp_path / "sys/fs/cgroup/a").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_text("1048576\n")
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert memory_for_process(root=tmp_path) == 1 << 20
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/c\n2:cpu:/\n")
    (tmp_path / "sys/fs/cgroup/memory/c").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory/c/memory.limit_in_bytes").write_text("4096\n")
    assert memory_for_process(root=tmp_path) == 4096


def test_a_limit_of_address_space_counts_what_is_left_of_it() -> None:
    """In a process of its own: what is lowered stays so."""
    code = """
import resource
from pathlib import Path
from armopt.environment import memory_for_process
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (300 << 20), resource.RLIM_INFINITY))
print(memory_for_process())
"""
    left = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 200 << 20 < left <= 300 << 20
