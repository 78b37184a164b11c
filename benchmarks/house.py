"""Draws who imports whom in armopt, from the code: rooms are sub-packages, floors are import order.

    python -m benchmarks.house            # prints the floors
    python -m benchmarks.house --write    # docs/house.svg, and the floors in docs/design.md

A room stands one floor above the highest room that it imports, so every arrow runs down; a circle is an error.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import grimp
import jinja2

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs" / "design.md", ROOT / "docs" / "house.svg"
BEGIN, END = "<!-- floors: python -m benchmarks.house --write -->", "<!-- end of floors -->"
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 118, 34, 22, 44, 20

_SVG = jinja2.Template(
    """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" font-family="sans-serif" font-size="13">
<title>Who imports whom in armopt: every line runs downwards</title>
<rect width="{{ width }}" height="{{ height }}" fill="white"/>
{% for line in lines -%}
<path d="{{ line }}" fill="none" stroke="#94a3b8" stroke-width="1"/>
{% endfor -%}
{% for name, x, y in boxes -%}
<rect x="{{ x }}" y="{{ y }}" width="{{ box[0] }}" height="{{ box[1] }}" rx="5" fill="#eff6ff" stroke="#1d4ed8"/>
<text x="{{ x + box[0] / 2 }}" y="{{ y + box[1] / 2 + 5 }}" text-anchor="middle">{{ name }}</text>
{% endfor -%}
</svg>
""",
    trim_blocks=True,
)


@cache
def imports() -> Mapping[str, frozenset[str]]:
    """Each room, and the rooms that it imports; what only a type checker imports counts too."""
    graph = grimp.build_graph("armopt", cache_dir=None)
    rooms = sorted(module for module in graph.modules if module.count(".") == 1)
    return {
        room.removeprefix("armopt."): frozenset(
            other.removeprefix("armopt.")
            for other in rooms
            if other != room and graph.direct_import_exists(importer=room, imported=other, as_packages=True)
        )
        for room in rooms
    }


def floors(below: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """The rooms of each floor, the ground floor first.

    Raises:
        ValueError: Rooms import each other in a circle.
    """
    placed: dict[str, int] = {}
    while len(placed) < len(below):
        ready = {room for room in below if room not in placed and below[room] <= placed.keys()}
        if not ready:
            raise ValueError(f"a circle of imports among {sorted(below.keys() - placed.keys())}")
        placed |= {room: 1 + max((placed[other] for other in below[room]), default=-1) for room in ready}
    return [sorted(room for room in placed if placed[room] == floor) for floor in range(1 + max(placed.values()))]


def text(stories: list[list[str]], below: Mapping[str, frozenset[str]]) -> str:
    """The floors as Markdown, the top floor first."""
    rows = ["| floor | rooms, each with what it imports |", "| --- | --- |"]
    for floor, rooms in reversed(list(enumerate(stories))):
        shown = "<br>".join(f"**{room}**: {', '.join(sorted(below[room])) or 'nothing'}" for room in rooms)
        rows.append(f"| {floor} | {shown} |")
    arrows = sum(map(len, below.values()))
    return "\n".join([*rows, "", f"{len(below)} rooms on {len(stories)} floors, {arrows} arrows, none runs up."])


def svg(stories: list[list[str]], below: Mapping[str, frozenset[str]]) -> str:
    """The same as a picture."""
    widest = max(map(len, stories))
    step_x, step_y = _WIDTH + _GAP_X, _HEIGHT + _GAP_Y
    places: dict[str, tuple[float, float]] = {}
    for floor, rooms in enumerate(stories):
        left = _MARGIN + (widest - len(rooms)) * step_x / 2
        places |= {
            room: (left + i * step_x, _MARGIN + (len(stories) - 1 - floor) * step_y) for i, room in enumerate(rooms)
        }
    lines = []
    for room, others in below.items():
        for other in sorted(others):
            (x, y), (to_x, to_y) = places[room], places[other]
            x, to_x, y = x + _WIDTH / 2, to_x + _WIDTH / 2, y + _HEIGHT
            bend = (to_y - y) / 2
            lines.append(f"M{x:g} {y:g}C{x:g} {y + bend:g} {to_x:g} {to_y - bend:g} {to_x:g} {to_y:g}")
    return _SVG.render(
        width=2 * _MARGIN + widest * step_x - _GAP_X,
        height=2 * _MARGIN + len(stories) * step_y - _GAP_Y,
        lines=lines,
        boxes=[(room, *place) for room, place in places.items()],
        box=(_WIDTH, _HEIGHT),
    )


def page(content: str, shown: str) -> str:
    """A page with the floors between its two marks."""
    return re.sub(f"(?s){re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{shown}\n{END}", content)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/house.svg and the floors in docs/design.md")
    options = parser.parse_args()
    stories = floors(imports())
    shown = text(stories, imports())
    print(shown)
    if options.write:
        PAGE.write_text(page(PAGE.read_text(), shown))
        PICTURE.write_text(svg(stories, imports()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
