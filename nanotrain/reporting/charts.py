"""Charts as inline SVG that stays sharp and legible at every width: lines stretch with the page, text keeps its size.

A plot is a frame whose gridlines and labels stand at percentages, and within it a picture of 10,000 by 10,000 units stretched over
it. The numbers that a pointer shows are gathered in `Figures`, which the page carries as JSON.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

POINTS = 1200
"""Drawn of a line at most: more than a screen has columns."""
COLOURS = 8
"""Of the page's palette, --c1 to --c8."""
_SIZE = 10_000


@dataclass(frozen=True)
class Series:
    """One line of a plot over x; gaps where y is NaN."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str = "var(--c1)"
    style: str = "line"
    """`line`; `faint`, thin and pale; `dots`, points (up to 80) joined by a thin line; `area`, filled down to `base`."""
    dash: str = ""
    label: str = ""
    """Written at the line's right end."""
    base: np.ndarray | None = None
    """Lower edge of an area; the pointer then shows what lies between."""


@dataclass
class Figures:
    """What the pointer shows: for each plot its series' exact values. An x that series share is kept once."""

    xs: list[list[float]] = field(default_factory=list)
    plots: list[dict[str, Any]] = field(default_factory=list)
    _known: dict[bytes, int] = field(default_factory=dict)

    def x(self, values: np.ndarray) -> int:
        """The number of these x."""
        key = values.tobytes()
        if key not in self._known:
            self._known[key] = len(self.xs)
            self.xs.append([_short(v) for v in values.tolist()])
        return self._known[key]

    def script(self) -> str:
        """As a block of JSON that no text in it can end."""
        text = json.dumps({"xs": self.xs, "plots": self.plots}, separators=(",", ":")).replace("<", "\\u003c")
        return f'<script type="application/json" id="figures">{text}</script>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (steps of 1, 2 or 5) within [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    scale = 10.0 ** math.floor(math.log10(raw))
    step = scale * next(size for size, most in ((1, 2**0.5), (2, 10**0.5), (5, 50**0.5), (10, math.inf)) if raw < scale * most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12 - math.floor(math.log10(step))) for n in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Within [low, high] 1, 2 and 5 of each power of ten, or where those are many more than `count` the powers, thinned to as many."""
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high) + 1e-9)
    fine = [tick for n in range(first, last + 1) for tick in (10.0**n, 2 * 10.0**n, 5 * 10.0**n) if low * 0.999 <= tick <= high * 1.001]
    if len(fine) < 2:
        return ticks(low, high, count)
    if len(fine) <= count + 2:
        return fine
    powers = [10.0**n for n in range(math.ceil(math.log10(low) - 1e-9), last + 1)]
    return powers[:: math.ceil(len(powers) / count)]


def compact(value: float, step: float = 0.0) -> str:
    """A tick's label: 1500 -> '1.5k', 0.0002 -> '2e-4'. Ticks `step` apart get labels that differ."""
    if not value:
        return "0"
    size = max(abs(value), step)
    for unit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            digits = max(3, 1 + math.ceil(math.log10(size / step) - 1e-9)) if step else 3
            return f"{value / unit:.{digits}g}{suffix}"
    if (step or size) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" if step else f"{value:.3g}"


def envelope(y: np.ndarray, limit: int) -> np.ndarray:
    """Indices of at most about `limit` of y's values that draw as all of them would: the smallest and largest of each stretch."""
    count = len(y)
    if count <= limit:
        return np.arange(count)
    stretch = math.ceil(count / max(1, limit // 2))
    rows = math.ceil(count / stretch)
    gaps = np.full(rows * stretch - count, np.nan)
    blocks = np.concatenate([y, gaps]).reshape(rows, stretch)
    start = np.arange(rows) * stretch
    lowest = start + np.where(np.isnan(blocks), np.inf, blocks).argmin(1)
    highest = start + np.where(np.isnan(blocks), -np.inf, blocks).argmax(1)
    return np.unique(np.concatenate([[0], lowest, highest, [count - 1]]))


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` values around each, fewer at the ends (as many before as after, at the start); NaN counts for none."""
    count = len(y)
    if count == 0 or window < 2:
        return y
    finite = np.isfinite(y)
    centre = float(y[finite].mean()) if finite.any() else 0.0  # sums of what is near nought lose no digits
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, y - centre, 0.0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    at, half = np.arange(count), window // 2
    before = np.minimum(half, at)
    start, stop = at - before, np.minimum(at + before, count - 1) + 1
    with np.errstate(invalid="ignore"):
        return centre + (total[stop] - total[start]) / np.where(number[stop] > number[start], number[stop] - number[start], np.nan)


@dataclass(frozen=True)
class Scale:
    """From values to a share of the plot, 0 at the low end and 1 at the high."""

    low: float
    high: float
    log: bool = False

    def share(self, values: Any) -> np.ndarray:
        """NaN stays NaN; what a logarithm cannot show becomes it."""
        values = np.asarray(values, dtype=np.float64)
        if not self.log:
            return (values - self.low) / (self.high - self.low)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(values > 0, np.log10(values), np.nan)
        return (logs - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """(value, label) of the round numbers within."""
        values = log_ticks(self.low, self.high, count) if self.log else ticks(self.low, self.high, count)
        step = 0.0 if self.log or len(values) < 2 else values[1] - values[0]
        return [(value, compact(value, step)) for value in values]


def fit(series: list[Series], *, log: bool = False, zero: bool = False, include: tuple[float, ...] = ()) -> tuple[Scale, int]:
    """A scale for y, and how many values lie over its top: a few far out of the others' range must not flatten them."""
    parts = [s.y[np.isfinite(s.y)] for s in series] + [s.base[np.isfinite(s.base)] for s in series if s.base is not None]
    values = np.concatenate([*parts, np.array(include)])
    if log:
        values = values[values > 0]
    if not len(values):
        return Scale(0.1 if log else 0.0, 1.0, log), 0
    low, high = float(values.min()), float(values.max())
    usual = max(float(part.max() if len(part) <= 50 else np.quantile(part, 0.995)) for part in [*parts, np.array(include)] if len(part))
    if not log and high - usual > 1.5 * (usual - low):
        high = usual + 0.5 * (usual - low)
    if zero and not log:
        low = min(0.0, low)
    if log:
        low, high = (low / 1.15, high * 1.15) if high > low * 1.3 else (low / 2, high * 2)
    else:
        room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low if zero and low == 0 else low - room, high + room
    over = sum(int((part > high).sum()) for part in parts[: len(series)])
    return Scale(low, high, log), over


def plot(figures: Figures, series: list[Series], *, name: str, x_scale: Scale, x_unit: str = "step", height: int = 220, kind: str = "number",
         y_scale: Scale, band: tuple[float, float] | None = None, limit: int = POINTS) -> str:  # fmt: skip
    """A plot `height` pixels high. `kind` is how the pointer writes y: number, percent, bytes, seconds or small.

    `band` is shaded. `limit` is what a series may draw [points].
    """
    drawn, rows = [], []
    for one in series:
        drawn.append(_draw(one, x_scale, y_scale, limit))
        if kept := _hover(figures, one, limit):
            rows.append(kept)
    number = len(figures.plots)
    figures.plots.append({"x": [x_scale.low, x_scale.high], "y": [y_scale.low, y_scale.high], "log": y_scale.log, "kind": kind, "unit": x_unit,
                          "series": rows})  # fmt: skip
    frame = []
    if band:
        top, bottom = (100 - 100 * np.clip(y_scale.share(edge), 0, 1) for edge in (band[1], band[0]))
        frame.append(f'<rect class="band" x="0" width="100%" y="{top:.2f}%" height="{max(0.0, bottom - top):.2f}%"/>')
    for value, label in y_scale.ticks(max(2, height // 45)):
        at = f"{100 - 100 * float(y_scale.share(value)):.2f}%"
        frame.append(f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/><text class="tick" x="-8" y="{at}" dy=".34em">{label}</text>')
    for value, label in x_scale.ticks(4):
        at = f"{100 * float(x_scale.share(value)):.2f}%"
        frame.append(f'<text class="tick mid" x="{at}" y="100%" dy="18">{label}</text>')
    frame.append('<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>')
    frame.append(f'<text class="tick" x="-20" y="100%" dy="18">{x_unit}</text>')
    return (
        f'<div class="plot" style="min-height:{height}px" data-plot="{number}" tabindex="0" role="img" aria-label="{html.escape(name)}">'
        f'<svg class="frame" aria-hidden="true">{"".join(frame)}'
        f'<svg class="ink" viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none">{"".join(drawn)}</svg>'
        f"{_end_labels(series, x_scale, y_scale, height)}</svg></div>"
    )


def _draw(one: Series, x_scale: Scale, y_scale: Scale, limit: int) -> str:
    kept = envelope(one.y, limit)
    x, y = _units(x_scale.share(one.x[kept])), _units(1 - y_scale.share(one.y[kept]))
    colour = f'style="--c:{one.colour}"'
    if one.style == "area":
        floor = _units(1 - y_scale.share(one.base[kept]))
        whole = np.isfinite(y) & np.isfinite(floor)
        edge = [f"{a:.0f} {b:.0f}" for a, b in zip(x[whole], y[whole], strict=True)]
        back = [f"{a:.0f} {b:.0f}" for a, b in zip(x[whole][::-1], floor[whole][::-1], strict=True)]
        return f'<path class="area" {colour} d="M{"L".join([*edge, *back])}Z"/>' if edge else ""
    finite = np.isfinite(y) & np.isfinite(x)
    if not finite.any():
        return ""
    dash = f' stroke-dasharray="{one.dash}"' if one.dash else ""
    path = f'<path class="{one.style}" {colour}{dash} d="{_path(x, y, finite)}"/>'
    if (one.style == "dots" and finite.sum() <= 80) or finite.sum() == 1:
        path += f'<path class="points" {colour} d="{"".join(f"M{a:.0f} {b:.0f}h0" for a, b in zip(x[finite], y[finite], strict=True))}"/>'
    return path


def _units(shares: np.ndarray) -> np.ndarray:
    """Of the picture; what lies beyond its edge is drawn up to it."""
    return np.clip(shares * _SIZE, 0, _SIZE)


def _path(x: np.ndarray, y: np.ndarray, finite: np.ndarray) -> str:
    """Points joined where neighbours are both finite."""
    begins = finite & ~np.concatenate([[False], finite[:-1]])
    return "".join(f"{'M' if new else 'L'}{a:.0f} {b:.0f}" for a, b, new, seen in zip(x, y, begins, finite, strict=True) if seen)


def _hover(figures: Figures, one: Series, limit: int) -> dict[str, Any] | None:
    kept = envelope(one.y, limit)
    y = one.y[kept] if one.base is None else one.y[kept] - one.base[kept]
    finite = np.isfinite(y) & np.isfinite(one.x[kept])
    if not finite.any():
        return None
    return {"name": one.name, "colour": one.colour, "x": figures.x(one.x[kept][finite]), "y": [_short(v) for v in y[finite].tolist()],
            "at": None if one.base is None else [_short(v) for v in one.y[kept][finite].tolist()]}  # fmt: skip


def _short(value: float) -> float:
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.6g}")


def _end_labels(series: list[Series], x_scale: Scale, y_scale: Scale, height: int) -> str:
    """The labels at the right ends, moved apart where they would touch; where there is no room for all, every so many."""
    ends = []
    for one in series:
        finite = np.isfinite(y_scale.share(one.y)) & np.isfinite(one.x)
        if one.label and finite.any():
            x, y = float(x_scale.share(one.x[finite][-1])), float(np.clip(1 - y_scale.share(one.y[finite][-1]), 0, 1))
            ends.append([y * height, 100 * x, one])
    ends.sort(key=lambda end: end[0])
    least = 16.0
    ends = ends[:: max(1, math.ceil(len(ends) * least / height))]
    for before, after in zip(ends, ends[1:], strict=False):
        after[0] = max(after[0], before[0] + least)
    ceiling = height - 6.0
    for end in reversed(ends):
        end[0] = min(end[0], ceiling)
        ceiling = end[0] - least
    return "".join(
        f'<text class="end" style="--c:{one.colour}" x="{x:.2f}%" dx="5" y="{100 * y / height:.2f}%" dy=".34em">{html.escape(one.label)}</text>'
        for y, x, one in ends
    )


def legend(series: list[Series], band: str = "") -> str:
    """Name beside a sample of each line."""
    items = []
    for one in series:
        if one.style == "area":
            mark = '<rect class="area" width="16" height="10"/>'
        elif one.style == "dots":
            mark = '<path class="dots" d="M0 5h16"/><path class="points" d="M8 5h0"/>'
        else:
            mark = f'<path class="{one.style}" d="M0 5h18"{f""" stroke-dasharray="{one.dash}" """ if one.dash else ""}/>'
        items.append(f'<li style="--c:{one.colour}"><svg width="18" height="10" aria-hidden="true">{mark}</svg>{html.escape(one.name)}</li>')
    if band:
        items.append(f'<li><svg width="18" height="10" aria-hidden="true"><rect class="band" width="18" height="10"/></svg>{html.escape(band)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def bar(parts: list[tuple[str, float, str]], whole: float, name: str) -> str:
    """A bar of (name, size, colour) side by side, drawn to `whole`."""
    at, drawn = 0.0, []
    for part, size, colour in parts:
        share = 100 * size / whole if whole > 0 else 0.0
        drawn.append(f'<rect style="--c:{colour}" x="{at:.3f}%" width="{share:.3f}%" height="100%"><title>{html.escape(part)}</title></rect>')
        at += share
    return f'<svg class="bar" role="img" aria-label="{html.escape(name)}">{"".join(drawn)}</svg>'


def lanes(figures: Figures, rows: list[tuple[str, np.ndarray, str]], *, x_scale: Scale, x_unit: str) -> str:
    """A lane for each (kind, x, colour) with a mark wherever one happened."""
    height = 26 * len(rows)
    frame, ink, hover = [], [], []
    for number, (name, x, colour) in enumerate(rows):
        middle = (number + 0.5) / len(rows)
        top, bottom = (round(_SIZE * (middle + side / len(rows))) for side in (-0.3, 0.3))
        columns = np.unique(np.round(_units(x_scale.share(x)) / 8) * 8)
        ink.append(f'<path class="mark" style="--c:{colour}" d="{"".join(f"M{a:.0f} {top}V{bottom}" for a in columns)}"/>')
        frame.append(f'<line class="grid" x1="0" x2="100%" y1="{100 * middle:.2f}%" y2="{100 * middle:.2f}%"/>'
                     f'<text class="tick" x="-8" y="{100 * middle:.2f}%" dy=".34em">{html.escape(name)}</text>')  # fmt: skip
        kept = x[:: max(1, len(x) // POINTS)]
        hover.append({"name": name, "colour": colour, "x": figures.x(kept), "y": [1 - middle] * len(kept), "at": None, "mark": True})
    for value, label in x_scale.ticks(4):
        frame.append(f'<text class="tick mid" x="{100 * float(x_scale.share(value)):.2f}%" y="100%" dy="18">{label}</text>')
    frame.append(f'<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/><text class="tick" x="-20" y="100%" dy="18">{x_unit}</text>')
    number = len(figures.plots)
    figures.plots.append({"x": [x_scale.low, x_scale.high], "y": [0, 1], "log": False, "kind": "mark", "unit": x_unit, "series": hover})
    return (
        f'<div class="plot lanes" style="height:{height}px" data-plot="{number}" tabindex="0" role="img" aria-label="Events by {x_unit}">'
        f'<svg class="frame" aria-hidden="true">{"".join(frame)}'
        f'<svg class="ink" viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none">{"".join(ink)}</svg></svg></div>'
    )
