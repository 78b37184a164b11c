"""The pages in a headless Chromium, as wide as a laptop and as narrow as a telephone: opened, pointed at, filtered."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import pages

pytestmark = pytest.mark.full

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (1280, 420)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[full]")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no Chromium is installed (looked for {', '.join(BROWSERS)}): apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, text: str, folder: Path, width: int) -> Any:
    """The page in a window, which fails the test of what a console would say."""
    file = folder / "page.html"
    file.write_text(text)
    window = browser.new_page(viewport={"width": width, "height": 800})
    window.set_default_timeout(10_000)
    window.said = []
    window.on("console", lambda message: window.said.append(message.text))
    window.on("pageerror", lambda error: window.said.append(str(error)))
    window.goto(file.as_uri())
    return window


def check_width(window: Any) -> None:
    """Nothing is wider than the window, and nothing is cut."""
    assert window.evaluate("document.documentElement.scrollWidth <= innerWidth")
    cut = "[...document.querySelectorAll('td, p, h1, summary')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert window.evaluate(cut) == 0
    assert window.said == []


def backgrounds(window: Any, nodes: str) -> set[str]:
    colour = "getComputedStyle(e.querySelector('.name')).backgroundColor"
    return set(window.evaluate(f"[...document.querySelectorAll('{nodes}')].map(e => {colour})"))


@pytest.mark.parametrize("width", WIDTHS)
def test_plan(browser: Any, tmp_path: Path, width: int) -> None:
    window = opened(browser, pages.of_plan(), tmp_path, width)
    check_width(window)
    lines = window.locator("tr[data-node]")
    assert lines.first.bounding_box()["y"] < 700  # the graph begins on the first screen
    layer = window.locator("tr", has_text="stages_0_back")
    for said in ("80x192 → 80x64", "conv1x1_bf16", "80 rows"):
        assert layer.get_by_text(said).is_visible()

    layer.hover()
    plain = backgrounds(window, "tr[data-node=output]")
    assert backgrounds(window, "tr.read") not in (plain, set())
    assert backgrounds(window, "tr.reader") not in (plain, set(), backgrounds(window, "tr.read"))
    window.mouse.move(0, 0)
    window.locator("tr[data-node=stages_3_back] .name span").focus()  # what has no mouse
    assert window.locator("tr.reader").count() == 2  # the next stage, and the addition at its end

    everything = lines.count()
    window.get_by_label("Filter").fill("stages_2 conv1x1")
    assert window.locator("tr[data-node]:visible").count() == 2
    assert window.locator("output").inner_text() == f"2 of {everything} lines"
    window.get_by_label("Filter").fill("nothing has this")
    assert window.locator("tr[data-node]:visible").count() == 0
    window.get_by_label("Filter").fill("")
    window.get_by_role("button", name="conv1x1_bf16: 12").click()
    assert window.locator("tr[data-node]:visible").count() == 12
    window.get_by_role("button", name="conv1x1_bf16: 12").click()
    assert window.locator("tr[data-node]:visible").count() == everything
    check_width(window)


@pytest.mark.parametrize("width", WIDTHS)
def test_report(browser: Any, tmp_path: Path, width: int) -> None:
    window = opened(browser, pages.of_report(given=False), tmp_path, width)
    check_width(window)
    size = "e => parseFloat(getComputedStyle(e).fontSize)"
    warned = window.get_by_text("The inputs were generated", exact=True)
    assert warned.is_visible()
    assert warned.evaluate(size) >= window.locator("h1").evaluate(size)
    colour = "e => getComputedStyle(e).color"
    assert warned.evaluate(colour) != window.locator("h1").evaluate(colour)
    smallest = "Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))"
    assert window.evaluate(smallest) >= 9
    window.locator("summary").click()
    check_width(window)
    assert window.get_by_text("stages_1_a_layer_with_quite_a_long_name", exact=True).is_visible()
