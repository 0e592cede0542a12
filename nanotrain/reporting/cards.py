"""The cards of a report: each chart of one run, or of several over each other, with its legend and what it says in words."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nanotrain.console import duration
from nanotrain.memory import format_bytes
from nanotrain.reporting import charts
from nanotrain.reporting.charts import Figures, Scale, Series, bar, fit, lanes, legend, plot, smooth
from nanotrain.reporting.history import History, Table
from nanotrain.reporting.page import card, details, escape, table

DASHES = ("", "7 3", "2 3", "9 3 2 3")
"""Tell the lines of several runs apart without their colours."""


@dataclass
class Shown:
    """A run on the page."""

    history: History
    letter: str
    """Its name in labels and tables: A, B, C."""
    name: str
    number: int
    by_tokens: bool = False
    """Whether x is tokens, not steps."""

    @property
    def colour(self) -> str:
        return f"var(--c{self.number % charts.COLOURS + 1})"

    @property
    def dash(self) -> str:
        return DASHES[self.number % len(DASHES)]

    @cached_property
    def window(self) -> int:
        """Steps that a smoothed value is the mean of."""
        return max(1, len(self.history.steps) // 40) | 1

    @cached_property
    def x(self) -> np.ndarray:
        """Of each step's row."""
        return self.x_of(self.history.steps["step"])

    def x_of(self, steps: np.ndarray) -> np.ndarray:
        """Where steps stand on the x axis."""
        own, tokens = self.history.steps["step"], self.history.steps["tokens"]
        known = np.isfinite(tokens)
        if not self.by_tokens or not known.any():
            return np.asarray(steps, dtype=np.float64)
        return np.interp(steps, own[known], tokens[known])


class Charts:
    """The charts of the page, each a card; those that the runs have nothing for are empty, and named in `missing`."""

    def __init__(self, runs: list[Shown]):
        self.runs, self.figures = runs, Figures()
        self.missing: list[str] = []
        self.unit = "tokens" if runs[0].by_tokens else "step"
        self.limit = max(80, charts.POINTS // len(runs))
        ends = [float(x.max()) for run in runs for x in (run.x, run.x_of(run.history.validations["step"])) if len(x)]
        self.x_scale = Scale(0.0, max([1.0, *ends]))
        self.one = len(runs) == 1

    def plot(self, series: list[Series], name: str, **options: Any) -> str:
        """A plot over this page's x axis, on a scale that fits unless one is given."""
        options.setdefault("y_scale", fit(series)[0])
        return plot(self.figures, series, name=name, x_scale=self.x_scale, x_unit=self.unit, limit=self.limit, **options)

    def key(self, series: list[Series], band: str = "") -> str:
        """The legend: of the lines of one run, or of the runs."""
        return legend(series if self.one else [Series(f"{r.letter}: {r.name}", r.x, r.x, r.colour, dash=r.dash) for r in self.runs], band)

    def of_steps(self, column: str, name: str, *, factor: float = 1.0, exact: bool = False) -> list[Series]:
        """A column of the steps' rows, raw and smoothed; only raw where it is `exact`."""
        series = []
        for run in self.runs:
            if not run.history.steps.has(column):
                continue
            raw = run.history.steps[column] * factor
            prefix, dash, label = ("", "", "") if self.one else (f"{run.letter} ", run.dash, run.letter)
            if not exact and len(self.runs) <= 3:
                series.append(Series(f"{prefix}{name}", run.x, raw, run.colour, "faint"))
            main, remark = (raw, "") if exact else (smooth(raw, run.window), ", smoothed")
            series.append(Series(f"{prefix}{name}{remark}", run.x, main, run.colour, dash=dash, label=label))
        return series

    def of_validations(self, column: str) -> list[Series]:
        """A column of the validations' rows as points, those of other amounts of text apart: their values do not compare."""
        series = []
        for run in self.runs:
            rows = run.history.validations
            amounts = np.nan_to_num(rows["val_tokens"])
            for n, amount in enumerate(dict.fromkeys(amounts.tolist())):
                kept = amounts == amount
                if np.isfinite(rows[column][kept]).any():
                    name = f"validation, {amount:,.0f} tokens" if amount else "validation"
                    colour = f"var(--c{2 + n % 7})" if self.one else run.colour
                    name = name if self.one else f"{run.letter} {name}"
                    series.append(Series(name, run.x_of(rows["step"][kept]), rows[column][kept], colour, "dots"))
        return series

    def nothing(self, title: str) -> str:
        """In place of a card that nothing was recorded for."""
        self.missing.append(title)
        return ""

    def smoothing(self) -> str:
        """How lines are smoothed, in words."""
        windows = sorted({run.window for run in self.runs})
        return f"smoothed over {windows[0]:,}" + (f" to {windows[-1]:,}" if len(windows) > 1 else "") + " steps"

    def simple(self, title: str, note: str, column: str, key: str, *, name: str = "", factor: float = 1.0, exact: bool = False,
               zero: bool = True, **options: Any) -> str:  # fmt: skip
        """The card of one column of the steps' rows."""
        series = self.of_steps(column, name or title.lower(), factor=factor, exact=exact)
        if not series:
            return self.nothing(title)
        return card(title, note, self.key(series) + self.plot(series, title, y_scale=fit(series, zero=zero)[0], **options), key=key)

    def loss(self) -> str:
        """Training and validation loss."""
        series = self.of_steps("loss", "training") + self.of_validations("val_loss")
        if not series:
            return self.nothing("Loss")
        scale, over = fit(series)
        highest = max(float(np.nanmax(s.y)) for s in series)
        beyond = f"; above the picture: {over:,}, the highest {highest:.4g}" if over else ""
        points = "" if self.one else "; points are validations"
        note = f"nats per token, {self.smoothing()}{points}{beyond}"
        return card("Loss", note, self.key(series) + self.plot(series, "Loss", y_scale=scale, height=300), key="loss", wide=True)

    def bits_per_byte(self) -> str:
        """Held-out bits per byte."""
        series = self.of_validations("val_bpb")
        if not series:
            return self.nothing("Bits per byte")
        return card("Bits per byte", "of held-out text, each validation", self.key(series) + self.plot(series, "Bits per byte"), key="bpb")

    def gradient_norm(self) -> str:
        """Gradient norm, and under it the share of steps that were clipped."""
        norms, clipped = self.of_steps("grad_norm", "norm"), []
        for run in self.runs:
            if run.history.steps.has("clipped"):
                share = 100 * smooth(run.history.steps["clipped"], run.window)
                clipped.append(Series("clipped" if self.one else f"{run.letter} clipped", run.x, share, run.colour, dash="" if self.one else run.dash,
                                      label="" if self.one else run.letter))  # fmt: skip
        body = ""
        if norms:
            values = np.concatenate([s.y[s.y > 0] for s in norms])
            log = len(values) > 0 and bool(np.quantile(values, 0.999) > 12 * np.quantile(values, 0.001))
            body += self.key(norms, "health band") + self.plot(norms, "Gradient norm", y_scale=fit(norms, log=log)[0], height=170, band=(0.1, 10))
        if clipped:
            top = max(10.0, *(1.1 * float(np.nanquantile(s.y, 0.97)) for s in clipped))
            body += '<p class="sub">Steps clipped, % (health band: under 5%)</p>'
            body += self.plot(clipped, "Share of steps clipped", y_scale=Scale(0, min(100.0, top)), height=80, kind="percent", band=(0, 5))
        if not body:
            return self.nothing("Gradient norm")
        return card("Gradient norm", f"before clipping, {self.smoothing()}", body, key="norm")

    def step_time(self) -> str:
        """Where the time of steps goes: over the run, and in all."""
        parts = {run.letter: time_parts(run.history) for run in self.runs}
        if not any(parts.values()):
            return self.nothing("Step time")
        series = _time_areas(self.runs[0]) if self.one else self.of_steps("step_s", "step")
        body = "" if self.one else self.key(series)
        body += self.plot(series, "Step time", y_scale=fit(series, zero=True)[0], kind="seconds")
        for run in self.runs:
            if spent := parts[run.letter]:
                total = sum(seconds for _, seconds, _ in spent)
                text = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds, _ in spent)
                body += f'<p class="sub">{"" if self.one else escape(run.letter) + ": "}{duration(total).strip()} in all: {escape(text)}</p>'
                body += bar(spent, total, f"Time of {run.name}: {text}")
        body += _swatches(list({part[0]: part for spent in parts.values() for part in spent}.values()))
        return card("Step time", "what a step's seconds are spent on", body, key="time")

    def memory(self) -> str:
        """Planned against measured memory."""
        rows = [(run, *memory_of(run.history)) for run in self.runs]
        whole = max([0.0, *(max(sum(size for _, size, _ in parts), measured) for _, parts, measured, _ in rows)])
        if not whole:
            return self.nothing("Memory")
        body, named = "", []
        for run, parts, measured, available in rows:
            planned = sum(size for _, size, _ in parts)
            prefix = "" if self.one else f"{run.letter}: "
            if planned:
                free = f", of {format_bytes(available)} that were free" if available else ""
                text = f"{prefix}planned {format_bytes(planned)}{free}"
                body += f'<p class="sub">{escape(text)}</p>{bar(parts, whole, text)}'
                named = named or parts
            if measured:
                times = f", {measured / planned:.2f} times the plan" if planned else ""
                text = f"{prefix}measured {format_bytes(measured)} at the peak{times}"
                body += f'<p class="sub">{escape(text)}</p>{bar([("measured", measured, "var(--c8)")], whole, text)}'
        if self.one and named:
            items = [(f"{name} {format_bytes(size)}", size, colour) for name, size, colour in named]
            body += _swatches([*items, ("measured", 0, "var(--c8)")])
        elif named:
            body += _swatches([*named, ("measured", 0, "var(--c8)")])
        return card("Memory", "planned before the run, and measured at its peak", body, key="memory")

    def update_ratio(self) -> str:
        """|update| / |weight|: each layer's of one run, the mean of several."""
        series: list[Series] = []
        for run in self.runs:
            ratios, x = run.history.ratios, run.x_of(run.history.ratios["step"])
            layers = layers_of(ratios.names()) if self.one else {f"{run.letter} mean": ratios.names()}
            for n, (layer, names) in enumerate(layers.items()):
                hue = 255 - 225 * n / max(1, len(layers) - 1)
                colour = f"oklch(var(--ramp) .13 {hue:.0f})" if self.one else run.colour
                label = (layer.removeprefix("block ") if layer[-1].isdigit() else layer[0]) if self.one else run.letter
                mean = smooth(100 * _mean_ratio(ratios, names), len(ratios) // 100)
                series.append(Series(layer, x, mean, colour, dash="" if self.one else run.dash, label=label))
        if not any(np.isfinite(s.y).any() for s in series):
            return self.nothing("Update over weight")
        note = f"norm of a step's update over norm of the weight, %; geometric mean of {'each layer' if self.one else 'all parameters'}"
        body = self.key(series, "health band") + self.plot(series, "Update over weight", kind="percent", band=(0.1, 1), height=240,
                                                           y_scale=fit(series, log=True, include=(0.1, 1.0))[0])  # fmt: skip
        return card("Update over weight", note, body + (_ratio_table(self.runs[0].history.ratios) if self.one else ""), key="ratio")

    def gpu(self) -> str:
        """What the GPU said of itself."""
        figures = (("gpu_utilisation", "Utilisation, %", "percent", (80, 95)), ("gpu_watts", "Power, W", "number", None),
                   ("gpu_celsius", "Temperature, °C", "number", None), ("gpu_mhz", "Clock, MHz", "number", None))  # fmt: skip
        body = ""
        for column, title, kind, band in figures:
            series = [
                Series(title if self.one else f"{run.letter} {title}", run.x_of(run.history.gpu["step"]), run.history.gpu[column], run.colour,
                       dash="" if self.one else run.dash, label="" if self.one else run.letter)
                for run in self.runs if run.history.gpu.has(column)
            ]  # fmt: skip
            if series:
                scale = Scale(0, 100) if kind == "percent" else fit(series)[0]
                body += f'<p class="sub">{title}</p>' + self.plot(series, title, y_scale=scale, height=80, kind=kind, band=band)
        if not body:
            return self.nothing("GPU")
        throttled = {reason: count for run in self.runs for reason, count in run.history.throttled.items()}
        note = "throttled: " + ", ".join(f"{reason} ({count} times)" for reason, count in throttled.items()) if throttled else "never throttled"
        return card("GPU", note, self.key([], "health band") + body, key="gpu")

    def events(self) -> str:
        """When things happened."""
        cards = []
        for run in self.runs:
            rows = [(name, run.x_of(np.array(sorted(steps), dtype=np.float64)), colour) for name, steps, colour in happened(run.history) if steps]
            if rows:
                drawn = lanes(self.figures, rows, x_scale=self.x_scale, x_unit=self.unit)
                cards.append(("" if self.one else f'<p class="sub">{escape(run.letter)}: {escape(run.name)}</p>') + drawn)
        if not cards:
            return self.nothing("What happened when")
        return card("What happened when", "checkpoints, validations and whatever else there was", "".join(cards), key="lanes", wide=True)

    def all(self) -> str:
        """Every card, in the order of the page."""
        cards = [
            self.loss(), self.events(), self.bits_per_byte(),
            self.simple("Learning rate", "AdamW's; the others follow the same schedule", "lr", "lr", exact=True, kind="small"),
            self.gradient_norm(), self.update_ratio(),
            self.simple("Tokens per second", self.smoothing(), "tokens_per_s", "speed"), self.step_time(), self.memory(), self.gpu(),
            self.simple("Model FLOPs utilisation", "% of the GPU's dense peak", "mfu", "mfu", name="MFU", factor=100, kind="percent"),
            self.simple("Loss scale", "of float16", "loss_scale", "scale", exact=True),
        ]  # fmt: skip
        halves = [n for n, one in enumerate(cards) if 'class="card"' in one]
        if len(halves) % 2:
            cards[halves[-1]] = cards[halves[-1]].replace('class="card"', 'class="card wide"', 1)  # alone in its row
        if self.missing:
            cards.append(card("Not recorded", ", ".join(self.missing), "", key="missing", wide=True))
        return f'<div class="charts">{"".join(cards)}</div>'


Part = tuple[str, float, str]
"""Name, size and colour of a part of a bar."""


def time_parts(h: History) -> list[Part]:
    """What a run's seconds went into; empty where it recorded none."""
    steps = h.steps
    if not steps.has("step_s"):
        return []
    data, talk = np.nansum(steps["data_s"]), np.nansum(steps["communication_s"])
    parts = (
        ("compute", np.nansum(steps["step_s"]) - data - talk, "var(--c1)"),
        ("wait for data", data, "var(--c2)"),
        ("communication", talk, "var(--c4)"),
        ("checkpoints", np.nansum(steps["checkpoint_s"]), "var(--c5)"),
        ("validation", np.nansum(h.validations["val_s"]), "var(--c3)"),
    )
    return [(name, float(seconds), colour) for name, seconds, colour in parts if seconds > 0]


def _time_areas(run: Shown) -> list[Series]:
    """The parts of a step's time upon each other, means of as many steps as makes at most 200 of them."""
    steps = run.history.steps
    count = len(steps)
    starts = np.arange(0, count, max(1, math.ceil(count / 200)))
    size = np.diff([*starts, count])

    def mean(column):
        return np.add.reduceat(np.nan_to_num(steps[column]), starts) / size

    data, talk = mean("data_s"), mean("communication_s")
    layers = (
        ("compute", mean("step_s") - data - talk, "var(--c1)"),
        ("wait for data", data, "var(--c2)"),
        ("communication", talk, "var(--c4)"),
        ("checkpoints", mean("checkpoint_s"), "var(--c5)"),
    )
    series, base, x = [], np.zeros(len(starts)), run.x[starts]
    for name, seconds, colour in layers:
        if seconds.any():
            series.append(Series(name, x, base + seconds, colour, "area", base=base))
            base = base + seconds
    return series


def memory_of(h: History) -> tuple[list[Part], float, float]:
    """(parts of the plan, measured peak, what was free before) [bytes]; empty or 0 where not recorded."""
    plan = h.last("start").get("plan")
    plan = plan if isinstance(plan, dict) else {}
    names = ("parameters", "gradients", "optimizer", "activations", "workspace")
    parts = [(name, _size(plan.get(name)), f"var(--c{n + 1})") for n, name in enumerate(names) if _size(plan.get(name))]
    if not parts and (planned := _size(h.last("memory").get("planned_bytes"))):
        parts = [("planned", planned, "var(--c1)")]
    peaks = h.steps["peak_memory_bytes"]
    seen = [_size(h.last("end").get("peak_memory_bytes")), _size(h.last("memory").get("measured_bytes")), *peaks[np.isfinite(peaks)][-1:].tolist()]
    return parts, max(seen), _size(plan.get("available"))


def _size(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1e18 else 0.0


def layers_of(names: list[str]) -> dict[str, list[str]]:
    """Parameters by the layer they belong to: a block, the embedding, the head."""
    layers: dict[str, list[str]] = {}
    for name in names:
        block = re.match(r"blocks\.(\d+)\.", name)
        layers.setdefault(f"block {block[1]}" if block else name.split(".")[0] or "unnamed", []).append(name)
    return layers


def _mean_ratio(ratios: Table, names: list[str]) -> np.ndarray:
    """Geometric mean over parameters, of each row; NaN where a row holds none above 0."""
    total, count = np.zeros(len(ratios)), np.zeros(len(ratios))
    for name in names:
        values = ratios[name]
        known = values > 0
        total += np.log(values, where=known, out=np.zeros(len(values)))
        count += known
    return np.exp(np.divide(total, count, where=count > 0, out=np.full(len(ratios), np.nan)))


def _ratio_table(ratios: Table) -> str:
    rows = []
    for name in ratios.names():
        known = ratios[name][np.isfinite(ratios[name])]
        if len(known):
            value = known[-1]
            verdict = "under the band" if value < 1e-3 else "over the band" if value > 1e-2 else "inside"
            rows.append((escape(name), f"{100 * value:.3g}%", verdict))
    outside = sum(row[2] != "inside" for row in rows)
    return details("Each parameter, as last measured", f"{len(rows)}, of them {outside} outside the band", table(("parameter", "ratio", ""), rows))


def _swatches(parts: list[Part]) -> str:
    items = (
        f'<li style="--c:{colour}"><svg width="10" height="10" aria-hidden="true"><rect class="swatch" width="10" height="10" rx="2"/></svg>'
        f"{escape(name)}</li>"
        for name, _, colour in parts
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def happened(h: History) -> list[tuple[str, list[float], str]]:
    """(kind, steps, colour) of what can happen in a run besides steps."""

    def steps(*kinds):
        return [float(event["step"]) for event in h.of(*kinds) if isinstance(event.get("step"), int)]

    restarts = [float(match[1]) for event in h.of("resumed") if (match := re.search(r"step-(\d{1,15})", str(event.get("checkpoint"))))]
    return [
        ("checkpoint", steps("checkpoint"), "var(--c1)"),
        ("validation", h.validations["step"].tolist(), "var(--c3)"),
        ("sample", steps("sample"), "var(--c6)"),
        ("restart", restarts, "var(--c4)"),
        ("skipped", h.steps["step"][h.steps["skipped"] > 0].tolist(), "var(--c2)"),
        ("spike", steps("spike"), "var(--c7)"),
        ("plateau", steps("plateau"), "var(--c8)"),
    ]
