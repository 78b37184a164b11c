"""What becomes of each kind of layer and constant, checked in ONNX Runtime."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import nn

import armopt
from armopt.accuracy.runs import InFp32
from armopt.bundle import reader
from armopt.bundle.files import read_manifest
from armopt.bundle.manifest import LayerCount, OnnxModel, SessionFlag
from armopt.errors import BundleError, InputError
from armopt.ir.records import Site, Target
from armopt.kernels import table
from armopt.onnx_export import export, session, standard, store, translate
from armopt.onnx_export.guard import guard
from armopt.onnx_export.options import OnnxOptions
from armopt.plan.planner import Choice
from armopt.plan.threshold_policy import ThresholdPolicy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("onnx_functions")]

BF16 = ThresholdPolicy(1)
#: FP32 in another order of summation.
SAME = {"rtol": 1e-5, "atol": 1e-5}


@dataclasses.dataclass(frozen=True)
class InFp32Alone:
    """A policy that rounds nothing."""

    name: str = "fp32"

    def choose(self, sites: Sequence[Site], target: Target) -> Sequence[Choice]:
        return [Choice(table.get("blas_fp32" if site.op == "linear" else "conv_fp32"), "asked for") for site in sites]


def make(
    folder: Path,
    model: nn.Module,
    inputs: Any,
    *,
    batch: Sequence[int] = (),
    policy: Any = BF16,
    onnx: Any = None,
    target: str = "graviton3",
) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    output = armopt.Output(folder / "bundle", force=True, onnx=onnx)
    checks = armopt.Checks(min_cosine=0.9)
    armopt.optimize(model.eval(), inputs, output=output, target=target, batch=batch, policy=policy, checks=checks)
    return folder / "bundle"


def run(path: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The model in ONNX Runtime, after the full check and strict shape inference."""
    onnx.checker.check_model(str(path), full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
    opened = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {entry.name: tensor.numpy() for entry, tensor in zip(opened.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(value) for value in opened.run(None, feeds)]


def reference(bundle: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The bundle's own graph and weights, with activations in FP32."""
    read = reader.read(bundle)
    with torch.no_grad():
        results = InFp32(read.programs[-1].graph_module).run(*inputs)
    return [results[i] for i in read.whole.signature.outputs.positions]


def agree(bundle: Path, path: Path, *inputs: torch.Tensor) -> None:
    for found, expected in zip(run(path, *inputs), reference(bundle, *inputs), strict=True):
        torch.testing.assert_close(found, expected, **SAME)


def operations(path: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# --- the form of each layer -----------------------------------------------------------------------


class Layers(nn.Module):
    """One of each kind, and all functions behind one, in branches."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleDict(
            {
                "linear": nn.Linear(16, 8),
                "without_bias": nn.Linear(16, 8, bias=False),
                "small": nn.Linear(16, 1),  # fewer values than the flag takes
            }
        )
        self.three_dimensions = nn.Linear(5, 8)
        self.images = nn.ModuleDict(
            {
                "pixel": nn.Conv2d(64, 48, 1),
                "pixel_without_bias": nn.Conv2d(64, 48, 1, bias=False),
                "pixel_with_stride": nn.Conv2d(64, 48, 1, stride=2),
                "pixel_of_few_channels": nn.Conv2d(64, 24, 1),  # the transposes would cost more
                "padded_pixel": nn.Conv2d(64, 48, 1, padding=1),
                "pixel_in_groups": nn.Conv2d(64, 48, 1, groups=2),
                "filter": nn.Conv2d(64, 48, 3, 2, 1),
                "transposed": nn.ConvTranspose2d(64, 48, 3, 2, 1, output_padding=1, groups=2),
            }
        )
        self.pixel_of_one_dimension = nn.Conv1d(64, 48, 1)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = (x, -x, x.abs())  # layers on one input would be merged
        rows = [layer(each) for layer, each in zip(self.rows.values(), inputs, strict=True)]
        images = [layer(image) for layer in self.images.values()]
        return (*rows, *images, self.three_dimensions(image), self.pixel_of_one_dimension(image.flatten(2)))


FAST = {
    *("rows_linear", "rows_without_bias", "three_dimensions", "pixel_of_one_dimension"),
    *("images_pixel", "images_pixel_without_bias", "images_pixel_with_stride"),
}
EXACT = {
    *("rows_small", "images_padded_pixel", "images_pixel_in_groups", "images_filter", "images_transposed"),
    "images_pixel_of_few_channels",
}
LAYER_INPUTS = (noise(3, 16), noise(2, 64, 5, 5))


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("layers"), Layers(), LAYER_INPUTS)


def test_forms_for_the_flag(layers: Path, tmp_path: Path) -> None:
    program = reader.read(layers).programs[-1]
    made = standard.standard(program, fast_math=True)
    assert (set(made.fast), {site.node for site in program.sites.values()} - set(made.fast)) == (FAST, EXACT)
    path = tmp_path / "model.onnx"
    done = export.export(layers, path)
    assert done.session.layers == LayerCount(len(FAST), len(FAST | EXACT))
    found = operations(path)
    assert (found["MatMul"], found["Sub"]) == (len(FAST), len(FAST) - 2)  # two have no bias
    assert (found["Gemm"], found["Conv"], found["ConvTranspose"], found["Add"]) == (1, 4, 1, 0)
    assert found["Transpose"] == 2 * 4 - 1  # two layers share their input
    agree(layers, path, *LAYER_INPUTS)


def test_plain_forms(layers: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    done = export.export(layers, path, OnnxOptions(fast_math=False))
    assert done.session.layers.bf16 == 0
    assert done.session.session_config[session.FAST_MATH].value == "0"
    found = operations(path)
    assert (found["Gemm"], found["Conv"], found["ConvTranspose"], found["MatMul"]) == (4, 8, 1, 0)
    agree(layers, path, *LAYER_INPUTS)


def test_what_is_planned_in_fp32_has_plain_forms(tmp_path: Path) -> None:
    bundle = make(tmp_path, Layers(), LAYER_INPUTS, policy=InFp32Alone())
    assert standard.standard(reader.read(bundle).programs[-1], fast_math=True).fast == ()
    assert read_manifest(bundle).onnxruntime.session_config[session.FAST_MATH].engages is False


class Functions(nn.Module):
    """What may stand behind a layer: a residual addition, and functions of one value."""

    ALL = (
        *(nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid()),
        *(nn.Tanh(), nn.ReLU6(), nn.SiLU()),
    )

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in self.ALL])
        self.first, self.second = nn.Linear(8, 8), nn.Conv1d(48, 48, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        functions = [function(layer(x)) for function, layer in zip(self.ALL, self.layers, strict=True)]
        return (*functions, torch.relu(self.second(self.first(x) + x) + x))


def test_functions_behind_a_layer(tmp_path: Path) -> None:
    """Each is one operation where ONNX has it."""
    x = noise(2, 48, 8)
    bundle = make(tmp_path, Functions(), (x,))
    sites = reader.read(bundle).programs[-1].sites.values()
    assert {site.post_op for site in sites} == {
        *("relu", "gelu", "gelu_tanh", "hardswish", "hardsigmoid", "sigmoid", "tanh", "relu6", "silu"),
        *("add", "add_relu", "none"),
    } - {"none"}
    path = tmp_path / "model.onnx"
    export.export(bundle, path)
    found = operations(path)
    assert {name: found[name] for name in ("Relu", "Gelu", "HardSwish", "HardSigmoid", "Tanh", "Clip")} == {
        "Relu": 2,
        "Gelu": 2,
        "HardSwish": 1,
        "HardSigmoid": 1,
        "Tanh": 1,
        "Clip": 1,
    }
    assert (found["Sigmoid"], found["Mul"], found["Add"]) == (2, 1, 2)  # silu is x * sigmoid(x)
    agree(bundle, path, x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in self.layers)
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(("tokens", "guarded"), [(256, 0), (257, 1)])
def test_products_that_the_flag_gets_wrong_are_kept_from_it(tokens: int, guarded: int, tmp_path: Path) -> None:
    """Of two activations, and a sum over more than 256: see tests/arm64/test_onnx_runtime.py. Query, key and value are
    one product."""
    x = noise(1, tokens, 16)
    bundle = make(tmp_path, Attention(), (x,))
    path = tmp_path / "model.onnx"
    export.export(bundle, path)
    found = operations(path)
    assert (found["Einsum"], found["MatMul"]) == (guarded, 3 - guarded)
    agree(bundle, path, x)


class Products(nn.Module):
    """Of two activations with a sum over 300, in all ranks, behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(300, 300)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.layer(a)
        return y @ b, y[0] @ b, y @ b[:, 0], y[0, 0] @ b[:, 0], y[0, 0] @ b, y.unsqueeze(1) @ b.expand(2, 2, 300, 4)


def test_guarded_products_of_all_ranks(tmp_path: Path) -> None:
    inputs = noise(2, 5, 300), noise(300, 4)
    bundle = make(tmp_path, Products(), inputs)
    path = tmp_path / "model.onnx"
    export.export(bundle, path)
    assert (operations(path)["Einsum"], operations(path)["MatMul"]) == (6, 1)
    for found, expected in zip(run(path, *inputs), reference(bundle, *inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)  # sums of 300, values up to 300
    export.export(bundle, path, OnnxOptions(fast_math=False), force=True)
    assert operations(path)["Einsum"] == 0


def test_constants_are_found_in_a_deep_graph() -> None:
    """What constants alone decide is one, however long the way; what comes of an input is none."""
    x, w = (onnx_ir.Value(name=name, shape=onnx_ir.Shape([300, 300])) for name in "xw")
    x.type = w.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    w.const_value = onnx_ir.tensor(torch.ones(300, 300))
    nodes, ends = [], []
    for end in (x, w):
        for _ in range(3000):
            nodes.append(onnx_ir.node("Relu", [end]))
            end = nodes[-1].outputs[0]
        ends.append(end)
    nodes += [onnx_ir.node("MatMul", [x, end]) for end in ends]
    for node in nodes:
        node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    outputs = [node.outputs[0] for node in nodes[-2:]]
    graph = onnx_ir.Graph([x], outputs, nodes=nodes, initializers=[w], opset_imports={"": 20}, name="deep")
    guarded = guard(onnx_ir.Model(graph, ir_version=10))
    assert len(guarded) == 1
    assert [node.op_type for node in graph][-2:] == ["Einsum", "MatMul"]
    assert graph.outputs[0].producer().op_type == "Einsum"


# --- constants ------------------------------------------------------------------------------------


class Text(nn.Module):
    """An embedding whose table is the last layer's weight, positions from a constant, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(50, 16), nn.Embedding(8, 16)
        self.scale = nn.Parameter(torch.ones(16, 16))
        self.register_buffer("order", torch.arange(8))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = (self.table(ids) + self.positions(self.order)) @ self.scale
        return {"logits": nn.functional.linear(x, self.table.weight), "ids": ids + 1}  # named as an input is


@pytest.mark.parametrize(("weights", "least", "most"), [("fp32", 1.0, 1.15), ("bf16", 0.5, 0.65), ("fp16", 0.5, 0.65)])
def test_dtypes_of_weights(weights: str, least: float, most: float, tmp_path: Path) -> None:
    ids = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(1))
    bundle = make(tmp_path, Text(), (ids,))
    path = tmp_path / "model.onnx"
    done = export.export(bundle, path, OnnxOptions(weights))
    fp32 = 4 * (50 * 16 * 2 + 8 * 16 + 16 * 16)  # the table twice: rounded for the layer, and as it is
    assert least * fp32 <= done.files[path] <= most * fp32 + 2500
    assert operations(path)["Cast"] == {"fp32": 0}.get(weights, 3)
    found = {entry.name: entry.data_type for entry in onnx.load(path).graph.initializer}
    assert all("bf16" not in name or dtype == onnx.TensorProto.BFLOAT16 for name, dtype in found.items())
    first, second = run(path, ids)
    logits, out = reference(bundle, ids)
    assert [o.name for o in onnx.load(path).graph.output] == ["logits", "ids_out"]
    assert torch.equal(second, out)
    # one more rounding, of the embedding, to 8 or 11 bits
    tolerance = {"fp32": 1e-5, "bf16": 2**-7, "fp16": 2**-10}[weights]
    torch.testing.assert_close(first, logits, rtol=tolerance, atol=tolerance * float(logits.abs().max()))


class Tied(nn.Module):
    """An embedding and an output layer of one table, large enough to be kept in BF16."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden = nn.Embedding(5000, 64), nn.Linear(64, 64)
        self.out = nn.Linear(64, 5000, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(torch.relu(self.hidden(self.table(ids))))
        return logits


@pytest.mark.parametrize("fast_math", [True, False])
@pytest.mark.parametrize(("weights", "size"), [("fp32", 4), ("bf16", 2)])
def test_a_tied_table_is_written_once(weights: str, size: int, fast_math: bool, tmp_path: Path) -> None:
    ids = torch.randint(0, 5000, (2, 8), generator=torch.Generator().manual_seed(1))
    bundle = make(tmp_path, Tied(), (ids,))
    path = tmp_path / "model.onnx"
    done = export.export(bundle, path, OnnxOptions(weights, fast_math=fast_math))
    assert done.files[path] <= size * (5000 * 64 + 64 * 64) + 4096
    (found,), (expected,) = run(path, ids), reference(bundle, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_weight_that_a_dtype_can_not_hold_stays(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    x = noise(3, 16)
    bundle = make(tmp_path, model, (x,))
    with torch.no_grad():
        model[0].weight[0, 0] = 1e6
    armopt.optimize(model, (x,), output=armopt.Output(bundle, force=True), policy=BF16)
    done = export.export(bundle, tmp_path / "model.onnx", OnnxOptions("fp16"))
    assert done.kept == ("_0_weight_kn",)
    assert operations(tmp_path / "model.onnx")["Cast"] == 1
    for found, expected in zip(run(tmp_path / "model.onnx", x), reference(bundle, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_layer_that_is_used_twice_has_one_weight(tmp_path: Path) -> None:
    layer = nn.Linear(64, 64)
    x = noise(3, 64)
    bundle = make(tmp_path, nn.Sequential(layer, nn.Tanh(), layer), (x,))
    done = export.export(bundle, tmp_path / "model.onnx")
    assert operations(tmp_path / "model.onnx")["MatMul"] == 2
    assert done.files[tmp_path / "model.onnx"] < 1.2 * 4 * 64 * 64
    agree(bundle, tmp_path / "model.onnx", x)


def test_weights_are_not_in_memory_until_they_are_stored(tmp_path: Path) -> None:
    bundle = make(tmp_path, nn.Sequential(nn.Linear(256, 256), nn.Conv1d(1, 4, 3)), (noise(2, 1, 256),))
    (program,) = reader.read(bundle).programs
    made = standard.standard(program, fast_math=True)
    held = {name: value.untyped_storage().nbytes() for name, value in made.graph_module.named_buffers()}
    assert {held[name] for name in made.weights} == {4}
    assert sum(held.values()) < 2000
    assert sum(make_it().numel() for make_it in made.weights.values()) == 256 * 256 + 12


# --- dynamic dimensions, names --------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 48), nn.Conv2d(48, 48, 1)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self.a(x), [self.b(image).mean((2, 3)) + self.a(x), x * 2]


def test_a_dynamic_batch(tmp_path: Path) -> None:
    bundle = make(tmp_path, Two(), (noise(4, 16), noise(4, 48, 5, 5)), batch=(1, 4))
    path = tmp_path / "model.onnx"
    done = export.export(bundle, path)
    assert (done.inputs, done.outputs) == (("x", "image"), ("output_0", "output_1.0", "output_1.1"))
    assert done.session.model.bucket == {"batch": 4}
    graph = onnx.load(path).graph
    for entry in [*graph.input, *graph.output]:
        first, *rest = entry.type.tensor_type.shape.dim
        assert first.dim_param == "batch"
        assert all(size.dim_value for size in rest)
    for batch in (1, 2, 7):
        agree(bundle, path, noise(batch, 16), noise(batch, 48, 5, 5))
    # torch.onnx notes the stack of every node
    assert not any(node.metadata_props or node.doc_string for node in graph.node)
    for folder in (Path.home(), Path(torch.__file__).parent, Path(__file__).parent):
        assert str(folder).encode() not in path.read_bytes()


def test_dynamic_dimensions_of_a_pt2(tmp_path: Path) -> None:
    """The batch and the length, as in the exported program."""
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 8), nn.Tanh())
    torch.manual_seed(0)
    dims = {0: torch.export.Dim("rows", min=1, max=64), 1: torch.export.Dim("length", min=2, max=128)}
    program = torch.export.export(model, (torch.ones(2, 6, dtype=torch.int64),), dynamic_shapes=(dims,))
    armopt.optimize(program, output=tmp_path / "bundle", policy=BF16)
    path = tmp_path / "model.onnx"
    export.export(tmp_path / "bundle", path)
    (entry,) = onnx.load(path).graph.input
    assert [size.dim_param != "" for size in entry.type.tensor_type.shape.dim] == [True, True]
    for shape in ((2, 6), (5, 100), (1, 2)):
        agree(tmp_path / "bundle", path, torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1)))


# --- what a model says of itself ------------------------------------------------------------------


def test_metadata_and_manifest(tmp_path: Path) -> None:
    bundle = make(tmp_path, nn.Linear(16, 8), (noise(3, 16),), onnx=OnnxOptions("bf16"))
    described = read_manifest(bundle)
    section = described.onnxruntime
    assert section.model == OnnxModel(20, "bf16", {}, file="model.onnx")
    assert section.session_config[session.FAST_MATH].engages is True
    assert section.layers == LayerCount(1, 1)
    export.export(bundle, tmp_path / "apart.onnx", OnnxOptions("bf16"))
    inside, apart = (
        {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        for path in (bundle / "model.onnx", tmp_path / "apart.onnx")
    )
    assert inside["armopt.target"] == "graviton3"
    assert inside["armopt.graph_sha256"] == described.files["graph.json"]
    assert inside["armopt.weights_sha256"] == described.files["weights.safetensors"]
    assert inside["armopt.model_digest"] == described.model.digest
    assert apart.pop("armopt.bundle_digest") == json.loads((bundle / "manifest.json").read_text())["digest"]
    assert apart == inside  # a bundle's own digest can't be in the bundle
    graphs = [onnx.load(path).graph for path in (bundle / "model.onnx", tmp_path / "apart.onnx")]
    assert graphs[0] == graphs[1]
    agree(bundle, bundle / "model.onnx", noise(3, 16))
    # like every file of a bundle it is hashed
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx: was changed"):
        reader.read(bundle)


def test_a_bundle_without_an_onnx_model_has_the_section_too(mlp_bundle: Path) -> None:
    section = read_manifest(mlp_bundle).onnxruntime
    assert section.model is None
    assert section.session_config[session.FAST_MATH].value == "1"


def test_a_target_without_bf16(tmp_path: Path) -> None:
    bundle = make(tmp_path, nn.Linear(16, 8), (noise(3, 16),), target="graviton2")
    section = read_manifest(bundle).onnxruntime
    assert dataclasses.replace(section.session_config[session.FAST_MATH], why="") == SessionFlag("0", False, "")
    assert section.layers == LayerCount(0, 1)


# --- errors ---------------------------------------------------------------------------------------


class Bessel(nn.Module):
    """An operation that ONNX lacks, in a module of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(self.layer(x))  # this line is named


LINE = next(
    i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith("# this line is named")
)


def test_an_operation_that_onnx_lacks(tmp_path: Path) -> None:
    """Named with the model's line, from a bundle as well as when optimizing; nothing is left."""
    named = rf"test_onnx_export\.py:{LINE}: ONNX has no form of aten\.special_bessel_j0\.default\."
    with pytest.raises(InputError, match=named):
        make(tmp_path, Bessel(), (noise(3, 16),), onnx=OnnxOptions())
    assert list(tmp_path.iterdir()) == []
    bundle = make(tmp_path, Bessel(), (noise(3, 16),))
    with pytest.raises(InputError, match=named):
        export.export(bundle, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == [bundle]


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.layer(x) * self.calls


def test_a_model_with_state(tmp_path: Path) -> None:
    bundle = make(tmp_path, Counter(), (noise(3, 16),))
    with pytest.raises(InputError, match="writes to its buffer calls"):
        export.export(bundle, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == [bundle]


def test_an_unknown_dtype() -> None:
    with pytest.raises(InputError, match=r"unknown dtype 'int8'.*fp32, bf16, fp16"):
        OnnxOptions("int8")


# --- storing --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def translated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, translate.Translated]:
    folder = tmp_path_factory.mktemp("translated")
    bundle = make(folder, nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), (noise(3, 64),))
    return bundle, export.prepare(reader.read(bundle).whole, OnnxOptions("bf16")).translated


def test_weights_beside_the_model(translated: tuple[Path, translate.Translated], tmp_path: Path) -> None:
    """Above a limit, here of 1000 bytes, as a protobuf message holds 2 GB at most."""
    bundle, model = translated
    path = tmp_path / "out" / "net.onnx"
    path.parent.mkdir()
    files = store.write(model.model, path, external_above=1000)
    assert files == [path, path.with_name("net.onnx.data")]
    assert sorted(path.parent.iterdir()) == files
    assert files[1].stat().st_size >= 2 * (64 * 64 + 64 * 8)
    assert files[0].stat().st_size < 4000
    agree(bundle, path, noise(3, 64))
    with pytest.raises(InputError, match="is there already"):
        store.write(model.model, path)
    assert store.write(model.model, path, force=True) == [path]
    assert list(path.parent.iterdir()) == [path]  # weights of the model that was replaced are gone
    agree(bundle, path, noise(3, 64))


@pytest.mark.parametrize(("external_above", "checked_whole"), [(1000, 2**28), (2**28, 2**28), (2**28, 1000)])
def test_files_are_there_only_when_the_check_has_passed(
    external_above: int,
    checked_whole: int,
    translated: tuple[Path, translate.Translated],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model with weights beside it, one checked as it is, and one checked without its weights."""
    monkeypatch.setattr(store, "CHECKED_WHOLE", checked_whole)
    folder = tmp_path / "out"
    folder.mkdir()
    node = next(node for node in translated[1].model.graph if node.op_type == "MatMul")
    monkeypatch.setattr(node, "op_type", "NoSuchOperation")
    with pytest.raises(onnx.checker.ValidationError, match="NoSuchOperation"):
        store.write(translated[1].model, folder / "net.onnx", external_above=external_above)
    assert list(folder.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(store, "CHECKED_WHOLE", checked_whole)
    files = store.write(translated[1].model, folder / "net.onnx", external_above=external_above)
    assert sorted(folder.iterdir()) == files
    agree(translated[0], folder / "net.onnx", noise(3, 64))


def test_a_disk_that_is_full(translated: tuple[Path, translate.Translated], tmp_path: Path) -> None:
    """/dev/full is one."""
    folder = tmp_path / "out"
    folder.mkdir()

    def full(*_: object, **__: object) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("onnx_ir.save", full)
        with pytest.raises(InputError, match="can't write the model: No space left"):
            store.write(translated[1].model, folder / "net.onnx")
    assert list(folder.iterdir()) == []


def test_places_that_can_not_take_a_model(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file.onnx").touch()
    (tmp_path / "other.onnx.data").touch()
    for name, force in (("folder.onnx", True), ("file.onnx", False), ("other.onnx", False)):
        with pytest.raises(InputError, match="is there already"):
            store.check_place(tmp_path / name, force=force)
    with pytest.raises(InputError, match="does not exist"):
        store.check_place(tmp_path / "none" / "model.onnx")
    store.check_place(tmp_path / "file.onnx", force=True)
