"""What a GPU could do at best: the time that a kernel's bytes and FLOPs need at the stated peaks, and the picture of it.

A kernel that moves `nbytes` and does `flops` takes at least max(nbytes / bandwidth, flops / peak) seconds; its share of the roofline is
that bound over what was measured. Source: Williams, Waterman and Patterson 2009, "Roofline".
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

import torch

from nanotrain.environment import stated_peaks
from nanotrain.gpu import GpuWatch, ask


@dataclass(frozen=True)
class Roof:
    """Stated peaks of a GPU."""

    name: str
    bandwidth: float
    """Of its memory [bytes/s]."""
    flops: float | None
    """Dense bf16 with fp32 sums [FLOP/s]; None where unknown."""

    def seconds(self, nbytes: float, flops: float) -> float:
        """The least that so many bytes and FLOPs take."""
        return max(nbytes / self.bandwidth, flops / self.flops if self.flops else 0.0)

    @property
    def ridge(self) -> float | None:
        """Intensity at which the two roofs meet [FLOP/byte]."""
        return self.flops / self.bandwidth if self.flops else None


def stated(name: str) -> Roof | None:
    """The peaks of a GPU by torch's name of it; None where they are not known."""
    peaks = stated_peaks(name)
    return Roof(name, *peaks) if peaks else None


H100 = stated("NVIDIA H100 80GB HBM3")
"""What predictions are made for where there is no GPU."""


@dataclass(frozen=True)
class Board:
    """What NVML says of a GPU that decides how fast it can be; a figure that it does not give is None."""

    power_cap_watts: float | None = None
    memory_mhz: int | None = None
    """The memory's highest clock: the present one is low until there is work."""
    bandwidth: float | None = None
    """Two transfers a clock over the whole bus [bytes/s]."""
    driver: str | None = None


def board(device: torch.device) -> Board:
    """Of the GPU of a device; empty where there is no NVML."""
    watch = GpuWatch(device)
    n, h = watch.nvml, watch.handle
    if n is None:
        return Board()
    milliwatts = ask(lambda: n.nvmlDeviceGetEnforcedPowerLimit(h))
    mhz, bus = ask(lambda: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_MEM)), ask(lambda: n.nvmlDeviceGetMemoryBusWidth(h))
    return Board(
        power_cap_watts=None if milliwatts is None else milliwatts / 1000,
        memory_mhz=mhz,
        bandwidth=None if mhz is None or bus is None else 2e6 * mhz * bus / 8,
        driver=ask(n.nvmlSystemGetDriverVersion),
    )


def roof_of(name: str, found: Board) -> Roof | None:
    """The stated peaks; of a GPU that the table lacks the bandwidth of its clock and bus; None where neither is known."""
    known = stated(name)
    return known or (Roof(name, found.bandwidth, None) if found.bandwidth else None)


@dataclass(frozen=True)
class Point:
    """A kernel in one direction, to be drawn."""

    label: str
    direction: str
    """forward or backward."""
    nbytes: float
    flops: float
    seconds: float
    """Measured, or predicted."""
    measured: bool

    @property
    def intensity(self) -> float:
        """[FLOP/byte]."""
        return self.flops / self.nbytes

    @property
    def rate(self) -> float:
        """[FLOP/s]."""
        return self.flops / self.seconds


WIDTH, HEIGHT = 1140, 680
LEFT, RIGHT, TOP, BOTTOM = 76, 360, 64, 72
"""Margins; the labels stand in the right one."""
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #333 } .title { font-size: 17px; font-weight: 600; fill: #111 }
.small { font-size: 12px; fill: #666 } .mid { text-anchor: middle } .end { text-anchor: end }
.grid { stroke: #e6e6e6 } .frame { stroke: #999; fill: none } .roof { stroke: #111; stroke-width: 2; fill: none }
.lead { stroke: #bbb; fill: none; stroke-width: .8 } .forward { fill: #1f6fd6; stroke: #1f6fd6 }
.backward { fill: #d9661f; stroke: #d9661f } circle { stroke-width: 1.8 } circle.predicted { fill: #fff }
"""


def picture(roof: Roof, points: list[Point], note: str = "") -> str:
    """The roofline as a self-contained SVG: FLOP/byte against TFLOP/s, a labelled point per kernel and direction, hollow where predicted.

    Raises ValueError where there is no point that has FLOPs.
    """
    points = [p for p in points if p.flops > 0 and p.nbytes > 0 and p.seconds > 0]
    if not points:
        raise ValueError("roofline: nothing to draw, no kernel has FLOPs")
    xs, ys = [p.intensity for p in points], [p.rate / 1e12 for p in points]
    top = roof.flops / 1e12 if roof.flops else max(ys)
    low_x, high_x = min(xs) / 2, 2 * max(*xs, 2 * (roof.ridge or 0.0))
    low_y, high_y = min(*ys, roof.bandwidth * low_x / 1e12) / 1.5, 2 * top

    def x(value):
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / low_x) / math.log(high_x / low_x)

    def y(value):
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(value / low_y) / math.log(high_y / low_y)

    drawn = _axes(x, y, (low_x, high_x), (low_y, high_y))
    drawn += _roofs(roof, x, y, (low_x, high_x), (low_y, high_y))
    drawn += _points(roof, points, x, y)
    drawn.append(f'<text class="title" x="{LEFT}" y="28">Roofline of {html.escape(roof.name)}</text>')
    drawn.append(f'<text class="small" x="{LEFT}" y="48">{html.escape(note)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">'
        f'<title>Roofline of {html.escape(roof.name)}</title><style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(drawn)}</svg>\n"
    )


def _powers(span: tuple[float, float]) -> list[float]:
    """Powers of ten within a span."""
    low, high = (math.log10(edge) for edge in span)
    return [10.0**n for n in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]


def _axes(x, y, span_x, span_y) -> list[str]:
    drawn = []
    left, right, top, bottom = x(span_x[0]), x(span_x[1]), y(span_y[1]), y(span_y[0])
    for value in _powers(span_x):
        at = x(value)
        drawn.append(f'<path class="grid" d="M{at:.1f} {top:.1f}V{bottom:.1f}"/>')
        drawn.append(f'<text class="mid" x="{at:.1f}" y="{bottom + 20:.1f}">{value:g}</text>')
    for value in _powers(span_y):
        at = y(value)
        drawn.append(f'<path class="grid" d="M{left:.1f} {at:.1f}H{right:.1f}"/>')
        drawn.append(f'<text class="end" x="{left - 8:.1f}" y="{at + 4:.1f}">{value:g}</text>')
    drawn.append(f'<path class="frame" d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>')
    middle = (top + bottom) / 2
    drawn.append(f'<text class="mid" x="{(left + right) / 2:.1f}" y="{bottom + 46:.1f}">intensity, FLOP per byte of memory</text>')
    drawn.append(f'<text class="mid" x="20" y="{middle:.1f}" transform="rotate(-90 20 {middle:.1f})">TFLOP/s</text>')
    return drawn


def _roofs(roof: Roof, x, y, span_x, span_y) -> list[str]:
    ridge = roof.ridge or span_x[1]
    start = max(span_x[0], span_y[0] * 1e12 / roof.bandwidth)
    path = f"M{x(start):.1f} {y(roof.bandwidth * start / 1e12):.1f}L{x(ridge):.1f} {y(roof.bandwidth * ridge / 1e12):.1f}"
    path += f"H{x(span_x[1]):.1f}" if roof.flops else ""
    # The name of the slope stands along it, above, right of where kernels that move memory crowd.
    at = start * (ridge / start) ** 0.66
    a, b = (x(at), y(roof.bandwidth * at / 1e12)), (x(at * 2), y(roof.bandwidth * at * 2 / 1e12))
    turn = f"rotate({math.degrees(math.atan2(b[1] - a[1], b[0] - a[0])):.1f} {a[0]:.1f} {a[1]:.1f})"
    drawn = [
        f'<path class="roof" d="{path}"/>',
        f'<text x="{a[0]:.1f}" y="{a[1] - 9:.1f}" transform="{turn}">memory, {roof.bandwidth / 1e12:.2f} TB/s</text>',
    ]
    if roof.flops:
        peak = y(roof.flops / 1e12)
        drawn.append(f'<text class="end" x="{x(span_x[1]) - 4:.1f}" y="{peak - 8:.1f}">bf16 tensor cores, {roof.flops / 1e12:.0f} TFLOP/s</text>')
    return drawn


def _points(roof: Roof, points: list[Point], x, y) -> list[str]:
    """Points, and their labels in a column on the right, in the points' order from the top, each at the end of a thin line."""
    ordered = sorted(points, key=lambda p: (-p.rate, -p.intensity))
    gap = min(17.0, (HEIGHT - TOP - BOTTOM) / max(1, len(ordered)))
    rows = [y(p.rate / 1e12) for p in ordered]
    for i in range(1, len(rows)):  # apart from the one above
        rows[i] = max(rows[i], rows[i - 1] + gap)
    ceiling = HEIGHT - BOTTOM
    for i in reversed(range(len(rows))):  # and within the picture
        rows[i] = min(rows[i], ceiling)
        ceiling = rows[i] - gap
    column = WIDTH - RIGHT + 26
    leads, marks = [], []
    for p, row in zip(ordered, rows, strict=True):
        at_x, at_y = x(p.intensity), y(p.rate / 1e12)
        leads.append(f'<path class="lead" d="M{at_x:.1f} {at_y:.1f}L{column - 20:.1f} {row:.1f}H{column - 4:.1f}"/>')
        share = f" {roof.seconds(p.nbytes, p.flops) / p.seconds:.0%}" if p.measured else ""
        kind = p.direction if p.measured else f"{p.direction} predicted"
        marks.append(f'<circle class="{kind}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="4.5"/>')
        marks.append(f'<text x="{column:.1f}" y="{row + 4:.1f}">{html.escape(f"{p.label} {p.direction}{share}")}</text>')
    legend, at = [], WIDTH - RIGHT + 26
    for kind in sorted({(p.direction, p.measured) for p in points}, key=lambda k: (k[0] != "forward", not k[1])):
        words = kind[0] if kind[1] else f"{kind[0]}, predicted"
        legend.append(f'<circle class="{kind[0]}{"" if kind[1] else " predicted"}" cx="{at}" cy="{HEIGHT - 30}" r="4.5"/>')
        legend.append(f'<text x="{at + 10}" y="{HEIGHT - 26}">{words}</text>')
        at += 34 + 7 * len(words)
    return [*leads, *marks, *legend]
