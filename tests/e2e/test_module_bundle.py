"""Bundles of kind "module": parts of a detection model as graphs, its own Python between them."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_helpers import Cli

import armopt
from armopt import accuracy
from armopt.bundle import reader
from armopt.deploy import doctor, package
from armopt.errors import AccuracyError, ArmoptWarning, BundleError, InputError
from armopt.models import torchvision_ops
from armopt.runtime.module import ModuleModel
from tests import detection

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::armopt.errors.ArmoptWarning")]
PARTS = [
    *("backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor"),
    *("roi_heads.mask_head", "roi_heads.mask_predictor"),
]


@pytest.fixture(scope="module")
def mask_rcnn() -> torch.nn.Module:
    return detection.mask_rcnn()


@pytest.fixture(scope="module")
def bundle(mask_rcnn: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("module") / "bundle"
    calls = [(detection.images((3, 128, 128)),), (detection.images(),)]
    armopt.optimize(mask_rcnn, calls, kind="module", output=path, target="graviton3")
    return path


@pytest.fixture(scope="module")
def loaded(bundle: Path) -> ModuleModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ArmoptWarning)
        found = armopt.load(bundle, model=detection.bare_mask_rcnn)
    assert isinstance(found, ModuleModel)
    return found


@pytest.mark.parametrize(
    "sizes", [((3, 128, 128),), ((3, 96, 128), (3, 128, 112)), ((3, 80, 150), (3, 99, 99), (3, 150, 70))]
)
def test_images_of_any_sizes_are_found_again(
    mask_rcnn: torch.nn.Module, loaded: ModuleModel, sizes: tuple[tuple[int, ...], ...]
) -> None:
    images = detection.images(*sizes, seed=2 if len(sizes) == 1 else 0)
    with torch.no_grad():
        expected = mask_rcnn(images)
    found = loaded(images)
    above, alike = detection.found_again(expected, found)
    assert above > 0
    assert alike == above
    assert not any(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(expected, found, strict=True))  # it was BF16


def test_nothing_to_detect(loaded: ModuleModel, bundle: Path) -> None:
    """With no box left the mask head gets an empty batch."""
    strict = armopt.load(bundle, model=detection.bare_mask_rcnn)
    strict.module.roi_heads.score_thresh = 2.0  # type: ignore[union-attr]
    (found,) = strict(detection.images((3, 128, 128)))
    assert found["boxes"].shape == (0, 4)
    assert found["masks"].shape == (0, 1, 128, 128)


def test_its_parts_are_the_largest_that_can_be_captured(bundle: Path) -> None:
    read = reader.read(bundle)
    assert [part.path for part in read.parts] == PARTS
    assert read.manifest.is_module
    assert read.manifest.schema_version == 3
    left = {skip.node: skip.reason for skip in read.manifest.refused}
    assert "ImageList" in left["rpn"]
    assert read.manifest.weights.bytes < 0.6 * read.manifest.weights.fp32_bytes
    assert sorted(file.name for file in bundle.iterdir()) == [
        *("env.sh", "graph.json", "manifest.json", "report.json", "requirements.txt", "weights.safetensors")
    ]


def test_the_loaded_model_holds_no_weights_of_its_parts(loaded: ModuleModel) -> None:
    assert list(loaded.module.backbone.parameters())
    for weight in loaded.module.backbone.parameters():
        assert weight.untyped_storage().nbytes() == 4
        assert weight.isnan().all()
    assert loaded.module.backbone.out_channels == 32
    assert str(loaded.__signature__).startswith("(images")


def test_own_factories_have_to_be_given(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"holds no code.*model=factory"):
        armopt.load(bundle)
    armopt.load(bundle, model="tests.detection:bare_mask_rcnn")
    armopt.load(bundle, model=detection.bare_mask_rcnn())


def test_another_model_is_refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match="has a graph for backbone, which Linear lacks"):
        armopt.load(bundle, model=lambda: torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="not a factory"):
        armopt.load(bundle, model=3)  # type: ignore[arg-type]


def test_a_whole_model_takes_no_factory(mlp_bundle: Path) -> None:
    with pytest.raises(InputError, match="holds the whole model"):
        armopt.load(mlp_bundle, model=detection.bare_mask_rcnn)


def test_validate_compares_part_by_part(bundle: Path, mask_rcnn: torch.nn.Module) -> None:
    alone = accuracy.validate(bundle)
    assert alone["passed"]
    assert {name.split()[0] for name in alone["outputs"]} == set(PARTS)
    against = accuracy.validate(bundle, against=mask_rcnn)
    assert against["passed"]
    assert 0.99 < against["cosine"] < 1
    other = detection.bare_mask_rcnn()
    assert not accuracy.validate(bundle, against=other)["passed"]


def test_doctor_examines_it_and_package_says_why_not(bundle: Path, tmp_path: Path) -> None:
    assert doctor.examine(bundle).bundle == "graviton3"
    with pytest.raises(InputError, match=r'kind "module".*armopt run BUNDLE'):
        package.write(bundle, tmp_path / "image")


def test_what_needs_one_graph_is_refused(bundle: Path, mask_rcnn: torch.nn.Module, tmp_path: Path) -> None:
    from armopt.onnx_export import export

    with pytest.raises(InputError, match='kind "module": its parts are graphs'):
        export.export(bundle, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    calls = [(detection.images((3, 128, 128)),)]
    with pytest.raises(InputError, match=r"--keep-reference.*needs the model in one graph"):
        armopt.optimize(mask_rcnn, calls, kind="module", output=armopt.Output(tmp_path / "b", keep_reference=True))
    absent: list[tuple[list[torch.Tensor]]] = []  # without calls nothing can be captured: it is refused before that
    with pytest.raises(InputError, match=r"--onnx.*needs the model in one graph"):
        armopt.optimize(
            mask_rcnn, absent, kind="module", output=armopt.Output(tmp_path / "b", onnx=armopt.OnnxOptions())
        )
    with pytest.raises(InputError, match=r"--inputs.*its parts take no inputs"):
        accuracy.validate(bundle, inputs={"images": torch.ones(1)})
    with pytest.raises(InputError, match=r"task \(--task\) detection.*its parts have no task"):
        accuracy.validate(bundle, task="detection")


def test_a_report_of_its_worst_part(bundle: Path, tmp_path: Path) -> None:
    found = accuracy.validate(bundle, report=tmp_path / "report.html")
    assert found["node_bucket"].split()[0] in PARTS
    assert found["node_bucket"] in (tmp_path / "report.html").read_text()


def test_a_changed_file_is_noticed(bundle: Path, tmp_path: Path) -> None:
    import shutil

    copied = tmp_path / "copy"
    shutil.copytree(bundle, copied)
    data = bytearray((copied / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "weights.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        armopt.load(copied, model=detection.bare_mask_rcnn)


class Router(torch.nn.Module):
    """Control flow on data between layers, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.look = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU())
        self.ways = torch.nn.ModuleList([torch.nn.Linear(32, 4), torch.nn.Linear(32, 4)])

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        hidden = self.look(x) * self.scale
        return OrderedDict(y=self.ways[int(hidden.sum() > 70)](hidden))


def test_any_model_and_its_own_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Router().eval()
    with torch.no_grad():
        model.scale.fill_(3)
    calls = [(torch.randn(4, 16),), (3 * torch.randn(6, 16),)]
    armopt.optimize(model, calls, kind="module", output=tmp_path / "b", target="graviton3")
    loaded = armopt.load(tmp_path / "b", model=Router)
    for (x,) in calls:
        with torch.no_grad():
            expected = model(x)["y"]
        torch.testing.assert_close(loaded(x)["y"], expected, atol=0.02 * float(expected.abs().max()), rtol=0)


class Asking(Router):
    """Asks for the shape and dtype of a weight that a part holds."""

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        weight = self.look[0].weight
        return super().forward(x.to(weight.dtype).narrow(1, 0, weight.shape[1]))


def test_python_between_parts_may_ask_what_their_weights_are_like(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Asking().eval(), torch.randn(4, 20)
    armopt.optimize(model, [(x,)], kind="module", output=tmp_path / "b", target="graviton3")
    with torch.no_grad():
        expected = model(x)["y"]
    found = armopt.load(tmp_path / "b", model=Asking)(x)["y"]
    torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


def test_caches_of_transformers_stay_off_where_its_parts_were_captured_without(tmp_path: Path) -> None:
    torchvision_ops.ensure_torchvision_if_installed()
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "attention_window": 8, "vocab_size": 99}
    torch.manual_seed(0)
    config = transformers.LEDConfig(**sizes, **heads)
    model = transformers.LEDModel(config).eval()
    ids = torch.randint(3, 99, (1, 16))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :8]}
    armopt.optimize(model, [call], kind="module", output=tmp_path / "b", target="graviton3")
    with torch.no_grad():
        expected = model(**call, use_cache=False).last_hidden_state
    loaded: Any = armopt.load(tmp_path / "b", model=model)
    found = loaded(**call).last_hidden_state
    assert config.use_cache  # of which another model may be made
    assert not loaded.module.config.use_cache
    torch.testing.assert_close(found, expected, atol=0.03 * float(expected.abs().max()), rtol=0)


class NamedRouter(Router):
    """Its inputs have names alone."""

    def forward(self, *, x: torch.Tensor, scale: torch.Tensor) -> OrderedDict[str, torch.Tensor]:  # type: ignore[override]
        return super().forward(x * scale)


def test_calls_with_named_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NamedRouter().eval()
    call = {"x": torch.randn(4, 16), "scale": torch.tensor(2.0)}
    for i, calls in enumerate((call, [call, {**call, "x": torch.randn(6, 16)}])):
        armopt.optimize(model, calls, kind="module", output=tmp_path / str(i), target="graviton3")
        loaded = armopt.load(tmp_path / str(i), model=NamedRouter)
        with torch.no_grad():
            expected = model(**call)["y"]
        torch.testing.assert_close(loaded(**call)["y"], expected, atol=0.02 * float(expected.abs().max()), rtol=0)


def test_parts_that_break_a_gate_are_repaired(tmp_path: Path) -> None:
    """Each part alone; a gate that nothing can keep fails the whole bundle."""
    torch.manual_seed(0)
    model = Router().eval()
    calls = [(torch.randn(64, 16),), (3 * torch.randn(96, 16),)]
    output = tmp_path / "b"
    written = armopt.optimize(
        model, calls, kind="module", output=output, policy="threshold=1", checks=armopt.Checks(gates=("sqnr>=80",))
    ).manifest
    repair = written.accuracy.repair
    assert written.accuracy.passed
    assert repair.passed
    assert repair.changes
    assert all(change.node.split(": ")[0] in {"look", "ways.0", "ways.1"} for change in repair.changes)
    checks = armopt.Checks(gates=("sqnr>=80",), repair=False)
    with pytest.raises(AccuracyError, match="sqnr is"):
        armopt.optimize(
            model, calls, kind="module", output=armopt.Output(output, force=True), policy="threshold=1", checks=checks
        ).require()
    assert not reader.read(output).manifest.accuracy.passed


def test_what_can_be_captured_whole_is_told_so(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    with pytest.raises(InputError, match="can be captured whole"):
        armopt.optimize(model, [(torch.randn(2, 4),)], kind="module", output=tmp_path / "b")
    with pytest.raises(InputError, match="needs example calls"):
        armopt.optimize(model, kind="module", output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_commands(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    nodes = cli("inspect", bundle, "--json", cwd=tmp_path).json["nodes"]
    assert {node["part"] for node in nodes} == set(PARTS)
    text = cli("inspect", bundle, cwd=tmp_path).out
    assert "roi_heads.mask_head" in text
    assert "Plain ATen or Python" in text
