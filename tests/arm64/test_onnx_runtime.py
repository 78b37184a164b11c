"""The real aarch64 ONNX Runtime: what its BF16 flag takes effect on, and models as armopt exports them.

Products of operands rounded to BF16 differ from those of FP32 a hundred times more than sums in another order do, so
the results tell which were made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from armopt.bundle.files import read_manifest
from armopt.emulation import EmulatedWorker
from armopt.onnx_export import export, session
from armopt.onnx_export.options import OnnxOptions
from armopt.plan.threshold_policy import ThresholdPolicy
from armopt.targets.emulated import core_named
from benchmarks.arm64 import onnx_page
from tests.arm64 import bundles
from tests.sampling import only, sampled

JOBS = "tests.arm64.jobs_onnx"
FLAG = {session.FAST_MATH: "1"}


@pytest.fixture(scope="module")
def core(require_torch):
    """core("graviton3"): a process with ONNX Runtime, and without torch."""
    workers = {}

    def start(cpu):
        folder = require_torch("2.10.0")
        if cpu not in workers:
            workers[cpu] = EmulatedWorker(core_named(cpu).name, preload="onnxruntime", folder=folder)
        return workers[cpu]

    yield start
    for worker in workers.values():
        worker.close()


# --- what the flag takes effect on ----------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A product x @ w in some form of graph, whether w is constant, and whether the flag takes effect on it."""

    nodes: Sequence[Any]
    engages: bool
    shape: tuple[Any, ...] = (32, 256)
    weight: tuple[int, ...] = (256, 128)
    constant: bool = True
    added: str = ""
    scale: float = 1.0
    transposed: bool = False


_node = helper.make_node
_MATMUL, _CONV = _node("MatMul", ["x", "w"], ["t"]), _node("Conv", ["x", "w"], ["t"])
_ADD, _SUB, _RELU = _node("Add", ["t", "b"], ["y"]), _node("Sub", ["t", "nb"], ["y"]), _node("Relu", ["t"], ["y"])
_ALONE = [_node("MatMul", ["x", "w"], ["y"])]
_TRANSPOSED = [_node("Transpose", ["w"], ["v"], perm=[1, 0]), _node("MatMul", ["x", "v"], ["y"])]
FORMS = {
    "MatMul": Form(_ALONE, True),
    "MatMul with one row": Form(_ALONE, True, (1, 256)),
    "MatMul of three dimensions": Form(_ALONE, True, (2, 16, 256)),
    "MatMul by 32 values": Form(_ALONE, True, (32, 4), (4, 8)),
    "MatMul by 30 values": Form(_ALONE, False, (32, 5), (5, 6)),
    "MatMul of two inputs": Form(_ALONE, True, constant=False),
    "MatMul and Sub": Form([_MATMUL, _SUB], True, added="b"),
    "MatMul and Sub, three dimensions": Form([_MATMUL, _SUB], True, (2, 16, 256), added="b"),
    # ONNX Runtime makes Gemm of these
    "MatMul and Add": Form([_MATMUL, _ADD], False, added="b"),
    "MatMul and Add, dynamic rows": Form([_MATMUL, _ADD], False, ("rows", 256), added="b"),
    "MatMul and Add, three dimensions": Form([_MATMUL, _ADD], False, (2, 16, 256), added="b"),
    # and not of this one
    "MatMul and Add, three dimensions, dynamic": Form([_MATMUL, _ADD], True, ("rows", 16, 256), added="b"),
    "Gemm": Form([_node("Gemm", ["x", "w", "b"], ["y"])], False, added="b"),
    "Gemm without a bias": Form([_node("Gemm", ["x", "w"], ["y"])], False),
    # a scale is fused
    "MatMul and Mul": Form([_MATMUL, _node("Mul", ["t", "half"], ["y"])], False, scale=0.5),
    # and so is a transpose of what is no constant
    "MatMul by a transposed input": Form(_TRANSPOSED, False, weight=(256, 256), constant=False, transposed=True),
    "MatMul by a transposed constant": Form(_TRANSPOSED, True, weight=(256, 256), transposed=True),
    "Conv": Form([_node("Conv", ["x", "w"], ["y"])], False, (1, 64, 14, 14), (64, 64, 1, 1)),
    "Conv and Relu": Form([_CONV, _RELU], False, (1, 64, 14, 14), (64, 64, 3, 3)),
    "Einsum": Form([_node("Einsum", ["x", "w"], ["y"], equation="mk,kn->mn")], False, constant=False),
    "Einsum by a constant": Form([_node("Einsum", ["x", "w"], ["y"], equation="mk,kn->mn")], False),
    # sizes that are wrong by a matrix that is no constant, see below
    "MatMul by many rows and few columns": Form(_ALONE, True, (32, 300), (300, 64)),
    "MatMul by many rows and columns": Form(_ALONE, True, (32, 1280), (1280, 257)),
}


def _make(form: Form, path: Path) -> tuple[Path, np.ndarray, np.ndarray, np.ndarray]:
    """The model, its inputs, and what it gives in FP32 and with operands in BF16."""
    random = np.random.default_rng(0)
    shape = tuple(
        2 if size == "rows" and len(form.shape) == 3 else 32 if size == "rows" else size for size in form.shape
    )
    x, w = (random.standard_normal(s, dtype=np.float32) for s in (shape, form.weight))
    b = random.standard_normal(form.weight[-1], dtype=np.float32)
    values = {"w": w, "b": b, "nb": -b, "half": np.float32(form.scale)}
    read = {name for node in form.nodes for name in node.input}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, form.shape)]
    feeds = {"x": x}
    if not form.constant:
        inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, w.shape))
        feeds["w"] = values.pop("w")
    constants = [numpy_helper.from_array(np.asarray(v), name) for name, v in values.items() if name in read]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(form.nodes, "form", inputs, [output], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    np.savez(path.with_suffix(".npz"), **feeds)
    return path, _product(form, x, w, b), _product(form, _rounded(x), _rounded(w), b)


def _product(form: Form, x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    if len(form.weight) == 4:
        y = torch.nn.functional.conv2d(torch.from_numpy(x).double(), torch.from_numpy(w).double()).numpy()
        return np.maximum(y, 0) if len(form.nodes) == 2 else y
    w = w.T if form.transposed else w
    y = form.scale * (x.astype(np.float64) @ w.astype(np.float64))
    return y + b if form.added else y


def _rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize("name", sampled(FORMS, 3))
def test_what_the_flag_takes_effect_on(name, core, tmp_path):
    form = FORMS[name]
    path, in_fp32, in_bf16 = _make(form, tmp_path / "form.onnx")
    worker = core("graviton3")
    for config, is_bf16 in (({}, False), (FLAG, form.engages)):
        found = worker.call(f"{JOBS}:run", path=str(path), inputs=str(path.with_suffix(".npz")), config=config).value[
            "y"
        ]
        right, wrong = (in_bf16, in_fp32) if is_bf16 else (in_fp32, in_bf16)
        least = np.abs(in_fp32 - in_bf16).max()
        assert np.abs(found - right).max() < 0.01 * least
        assert np.abs(found - wrong).max() > 0.9 * least


def _run(worker: EmulatedWorker, path: Path, config: dict[str, str], **more: Any) -> np.ndarray:
    inputs = str(path.with_suffix(".npz"))
    found: np.ndarray = worker.call(f"{JOBS}:run", path=str(path), inputs=inputs, config=config, **more).value["y"]
    return found


@pytest.mark.parametrize(
    ("rows", "columns", "threads", "is_right"),
    [
        *((256, 64, 1, True), (257, 64, 1, False), (257, 65, 1, True), (1024, 8, 1, False), (256, 8, 4, True)),
        *((1024, 196, 1, True), (1024, 196, 4, False)),  # four threads share the columns
    ],
)
def test_where_the_flag_is_wrong(rows, columns, threads, is_right, core, tmp_path):
    """By a matrix that is no constant, with more than 256 rows and 64 columns or fewer in a thread: why some products
    are exported as Einsum. A version that is right fails this test: then drop armopt/onnx_export/guard.py."""
    form = Form(_ALONE, True, (64, rows), (rows, columns), constant=False)
    path, in_fp32, in_bf16 = _make(form, tmp_path / "form.onnx")
    off = np.abs(_run(core("graviton3"), path, FLAG, threads=threads) - in_bf16).max()
    if is_right:
        assert off < 0.01 * np.abs(in_fp32 - in_bf16).max()
    else:
        # NaN is wrong too: what it reads beyond an operand is whatever lies there
        assert not off <= 10 * np.abs(in_fp32 - in_bf16).max()


@pytest.mark.parametrize("threads", [1, 4])
def test_a_constant_is_right_whatever_the_sizes(threads, core, tmp_path):
    for rows, columns in ((257, 64), (1024, 8), (1024, 196), (2048, 100)):
        path, in_fp32, in_bf16 = _make(Form(_ALONE, True, (64, rows), (rows, columns)), tmp_path / "form.onnx")
        off = np.abs(_run(core("graviton3"), path, FLAG, threads=threads) - in_bf16).max()
        assert off < 0.01 * np.abs(in_fp32 - in_bf16).max()


def test_a_constant_that_is_not_packed_is_as_wrong(core, tmp_path):
    path, in_fp32, in_bf16 = _make(Form(_ALONE, True, (64, 300), (300, 64)), tmp_path / "form.onnx")
    config = {**FLAG, "session.disable_prepacking": "1"}
    off = np.abs(_run(core("graviton3"), path, config) - in_bf16).max()
    assert not off <= 10 * np.abs(in_fp32 - in_bf16).max()


def test_a_core_without_bf16_ignores_the_flag(core, tmp_path):
    path, in_fp32, _ = _make(FORMS["MatMul"], tmp_path / "form.onnx")
    np.testing.assert_allclose(_run(core("graviton2"), path, FLAG), in_fp32, rtol=1e-5, atol=1e-4)


def test_the_version_that_the_manifest_names(core):
    assert core("graviton3").call(f"{JOBS}:version").value == session.SEEN_WITH


def test_it_knows_the_options_that_docs_onnx_md_counts(require_torch):
    """One that it doesn't know is taken without a word."""
    folder = require_torch("2.10.0").base_site / "onnxruntime" / "capi"
    (library,) = folder.glob("onnxruntime_pybind11_state*.so")
    known = library.read_bytes()
    names = {name for changed in onnx_page.OPTIONS.values() for name in changed if "." in name}
    assert len(names) > 3
    assert [name for name in sorted({*names, session.FAST_MATH}) if name.encode() + b"\0" not in known] == []


# --- whole models ---------------------------------------------------------------------------------


class LongAttention(torch.nn.Module):
    """300 tokens: the second product of attention has 300 rows and 16 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in self.layers[:3])
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.layers[3](y.transpose(1, 2).flatten(2))


def _attention() -> torch.nn.Module:
    model = LongAttention()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


_LONG = bundles.Example(_attention, ({"": torch.randn(1, 300, 64, generator=torch.Generator().manual_seed(1))},))


@pytest.mark.usefixtures("onnx_functions")
@pytest.mark.parametrize(
    "example", only(["bert", "gpt2", "mobilenet", "long attention", "convnet"], ["long attention", "convnet"])
)
def test_an_exported_model(example, core, tmp_path, figure, monkeypatch):
    """In FP32 it gives what it gives here, and with the session options of its manifest it multiplies in BF16."""
    monkeypatch.setitem(bundles.EXAMPLES, "long attention", _LONG)
    made = bundles.make(example, "graviton3", tmp_path, policy=ThresholdPolicy(1))
    done = export.export(made.path, tmp_path / "model.onnx", OnnxOptions("bf16"))
    section = read_manifest(made.path).onnxruntime
    config = {name: entry.value for name, entry in section.session_config.items()}
    assert config == FLAG
    (inputs,) = made.calls
    feeds = {done.inputs[0] if name == "" else name: tensor.numpy() for name, tensor in inputs.items()}
    np.savez(tmp_path / "inputs.npz", **feeds)
    errors = {}
    for flag in ({}, config):
        arguments = {"path": str(tmp_path / "model.onnx"), "inputs": str(tmp_path / "inputs.npz"), "config": flag}
        found = core("graviton3").call(f"{JOBS}:run", threads=2, **arguments).value
        values = torch.from_numpy(found[done.outputs[0]])
        (reference,) = made.reference
        cosine = torch.nn.functional.cosine_similarity(values.flatten().double(), reference.flatten().double(), 0)
        assert cosine >= 0.999
        errors[bool(flag)] = float((values - reference).norm() / reference.norm())
    figure(f"onnx {example}: relative error {errors[False]:.5f} in FP32, {errors[True]:.5f} with the flag")
    assert errors[True] > errors[False]
