"""A plan as a page: what is drawn, where, and what can be read without pointing at anything. In a browser:
tests/e2e/test_pages.py.
"""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import Tensor, nn

from armopt.compiler import plan_page, rails
from tests.planning import plan


class Attended(nn.Module):
    """Glue (unbind, views, a copy) between layers, and a value that is read long after it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.a_projection_with_a_name_of_more_than_28_characters = nn.Linear(64, 192)
        self.out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.a_projection_with_a_name_of_more_than_28_characters(x)
        q, k, v = qkv.reshape(2, 80, 3, 64).permute(2, 0, 1, 3).unbind(0)
        attended = (q @ k.mT).softmax(-1) @ v
        return x + self.out(attended.reshape(2, 80, 64).contiguous())


class Shown(HTMLParser):
    """The lines of a page: the text of their cells, and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.lines: dict[str, list[str]] = {}
        self.attributes: dict[str, dict[str, str | None]] = {}
        self.cells: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "tr":
            self.cells = None
            if name := found.get("data-node"):
                self.cells, self.attributes[name] = self.lines.setdefault(name, []), found
        elif tag == "td" and self.cells is not None:
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data.strip()


@pytest.fixture(scope="module")
def page() -> str:
    torch.manual_seed(0)
    return plan_page.render(plan(Attended().eval(), torch.randn(2, 80, 64))[1])


def test_glue_is_left_out_and_said(page: str) -> None:
    shown = Shown(page)
    operations = [cells[2] for cells in shown.lines.values()]
    assert operations == ["input", "linear", "matmul", "softmax", "matmul", "linear", "output"]
    assert re.search(r"Left out are 7 that only move values or compute sizes:\s+3 select, 2 reshape", page)


def test_what_folds_a_stride_is_glue_too() -> None:
    """Of a ResNet's first layer: a row of unbind and getitem, which was wider than a page."""
    model = nn.Conv2d(3, 64, 7, stride=2, padding=3)
    page = plan_page.render(plan(model.eval(), torch.randn(1, 3, 32, 32))[1])
    operations = [cells[2] for cells in Shown(page).lines.values()]
    assert operations[-2:] == ["conv", "output"]
    assert not {"getitem", "unbind"} & set(operations)
    assert re.search(r"\d+ getitem, \d+ unbind", page)
    assert "&lt;built-in function" not in page


def test_what_reads_through_glue_reads_what_made_the_values(page: str) -> None:
    shown = Shown(page)
    projection = "a_projection_with_a_name_of_more_than_28_characters"
    readers = [name for name, found in shown.attributes.items() if projection in str(found["data-reads"]).split()]
    assert len(readers) == 2  # both products of attention
    assert str(shown.attributes["out"]["data-reads"]).split() == ["matmul_1", "x"]  # x is added behind it


def test_names_shapes_and_reasons_stand_in_the_page_whole(page: str) -> None:
    shown = Shown(page)
    cells = shown.lines["a_projection_with_a_name_of_more_than_28_characters"]
    assert cells[1] == "a_projection_with_a_name_of_more_than_28_characters"
    assert cells[2:4] == ["linear", "2x80x64 → 2x80x192"]
    assert "conv1x1_bf16" in cells[4]
    assert "160 rows" in cells[5]
    assert shown.lines["x"][3] == "2x80x64"
    assert "title=" not in page


def test_it_fetches_nothing_and_runs_its_own_script_alone(page: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert not re.search(r"<(link|iframe|object|img)|src=|href=|url\(|@import|\son\w+=", page)


def test_a_chain_has_one_rail() -> None:
    drawn = rails.lay({"x": [], "a": ["x"], "b": ["a"]})
    assert {line.at for line in drawn.lines.values()} == {7.0}
    assert [line.leaving for line in drawn.lines.values()] == [True, True, False]
    assert not any(line.passing for line in drawn.lines.values())
    assert drawn.width == 14


def test_a_value_that_is_read_later_passes_what_lies_between() -> None:
    lines = rails.lay({"x": [], "a": ["x"], "b": ["a"], "add": ["b", "x"]}).lines
    assert lines["a"].at != lines["x"].at
    assert lines["b"].passing == (lines["x"].at,)
    assert len(lines["add"].joining) == 2


@pytest.mark.parametrize("branches", [3, 40, 2000])
def test_however_many_values_live_at_once_the_drawing_stays_narrow(branches: int) -> None:
    names = [f"b{i}" for i in range(branches)]
    drawn = rails.lay({"x": [], **{name: ["x"] for name in names}, "cat": names})
    assert drawn.width <= 170
    assert len({drawn.lines[name].at for name in names[:12]}) == min(branches, 12)
    assert len(drawn.lines["cat"].joining) <= branches


def test_a_dead_end_and_nothing_at_all_can_be_drawn() -> None:
    assert not rails.lay({"x": [], "dead": ["x"], "y": ["x"]}).lines["dead"].leaving
    assert rails.lay({}).width > 0
