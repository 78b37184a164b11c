"""Draws what armopt brings, for the README: instructions of whole models, as docs/benchmarks.md counts them.

python -m benchmarks.gain            # prints the figures
python -m benchmarks.gain --write    # docs/gain.svg
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "gain.svg"
#: Columns of the page's first table.
USERS, OURS = "eager fast math", "armopt"
#: Rows of it, and what to call them.
MODELS = {
    "resnet50 224": "ResNet-50",
    "mobilenet_v3_large 224": "MobileNetV3",
    "mask r-cnn 128": "Mask R-CNN",
    "vit_b_16 224": "ViT-B/16",
    "swin_t 224": "Swin-T",
    "bert base, 128 tokens": "BERT base, 128 tokens",
    "gpt2, prefill of 64": "GPT-2, 64 tokens at once",
    "gpt2, decode after 64": "GPT-2, each token after",
}
_ROW, _LEFT, _BAR, _TOP = 34, 190, 430, 64

_SVG = jinja2.Template(
    """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" font-family="sans-serif" font-size="13">
<title>Instructions of one call: PyTorch as users run it, and armopt</title>
<rect width="{{ width }}" height="{{ height }}" fill="white"/>
<text x="{{ left }}" y="22" font-weight="bold">Millions of instructions of one call, on an emulated Graviton3</text>
<rect x="{{ left }}" y="34" width="12" height="12" fill="#cbd5e1"/>
<text x="{{ left + 18 }}" y="45">PyTorch with fast math</text>
<rect x="{{ left + 190 }}" y="34" width="12" height="12" fill="#1d4ed8"/>
<text x="{{ left + 208 }}" y="45">armopt</text>
{% for bar in bars %}
<text x="{{ left - 10 }}" y="{{ bar.y + 19 }}" text-anchor="end">{{ bar.name }}</text>
<rect x="{{ left }}" y="{{ bar.y + 2 }}" width="{{ full }}" height="12" rx="2" fill="#cbd5e1"/>
<rect x="{{ left }}" y="{{ bar.y + 15 }}" width="{{ bar.width }}" height="12" rx="2" fill="#1d4ed8"/>
<text x="{{ left + full + 10 }}" y="{{ bar.y + 13 }}" fill="#64748b">{{ bar.users }}</text>
<text x="{{ left + full + 10 }}" y="{{ bar.y + 27 }}" fill="#1d4ed8">{{ bar.ours }}</text>
<text x="{{ width - 16 }}" y="{{ bar.y + 20 }}" text-anchor="end" font-weight="bold">{{ bar.times }}x fewer</text>
{% endfor %}
</svg>
""",
    trim_blocks=True,
)


@dataclass(frozen=True, slots=True)
class Gain:
    """Millions of instructions of one call: as users run the model, and by armopt."""

    name: str
    users: float
    ours: float


def gains(page: str) -> list[Gain]:
    """The figures of the models that are drawn.

    Raises:
        ValueError: The page's first table lacks a model or a column.
    """
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in page.splitlines() if "|" in line]
    heads, *rows = rows
    cells = {row[0]: dict(zip(heads, row, strict=False)) for row in reversed(rows)}
    try:
        return [Gain(name, float(cells[row][USERS]), float(cells[row][OURS])) for row, name in MODELS.items()]
    except KeyError as missing:
        raise ValueError(f"{PAGE.name} has no {missing}") from None


def svg(found: list[Gain]) -> str:
    """The picture: two bars for each model, the users' as long for each of them."""
    bars = [
        {
            "name": gain.name,
            "y": _TOP + i * _ROW,
            "width": round(_BAR * gain.ours / gain.users, 1),
            "users": f"{gain.users:,.0f}",
            "ours": f"{gain.ours:,.0f}",
            "times": f"{gain.users / gain.ours:.1f}",
        }
        for i, gain in enumerate(found)
    ]
    return _SVG.render(width=800, height=_TOP + len(bars) * _ROW + 10, left=_LEFT, full=_BAR, bars=bars)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {PICTURE.relative_to(ROOT)}")
    options = parser.parse_args()
    found = gains(PAGE.read_text())
    for gain in found:
        print(f"{gain.name:28} {gain.users:9.2f} {gain.ours:9.2f}")
    if options.write:
        PICTURE.write_text(svg(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
