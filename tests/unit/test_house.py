"""Who may import whom: the drawing in docs/design.md is the code's, and small enough to be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from radon.complexity import cc_visit

from benchmarks import house


def test_the_house_is_small_and_every_arrow_runs_down() -> None:
    below = house.imports()
    stories = house.floors(below)
    assert len(below) <= 25
    assert len(stories) <= 10
    floor = {room: i for i, rooms in enumerate(stories) for room in rooms}
    assert all(floor[other] < floor[room] for room, others in below.items() for other in others)


def test_the_drawing_is_the_codes() -> None:
    """Regenerate it with: python -m benchmarks.house --write."""
    stories = house.floors(house.imports())
    content = house.PAGE.read_text()
    assert house.page(content, house.text(stories, house.imports())) == content
    assert house.PICTURE.read_text() == house.svg(stories, house.imports())


def test_a_circle_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"circle of imports among \['a', 'b'\]"):
        house.floors({"a": frozenset({"b"}), "b": frozenset({"a"}), "c": frozenset()})


@pytest.mark.parametrize("folder", ["armopt", "passes"])
def test_no_function_is_too_long_to_be_followed(folder: str) -> None:
    """radon counts conditions inside expressions too, which ruff's C901 does not."""
    files = sorted((house.ROOT / folder).rglob("*.py"))
    assert files
    knotted = [f"{path}:{block.lineno} {block.name} {block.complexity}" for path in files for block in _functions(path)]
    assert knotted == []


def _functions(path: Path) -> list[Any]:
    blocks = cc_visit(path.read_text())
    return [block for block in blocks if type(block).__name__ == "Function" and block.complexity > 15]
