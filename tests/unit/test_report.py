"""The HTML report: complete, of one file, and safe from what a model calls its layers."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import armopt
from armopt import accuracy
from armopt.accuracy import gates
from armopt.accuracy.checker import Evidence, Validation
from armopt.accuracy.gates import Figures
from armopt.accuracy.nodes import NodeError
from armopt.accuracy.report import page as page_module
from armopt.accuracy.report import pictures, plots
from armopt.compiler.checks import Checks
from armopt.errors import AccuracyError, InputError
from armopt.plan import threshold_policy
from tests import pages


class Page(HTMLParser):
    """What a browser would fetch, and the text that it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset", "poster")]

    def handle_data(self, data: str) -> None:
        self.said += data


def page(text: str) -> Page:
    """The page, once it is known to need nothing from elsewhere."""
    found = Page(text)
    assert all(url.startswith("data:") for url in found.fetched)
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert not re.search(r"url\(|@import", text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    return found


def test_of_a_bundle_that_passes(mlp_bundle: Path, mlp: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    found = armopt.validate(mlp_bundle, against=mlp, report=path, gates=["top1>=0.9"])
    shown = page(path.read_text())
    assert shown.said.index("Passed: may be deployed") < shown.said.index("Gates")
    for said in (
        "top1>=0.9",
        "batch=2",
        "batch=64",
        "logits",
        "hidden",
        found["nodes"][0]["kernel"],
        found["inputs"],
        "Mlp",
    ):
        assert said in shown.said
    # two outputs with three plots each, and the layers
    assert shown.tags.count("svg") == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_figures_alone(mlp_bundle: Path, tmp_path: Path) -> None:
    found = armopt.validate(mlp_bundle, report=tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == found
    made = tmp_path / "made.json"
    armopt.optimize(nn.Linear(4, 4), (torch.ones(2, 4),), output=armopt.Output(tmp_path / "b", report=made))
    assert {"passed", "gates", "repair", "nodes", "outputs"} <= json.loads(made.read_text()).keys()


def test_of_one_that_fails(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "report.html"
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)).eval()
    with pytest.raises(AccuracyError):
        armopt.optimize(
            model,
            (torch.randn(64, 32),),
            output=armopt.Output(tmp_path / "bundle", report=path),
            checks=Checks(gates=("max_abs<0",), evaluations=4),
        ).require()
    shown = page(path.read_text())
    assert shown.said.index("Failed: not to be deployed") < shown.said.index("max_abs is ")
    assert "no repair: the gates fail with every layer in FP32 too" in shown.said


def test_of_a_repaired_one_names_the_layers(tmp_path: Path) -> None:
    from broken_networks import CancelledBias, build

    model, x = build(CancelledBias)
    path = tmp_path / "report.html"
    armopt.optimize(
        model, (x,), output=armopt.Output(tmp_path / "bundle", report=path), policy=threshold_policy.ThresholdPolicy()
    )
    shown = page(path.read_text())
    assert "Passed" in shown.said
    assert " repaired: " in shown.said
    assert path.read_text().count('class="repaired"') >= 2
    # `validate` says it too, from the manifest
    armopt.validate(tmp_path / "bundle", against=model, inputs={"x": x}, report=path)
    assert " repaired: " in page(path.read_text()).said


def rendered(outputs: dict[str, torch.Tensor], found: dict[str, torch.Tensor], task: str, node: str = "fc") -> str:
    entries = tuple(accuracy.compare(name, y, found[name]) for name, y in outputs.items())
    figures = {"static": Figures(entries, {})}
    outcome = Validation(
        "r", "i", True, 1, "ran", figures, gates.judge(gates.standard(), figures, task), task, "as asked"
    )
    inputs = {"x": torch.rand(1, 3, 32, 48)}
    errors = [NodeError(node, "linear", "conv1x1_bf16", "bf16", (1, 2), 1e-3, 2e-3, 1e-4, 1e-3)]
    return page_module.render(page_module.About("b", "t", "m", "v"), outcome, errors, Evidence(inputs, outputs, found))


def test_names_are_escaped() -> None:
    evil = "<script>alert(1)</script>"
    y = {evil: torch.rand(4)}
    text = rendered(y, y, "", node=evil)
    assert "<script" not in text
    assert evil in page(text).said


@pytest.mark.parametrize(
    "values",
    [[0.0, 0.0], [1e38, -1e38], [1e-30, 2e-30], [float("inf"), 1.0], [-float("inf")] * 2, [5.0], [1e6, 1e6 + 1]],
    ids=str,
)
def test_any_values_can_be_drawn(values: list[float]) -> None:
    y = {"y": torch.tensor(values)}
    text = rendered(y, {"y": y["y"].bfloat16().float()}, "")
    page(text)
    assert "nan" not in text.lower().replace('<th class="n">nan</th>', "")


@pytest.mark.parametrize(("values", "most"), [(1, 3), (2, 5), (10, 7), (64, 9), (1000, 21), (10**6, 61)])
def test_few_values_have_few_bars(values: int, most: int) -> None:
    y = torch.linspace(-1, 1, values)
    for plot in (plots.values(y, y + 0.01), plots.histogram(y, y + torch.linspace(-1e-3, 1e-3, values))):
        assert plot is not None
        assert 1 <= len(plot.rects) <= most
        assert len(plot.rects) % 2  # one of them stands for no error
        assert all(float(text.text).is_integer() for text in plot.texts if text.anchor == "end")  # counts are whole


def test_that_inputs_were_generated_is_said_as_loudly_as_the_verdict() -> None:
    loud = re.compile(r"<h1>Passed: may be deployed</h1>\s*<p class=\"unproven\">The inputs were generated</p>")
    assert loud.search(pages.of_report(given=False))
    assert 'unproven">' not in pages.of_report(given=True)


@pytest.mark.parametrize("error", [0.0, float("inf"), 1e-30, 1e30])
def test_any_error_of_a_layer_can_be_drawn(error: float) -> None:
    each = NodeError("n", "linear", "k", "bf16", (1,), error, error, error, error)
    plot = plots.layers([each, NodeError("m", "linear", "k", "bf16", (1,), 1e-3, 1e-2, 0.0, 1e-3)])
    assert plot is not None
    for rect in plot.rects:
        assert 0 <= rect.y <= plot.height
        assert 0 <= rect.height <= plot.height


def test_boxes_of_both_sides_stand_side_by_side() -> None:
    from PIL import Image

    image = torch.zeros(1, 3, 40, 60)
    reference = {
        "0.boxes": torch.tensor([[10.0, 10, 30, 30], [0, 0, 5, 5]]),
        "0.labels": torch.tensor([1, 1]),
        "0.scores": torch.tensor([0.9, 0.1]),
    }
    found = reference | {"0.boxes": torch.tensor([[20.0, 10, 40, 30], [0, 0, 5, 5]])}
    (pair,) = pictures.pairs(Evidence({"x": image}, reference, found), "detection")
    assert pair.said == "FP32 1 objects, BF16 1, of a score of 0.5 or more"
    shown = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in (pair.reference, pair.found)]
    colour = (60, 180, 75)
    for picture, x in zip(shown, (10, 20), strict=True):
        assert picture.size == (60, 40)
        assert picture.getpixel((x, 29)) == colour
        assert picture.getpixel((2, 0)) == (0, 0, 0)  # a box that FP32 is not sure of
    assert shown[1].getpixel((10, 29)) == (0, 0, 0)


def test_segmentation_tints_both() -> None:
    scores = torch.zeros(1, 3, 32, 48)
    scores[:, 1, :16] = 1.0
    other = scores.clone()
    other[:, 2, :8] = 2.0
    (pair,) = pictures.pairs(Evidence({"x": torch.rand(1, 3, 32, 48)}, {"out": scores}, {"out": other}), "segmentation")
    assert pair.said == "75.000 % of the pixels have the same class"
    assert pair.reference != pair.found


@pytest.mark.parametrize("place", ["missing/report.html", "."])
def test_a_place_that_can_not_be_written_is_named_first(mlp_bundle: Path, tmp_path: Path, place: str) -> None:
    with pytest.raises(InputError, match=r"does not exist|is a folder"):
        armopt.validate(mlp_bundle, report=tmp_path / place)
    with pytest.raises(InputError, match=r"does not exist|is a folder"):
        armopt.optimize(
            nn.Linear(2, 2), (torch.ones(2, 2),), output=armopt.Output(tmp_path / "b", report=tmp_path / place)
        )
    assert list(tmp_path.iterdir()) == []
