"""watch: a run as it goes, from another terminal, on the machine it runs on or wherever its folder can be read.

nanotrain watch runs/first
nanotrain watch runs/first --interval 10
nanotrain watch runs/first --once
"""

from __future__ import annotations

import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np

from nanotrain.config import HelpRequested
from nanotrain.console import duration
from nanotrain.gpu import ask, read_board
from nanotrain.memory import format_bytes
from nanotrain.reporting import health
from nanotrain.reporting.history import History

HELP = """usage: nanotrain watch RUN [--interval SECONDS] [--once]

  RUN                 folder of a run
  --interval SECONDS  between two looks (default: 2)
  --once              show the run as it is and end; so too where the output is no terminal

Ends when the run does, or with Ctrl-C, which does not touch the run."""

HISTORY = 32 << 20
"""Of a longer metrics file only so much of its end is read [bytes]: some hundred thousand steps."""
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*#@"


def main(argv: list[str]) -> int:
    """Command line."""
    path, interval, once = parse(argv)
    history, boards = History(path, HISTORY), Boards()
    live = not once and sys.stdout.isatty()
    drawn = 0
    try:
        while True:
            history.update()
            columns, rows = _size() if live else (100, 1000)
            lines = [_clip(line, columns - 1) for line in screen(history, boards.lines(), columns - 1, _bars())][: rows - 1]
            # In place: up to where the last drawing began, each line to its end, and nothing of what stood below.
            start = f"\x1b[{drawn}A" if drawn else ""
            text = "".join(f"\r{line}\x1b[K\n" for line in lines) + "\x1b[J" if live else "".join(f"{line}\n" for line in lines)
            sys.stdout.write(start + text)
            sys.stdout.flush()
            drawn = len(lines)
            if not live or history.state()[0] != "running":
                return 0
            time.sleep(interval)
    except KeyboardInterrupt:
        return 0


def parse(argv: list[str]) -> tuple[str, float, bool]:
    """(run folder, seconds between looks, whether to look once). ValueError for what is no command line of this."""
    path, interval, once, arguments = "", "2", False, list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument in ("-h", "--help"):
            raise HelpRequested(HELP)
        if argument == "--once":
            once = True
        elif argument == "--interval" and not arguments:
            raise ValueError("--interval: a value is missing")
        elif argument == "--interval" or argument.startswith("--interval="):
            interval = arguments.pop(0) if argument == "--interval" else argument.removeprefix("--interval=")
        elif argument.startswith("-"):
            raise ValueError(f"{argument}: unknown; --interval SECONDS and --once are what is taken besides the run's folder")
        elif path:
            raise ValueError(f"{argument}: a second run folder after {path}; one is watched at a time")
        else:
            path = argument
    if not path:
        raise ValueError("no run folder given; see nanotrain watch --help")
    try:
        seconds = float(interval)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 86400:
        raise ValueError(f"--interval {interval}: a number of seconds from 0.1 to 86400")
    return path, seconds, once


def screen(h: History, boards: list[str], width: int, bars: str = BARS) -> list[str]:
    """The lines to show, fit for `width` columns."""
    word, why = h.state()
    lines = [f"{h.name}: {word}{f' ({why})' if why else ''}"]
    if not len(h.steps):
        return [*lines, "no step has been recorded yet", *boards]
    lines += [_progress(h, width, bars), "", *_figures(h, width, bars)]
    lines += ["", *boards] if boards else []
    worries = [f"look: {v.name}: {v.measured} (band: {v.band})" for v in health.verdicts(h) if v.state == "look"]
    lines += ["", *worries] if worries else []
    events = [event for event in h.events if event["event"] != "sample"][-4:]
    return lines + ([""] + [_event(event) for event in events] if events else [])


def _progress(h: History, width: int, bars: str) -> str:
    """How far the run is, and how long the rest takes at its latest pace."""
    steps = h.steps
    step, recent = int(steps["step"][-1]), steps["step_s"][-50:]
    known = recent[np.isfinite(recent)]
    pace = float(known.mean()) if len(known) else math.nan
    done, budget, unit = float(step), _budget(h, "steps"), pace
    if not budget and (budget := _budget(h, "tokens")):
        done, unit = _last(steps["tokens"]), pace * step / max(1.0, _last(steps["tokens"]))
    elif not budget and not h.metrics_file.cut and (budget := _budget(h, "seconds")):
        done, unit = float(np.nansum(steps["step_s"])), 1.0
    text = f"step {step:,}"
    if not budget or not math.isfinite(done):
        return text
    share = min(1.0, done / budget)
    left = max(0.0, budget - done) * unit
    text += f"  {share:4.0%}" + (f"  {duration(left).strip()} left" if math.isfinite(left) else "")
    room = min(40, width - len(text) - 4)
    filled = round(share * room)
    return f"{text}  [{bars[-1] * filled}{' ' * (room - filled)}]" if room >= 8 else text


def _budget(h: History, name: str) -> float:
    start = h.last("start").get("budget")
    value = start.get(name) if isinstance(start, dict) else h.config().get(f"train.{name}")
    return float(value) if isinstance(value, (int, float)) and value > 0 else 0.0


Form = Callable[[float], str]


def _figures(h: History, width: int, bars: str) -> list[str]:
    """A line for each figure: its name, its newest value, its course, and between what it lay."""
    steps, rows = h.steps, h.validations
    figures: list[tuple[str, np.ndarray, Form, str]] = [
        ("loss", steps["loss"], "{:.4f}".format, "mean"),
        ("validation, bpb", rows["val_bpb"], "{:.4f}".format, "mean"),
        ("learning rate", steps["lr"], "{:.2e}".format, "mean"),
        ("gradient norm", steps["grad_norm"], "{:.3g}".format, "max"),
        ("clipped, % of 100", 100 * _recent_mean(steps["clipped"], 100), "{:.0f}".format, "mean"),
        ("tokens/s", steps["tokens_per_s"], "{:,.0f}".format, "mean"),
        ("step", steps["step_s"], _seconds, "max"),
        ("wait for data, %", 100 * steps["data_s"] / np.where(steps["step_s"] > 0, steps["step_s"], np.nan), "{:.1f}".format, "mean"),
        ("MFU, %", 100 * steps["mfu"], "{:.1f}".format, "mean"),
        ("peak memory", steps["peak_memory_bytes"], format_bytes, "max"),
        ("GPU, %", h.gpu["gpu_utilisation"], "{:.0f}".format, "mean"),
        ("GPU, W", h.gpu["gpu_watts"], "{:.0f}".format, "mean"),
        ("GPU, °C", h.gpu["gpu_celsius"], "{:.0f}".format, "mean"),
    ]
    lines = []
    for name, values, form, kind in figures:
        finite = values[np.isfinite(values)]
        if not len(finite):
            continue
        newest = form(float(values[-1])) if np.isfinite(values[-1]) else "not finite"
        head = f"{name:<18}{newest:>11}"
        span = f"  {form(float(finite.min()))} to {form(float(finite.max()))}"
        room = min(60, width - len(head) - 26)
        if room < 8:
            room, span = width - len(head) - 2, ""
        lines.append(head + (f"  {sparkline(values, room, kind, bars):<{room}}{span}" if room >= 4 else ""))
    return lines


def _recent_mean(values: np.ndarray, count: int) -> np.ndarray:
    """Of each value the mean with those before it, `count` in all."""
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - count)
    return (total[stop] - total[start]) / (stop - start) if np.isfinite(values).any() else np.full(len(values), np.nan)


def sparkline(values: np.ndarray, width: int, kind: str = "mean", bars: str = BARS) -> str:
    """At most `width` bars from the lowest value to the highest; each the `mean` or `max` of its share of them, a blank where none is finite."""
    heights = []
    for part in np.array_split(values, min(width, len(values))) if len(values) else ():
        finite = part[np.isfinite(part)]
        heights.append(float(finite.mean() if kind == "mean" else finite.max()) if len(finite) else math.nan)
    known = [height for height in heights if math.isfinite(height)]
    low, span = (min(known), max(known) - min(known)) if known else (0.0, 0.0)

    def bar(height):
        if math.isnan(height):
            return " "
        return bars[round((len(bars) - 1) * (height - low) / span)] if span > 0 else bars[0]

    return "".join(map(bar, heights))


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _event(event: dict[str, Any]) -> str:
    at = event.get("time")
    clock = time.strftime("%H:%M:%S", time.localtime(at)) if isinstance(at, (int, float)) and 0 <= at < 1e11 else "--:--:--"
    shown = {key: value for key, value in event.items() if key not in ("time", "event") and isinstance(value, (str, int, float))}
    return f"{clock}  {event['event']}  " + ", ".join(f"{key} {value}" for key, value in shown.items())


class Boards:
    """This machine's GPUs, through NVML, without CUDA: watching takes none of their memory. None where there is no NVML."""

    def __init__(self):
        self._nvml, self._handles = None, []
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
            self._nvml = pynvml
        except Exception:  # no package, driver or board: a run on a CPU is watched too
            self._handles = []

    def lines(self) -> list[str]:
        """A line for each board; what one does not tell is a dash."""
        return [self._line(number, handle) for number, handle in enumerate(self._handles)]

    def _line(self, number: int, handle: Any) -> str:
        figures = read_board(self._nvml, handle)

        def shown(value, form):
            return "-" if value is None else form(value)

        name = shown(ask(lambda: self._nvml.nvmlDeviceGetName(handle)), str)
        load = shown(figures["gpu_utilisation"], "{:.0f}%".format)
        power = shown(figures["gpu_watts"], "{:.0f} W".format)
        heat = shown(figures["gpu_celsius"], "{:.0f} °C".format)
        clock = shown(figures["gpu_mhz"], "{:,.0f} MHz".format)
        total = shown(ask(lambda: self._nvml.nvmlDeviceGetMemoryInfo(handle).total), format_bytes)
        memory = shown(figures["gpu_memory_bytes"], lambda used: f"{format_bytes(used)} of {total}")
        return f"GPU {number}  {name}  {load}  {power}  {heat}  {clock}  {memory}"


def _size() -> tuple[int, int]:
    """(columns, rows) of the terminal."""
    try:
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        columns = rows = 0
    return columns or 80, rows or 24  # a terminal that does not know its size says 0


def _bars() -> str:
    try:
        BARS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ASCII_BARS
    return BARS


def _clip(line: str, width: int) -> str:
    """The line in at most `width` columns, without characters that would move the cursor or set the terminal."""
    kept, used = [], 0
    for character in line:
        shown = character if character.isprintable() else "?"
        columns = 0 if unicodedata.combining(shown) else 2 if unicodedata.east_asian_width(shown) in "WF" else 1
        if used + columns > width:
            break
        kept.append(shown)
        used += columns
    return "".join(kept)
