"""Plots as plain data: shapes with coordinates, which the report's template draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from armopt.accuracy.nodes import NodeError

#: Dots of a scatter plot: enough to see its shape, few enough for a browser.
_DOTS = 2500
_BROAD = 700, 260
#: Bars of a histogram at most; odd, so that one stands for errors of about zero.
_BINS = 61


@dataclass(frozen=True, slots=True)
class Rect:
    """A bar; `title` shows when pointed at."""

    x: float
    y: float
    width: float
    height: float
    css: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Path:
    """A line, as SVG writes it."""

    d: str
    css: str


@dataclass(frozen=True, slots=True)
class Text:
    """A label."""

    x: float
    y: float
    text: str
    anchor: str = "middle"


@dataclass(frozen=True, slots=True)
class Plot:
    """Shapes in a box of `width` by `height`."""

    width: int
    height: int
    label: str
    rects: tuple[Rect, ...] = ()
    paths: tuple[Path, ...] = ()
    texts: tuple[Text, ...] = ()


@dataclass(frozen=True, slots=True)
class _Axes:
    """The box inside the labels, and the ranges of both axes."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    left: int = 64
    bottom: int = 40
    top: int = 12
    right: int = 14

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point in SVG's coordinates."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        inner = self.width - self.left - self.right, self.height - self.bottom - self.top
        return round(self.left + across * inner[0], 2), round(self.top + (1 - up) * inner[1], 2)

    def frame(
        self, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x_name: str, y_name: str
    ) -> tuple[tuple[Path, ...], tuple[Text, ...]]:
        """Grid lines, ticks and names."""
        paths, texts = [], []
        for value, name in y_ticks:
            (x0, y), (x1, _) = self.at(self.x[0], value), self.at(self.x[1], value)
            paths.append(Path(f"M{x0} {y}H{x1}", "grid"))
            texts.append(Text(x0 - 6, y + 4, name, "end"))
        for value, name in x_ticks:
            x, y = self.at(value, self.y[0])
            paths.append(Path(f"M{x} {y}v4", "grid"))
            texts.append(Text(x, y + 17, name))
        x0, y0 = self.at(self.x[0], self.y[0])
        texts.append(Text((x0 + self.width - self.right) / 2, self.height - 6, x_name))
        texts.append(Text(x0, self.top - 2, y_name, "start") if self.top > 14 else Text(0, 0, ""))
        paths.append(Path(f"M{x0} {y0}H{self.width - self.right}", "axis"))
        return tuple(paths), tuple(text for text in texts if text.text)


def layers(errors: Sequence[NodeError], repaired: frozenset[str] = frozenset()) -> Plot | None:
    """Error of every layer in the graph's order: bars for what it adds alone, a line for what is carried along."""
    known = [value for error in errors for value in (error.isolated, error.cumulative) if 0 < value < math.inf]
    if not known:
        return None
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    axes = _Axes(*_BROAD, (-0.5, len(errors) - 0.5), (low, max(high, low + 1)), top=24)
    step = max(1, math.ceil(len(errors) / 12))
    x_ticks = [(float(i), str(i + 1)) for i in range(0, len(errors), step)]
    y_ticks = [(float(e), f"1e{e}") for e in range(low, max(high, low + 1) + 1)]
    paths, texts = axes.frame(x_ticks, y_ticks, "layer, in the order of the graph", "error, relative to FP32's result")
    rects, line = [], ""
    for i, error in enumerate(errors):
        said = (
            f"{i + 1}. {error.node} ({error.kernel}): alone {error.isolated:.2e}, carried {error.cumulative:.2e}, "
            f"from {error.comes_from}"
        )
        height = _log(error.isolated, low, high)
        (x0, y0), (x1, y1) = axes.at(i - 0.4, low), axes.at(i + 0.4, height)
        if error.node in repaired:
            top = axes.at(0, axes.y[1])[1]
            rects.append(Rect(x0, top, round(x1 - x0, 2), round(y0 - top, 2), "repaired", said))
        rects.append(Rect(x0, y1, round(x1 - x0, 2), round(max(0.0, y0 - y1), 2), "bar", said))
        x, y = axes.at(i, _log(error.cumulative, low, high))
        line += f"{'L' if line else 'M'}{x} {y}"
    return Plot(*_BROAD, "error per layer", tuple(rects), (*paths, Path(line, "carried")), texts)


def _log(value: float, low: int, high: int) -> float:
    """log10, kept within the axis: zero at its foot, infinite at its top."""
    return float(low) if value <= 0 else min(float(max(high, low + 1)), max(float(low), math.log10(value)))


def scatter(reference: torch.Tensor, found: torch.Tensor) -> Plot | None:
    """FP32 across, found upwards; on the diagonal where they agree."""
    a, b = _finite(reference, found)
    if a.numel() == 0:
        return None
    stride = max(1, a.numel() // _DOTS)
    a, b = a[::stride], b[::stride]
    low, high = _range(torch.cat([a, b]))
    axes = _Axes(460, 300, (low, high), (low, high))
    ticks = [(value, f"{value:.3g}") for value in _ticks(low, high)]
    paths, texts = axes.frame(ticks, ticks, "FP32", "BF16")
    (x0, y0), (x1, y1) = axes.at(low, low), axes.at(high, high)
    dots = "".join("M{} {}h0".format(*axes.at(p, q)) for p, q in zip(a.tolist(), b.tolist(), strict=True))
    shapes = (*paths, Path(f"M{x0} {y0}L{x1} {y1}", "diagonal"), Path(dots, "dots"))
    return Plot(460, 300, "FP32 across, BF16 upwards", (), shapes, texts)


def histogram(reference: torch.Tensor, found: torch.Tensor) -> Plot | None:
    """How the errors are spread."""
    a, b = _finite(reference, found)
    if a.numel() == 0:
        return None
    errors = b - a
    reach = float(errors.abs().max()) or 1.0
    return _histogram(errors, (-reach, reach), "error (BF16 - FP32)")


def values(reference: torch.Tensor, found: torch.Tensor) -> Plot | None:
    """How the values are spread: FP32 as bars, BF16 as a line on them."""
    a, b = _finite(reference, found)
    if a.numel() == 0:
        return None
    low, high = _range(torch.cat([a, b]))
    return _histogram(a, (low, high), "value", b)


def _histogram(data: torch.Tensor, reach: tuple[float, float], name: str, over: torch.Tensor | None = None) -> Plot:
    low, high = reach
    bins = _bins(data.numel())
    counts = torch.histc(data, bins, low, high)
    line = None if over is None else torch.histc(over, bins, low, high)
    most = float(max(counts.max(), counts.max() if line is None else line.max())) or 1.0
    axes = _Axes(460, 300, (low, high), (0.0, most))
    x_ticks = [(value, f"{value:.3g}") for value in _ticks(low, high)]
    y_ticks = [(value, f"{value:.4g}") for value in _ticks(0.0, most) if value.is_integer()]
    paths, texts = axes.frame(x_ticks, y_ticks, name, "count")
    width = (high - low) / bins
    rects = []
    for i, count in enumerate(counts.tolist()):
        (x0, y0), (x1, y1) = axes.at(low + i * width, 0.0), axes.at(low + (i + 1) * width, count)
        rects.append(Rect(x0, y1, round(x1 - x0, 2), round(y0 - y1, 2), "bar", f"{count:.0f}"))
    if line is not None:
        d = ""
        for i, count in enumerate(line.tolist()):
            x, y = axes.at(low + (i + 0.5) * width, count)
            d += f"{'L' if d else 'M'}{x} {y}"
        paths = (*paths, Path(d, "carried"))
    return Plot(460, 300, name, tuple(rects), paths, texts)


def _bins(values: int) -> int:
    """How many bars show how so many values are spread: few for few, by Rice's rule, and always odd."""
    return min(_BINS, 2 * math.ceil(math.cbrt(values)) | 1)


def _finite(reference: torch.Tensor, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = reference.detach().double().flatten(), found.detach().double().flatten()
    both = torch.isfinite(a) & torch.isfinite(b)
    return a[both], b[both]


def _range(data: torch.Tensor) -> tuple[float, float]:
    low, high = float(data.min()), float(data.max())
    if low == high:
        return low - 1.0, high + 1.0
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    raw = (high - low) / 5
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next((scale * part for part in (1, 2, 5) if scale * part >= raw), scale * 10)
    first = math.ceil(low / step)
    count = int((high - first * step) / step + 1e-9) + 1
    return [0.0 if abs(value := (first + i) * step) < step / 1e6 else value for i in range(count)]
