"""report: a page about a run, or about several beside each other, in one HTML file that needs nothing else.

nanotrain report runs/first
nanotrain report runs/first runs/second --out comparison.html
nanotrain report runs/*
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanotrain.config import HelpRequested
from nanotrain.console import duration
from nanotrain.files import replace_file
from nanotrain.memory import format_bytes
from nanotrain.reporting import health
from nanotrain.reporting.cards import Charts, Shown, memory_of
from nanotrain.reporting.charts import Series, legend
from nanotrain.reporting.history import History
from nanotrain.reporting.page import details, escape, facts, page, section, shortened, table

HELP = """usage: nanotrain report RUN [RUN ...] [--out FILE]

  RUN         folder of a run; several are drawn over each other, with a table of their differences to the first
  --out FILE  page to write (default: report.html in the run's folder; of several, report-compare.html in the first's)"""
MISSING = '<p class="missing">not recorded</p>'
MOST_RUNS = 24
"""On a page: so that it stays readable, and under 3 MB."""
MOST_EVENTS, MOST_SAMPLES, MOST_TEXT = 400, 30, 20_000
"""Listed on a page; characters of a long text."""


def main(argv: list[str]) -> int:
    """Command line."""
    paths, out = parse(argv)
    target = Path(out) if out else Path(paths[0]) / ("report.html" if len(paths) == 1 else "report-compare.html")
    document = write(load(paths))
    if not target.parent.is_dir():
        raise ValueError(f"--out {out}: no folder {target.parent}; make it first")
    replace_file(target, document)
    print(target)
    return 0


def parse(argv: list[str]) -> tuple[list[str], str]:
    """(run folders, --out or nothing). ValueError for what is no command line of this."""
    paths, out, arguments = [], "", list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument in ("-h", "--help"):
            raise HelpRequested(HELP)
        if argument == "--out" and not arguments:
            raise ValueError("--out: a value is missing")
        if argument == "--out" or argument.startswith("--out="):
            out = arguments.pop(0) if argument == "--out" else argument.removeprefix("--out=")
        elif argument.startswith("-"):
            raise ValueError(f"{argument}: unknown; only --out FILE is taken besides run folders")
        elif argument not in paths:
            paths.append(argument)
    if not paths:
        raise ValueError("no run folder given; see nanotrain report --help")
    if len(paths) > MOST_RUNS:
        raise ValueError(f"{len(paths)} run folders given: at most {MOST_RUNS} go on a page; give fewer")
    return paths, out


def load(paths: list[str]) -> list[Shown]:
    """The runs of these folders, read whole. ValueError where one is no run's folder."""
    histories = [History(path).update() for path in paths]
    names = [h.name for h in histories]
    parents = [h.path.resolve().parent.name for h in histories]
    names = [name if names.count(name) == 1 else f"{parent}/{name}" for name, parent in zip(names, parents, strict=True)]
    batches = {round(last(h.steps["tokens"]) / last(h.steps["step"])) for h in histories if h.steps.has("tokens") and last(h.steps["step"])}
    by_tokens = len(batches) > 1  # steps of different sizes do not compare
    return [Shown(h, chr(65 + n), name, n, by_tokens) for n, (h, name) in enumerate(zip(histories, names, strict=True))]


def last(values: np.ndarray) -> float:
    """The last finite one, or NaN."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan


def write(runs: list[Shown]) -> str:
    """The page."""
    charts = Charts(runs)
    drawn = section("Charts", charts.all(), key="charts")
    if len(runs) == 1:
        h = runs[0].history
        title = runs[0].name
        body = _headline(runs[0]) + section("Health", _health(h), key="health") + drawn
        body += section("Samples", _samples(h), key="samples") + section("The rest", _background(h), key="rest")
    else:
        title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{runs[0].name} and {len(runs) - 1} others"
        body = _comparison(runs, title) + drawn + section("Health", _health_of_all(runs), key="health")
        parts = (details(f"{r.letter}: {r.name}", "", section("Samples", _samples(r.history), key=f"samples-{r.letter}") + _background(r.history))
                 for r in runs)  # fmt: skip
        body += section("Each run", "".join(parts), key="rest")
    when = time.strftime("%Y-%m-%d %H:%M")
    body += f"<footer>Written by nanotrain report on {when}. Point at a chart, or focus it and use the arrow keys.</footer>"
    return page(f"{title} - nanotrain", body, charts.figures.script())


# The headline of one run.


def _headline(run: Shown) -> str:
    h = run.history
    word, why = h.state()
    broken = f" {h.unreadable:,} unreadable lines of its records were passed over." if h.unreadable else ""
    return (
        f'<header><p class="kicker">nanotrain · training run</p><h1>{escape(run.name)}</h1><p class="lead">{escape(_what(h) + broken)}</p>'
        f'<p class="badge {word}">{escape(word)}{escape(": " + shortened(why, 400)) if why else ""}</p></header>{_tiles(run)}'
    )


def _what(h: History) -> str:
    """What is trained, on what, in a sentence."""
    start, config, machine = h.last("start"), h.config(), h.environment()
    parameters = start.get("parameters")
    model = f"{start.get('preset') or config.get('model.preset') or 'model'}"
    size = f" of {parameters:,} parameters" if isinstance(parameters, int) else ""
    dtype = start.get("dtype") or config.get("train.dtype")
    gpus = machine.get("gpu")
    place = ", ".join(map(str, gpus)) if isinstance(gpus, list) and gpus else machine.get("processor")
    source = start["source"].get("source") if isinstance(start.get("source"), dict) else None
    data = shortened(str(source or config.get("data.dir") or ""), 120)
    parts = [f"{model}{size}", f"in {dtype}" if dtype else "", f"on {place}" if place else "", f"trained on {data}" if data else ""]
    return ", ".join(part for part in parts if part) + "."


Result = tuple[str, Callable[[Shown], float], Callable[[float], str]]
"""A key figure: its name, its value (NaN where not recorded), and how it is written."""


def _loss(run: Shown) -> float:
    return _mean(run.history.steps["loss"][-run.window :])


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _seconds(run: Shown) -> float:
    ended, steps = run.history.last("end").get("seconds"), run.history.steps
    if run.history.state()[0] == "finished" and isinstance(ended, (int, float)):
        return float(ended)
    return float(np.nansum(steps["step_s"])) if steps.has("step_s") else math.nan


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds).strip()


RESULTS: tuple[Result, ...] = (
    ("Bits per byte, held out", lambda r: last(r.history.validations["val_bpb"]), "{:.4f}".format),
    ("Validation loss", lambda r: last(r.history.validations["val_loss"]), "{:.4f}".format),
    ("Training loss at the end", _loss, "{:.4f}".format),
    ("Steps", lambda r: last(r.history.steps["step"]), "{:,.0f}".format),
    ("Tokens", lambda r: last(r.history.steps["tokens"]), "{:,.0f}".format),
    ("Training time", _seconds, _duration),
    ("Tokens per second, median", lambda r: _median(r.history.steps["tokens_per_s"]), "{:,.0f}".format),
    ("Peak memory", lambda r: memory_of(r.history)[1] or math.nan, format_bytes),
    ("Gradient norm, median", lambda r: _median(r.history.steps["grad_norm"]), "{:.3g}".format),
    ("Steps clipped", lambda r: 100 * _mean(r.history.steps["clipped"]), "{:.1f}%".format),
    ("Steps skipped", lambda r: float(np.nansum(r.history.steps["skipped"])) if r.history.steps.has("skipped") else math.nan, "{:,.0f}".format),
)


def _tiles(run: Shown) -> str:
    steps, documents = run.history.steps, last(run.history.validations["val_documents"])
    epochs, mfu = last(steps["epoch"]), _median(steps["mfu"])
    remarks = {
        "Bits per byte, held out": f"of {documents:,.0f} documents" if math.isfinite(documents) else "",
        "Validation loss": "nats per token",
        "Training loss at the end": f"mean of {min(run.window, len(steps)):,} steps, nats per token" if len(steps) else "",
        "Tokens": f"{epochs:.2f} times through the data" if math.isfinite(epochs) else "",
        "Training time": "of steps alone",
        "Tokens per second, median": f"MFU {mfu:.1%}" if math.isfinite(mfu) else "",
    }
    tiles = []
    for name, value, form in RESULTS[:8]:
        found = value(run)
        text = form(found) if math.isfinite(found) else "–"
        remark = remarks.get(name, "") if math.isfinite(found) else "not recorded"
        tiles.append(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd><dd>{escape(remark)}</dd></div>")
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


SIGNS = {"OK": ("✓ OK", "ok"), "look": ("! Look", "look"), "no data": ("– No data", "none")}
"""How a verdict is written, and its class on the page."""


def _health(h: History) -> str:
    items = []
    for verdict in health.verdicts(h):
        sign, kind = SIGNS[verdict.state]
        items.append(f'<li class="{kind}"><b>{escape(verdict.name)} <span class="state">{sign}</span></b><span>{escape(verdict.measured)}</span>'
                     f'<span class="band-text">band: {escape(verdict.band)}</span></li>')  # fmt: skip
    return f'<ul class="health">{"".join(items)}</ul>'


# Several runs.


def _comparison(runs: list[Shown], title: str) -> str:
    names = legend([Series(f"{r.letter}: {r.name} ({r.history.state()[0]})", r.x, r.x, r.colour, dash=r.dash) for r in runs])
    rows = [(name, *_differences([value(run) for run in runs], form)) for name, value, form in RESULTS]
    keys = changed([run.history.config() for run in runs])
    head = ("", *(escape(run.letter) for run in runs))
    changes = table(head, [(escape(key), *(escape(shortened(value, 300)) for value in values)) for key, values in keys])
    return (
        f'<header><p class="kicker">nanotrain · {len(runs)} runs beside each other</p><h1>{escape(title)}</h1>{names}</header>'
        + section("Results", f'<div class="card">{table(head, [(escape(row[0]), *row[1:]) for row in rows])}</div>', key="results")
        + section("Config keys that differ", f'<div class="card">{changes if keys else "<p>none</p>"}</div>', key="differences")
    )


def _differences(values: list[float], form: Callable[[float], str]) -> Iterator[str]:
    """Each value and, of those after the first, the difference and the ratio to it."""
    first = values[0]
    for number, value in enumerate(values):
        if not math.isfinite(value):
            yield "–"
        elif not number or not math.isfinite(first):
            yield escape(form(value))
        else:
            sign = "−" if value < first else "+"
            ratio = f", ×{value / first:.3g}" if first else ""
            change = "the same" if value == first else f"{sign}{form(abs(value - first))}{ratio}"
            yield f"{escape(form(value))}<small>{escape(change)}</small>"


def changed(configs: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(key, each run's value) of the keys whose values are not the same in all, but for where the run lies."""
    keys = dict.fromkeys(key for config in configs for key in config)
    found = [(key, [str(config.get(key, "–")) for config in configs]) for key in keys if key not in ("run.dir", "resume")]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def _health_of_all(runs: list[Shown]) -> str:
    judged = [health.verdicts(run.history) for run in runs]
    rows = []
    for verdicts in zip(*judged, strict=True):
        cells = (f'<b class="{SIGNS[v.state][1]}">{SIGNS[v.state][0]}</b><small>{escape(v.measured)}</small>' for v in verdicts)
        rows.append((f"{escape(verdicts[0].name)}<small>{escape(verdicts[0].band)}</small>", *cells))
    return f'<div class="card verdicts">{table(("", *(escape(run.letter) for run in runs)), rows)}</div>'


# What stands under the charts.


def _samples(h: History) -> str:
    samples = [event for event in h.of("sample") if isinstance(event.get("text"), str)]
    if not samples:
        return f'<div class="card">{MISSING}</div>'
    shown = [samples[n] for n in _spread(len(samples), MOST_SAMPLES)][::-1]
    left = f'<p class="note">{len(shown)} of {len(samples):,}, evenly chosen</p>' if len(shown) < len(samples) else ""
    return left + "".join(_sample(event, is_open=not n) for n, event in enumerate(shown))


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly, first and last among them."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def _sample(event: dict[str, Any], is_open: bool) -> str:
    prompt, text = str(event.get("prompt", "")), shortened(event["text"], 4000)
    rest = text.removeprefix(prompt)
    body = f'<div class="sample"><pre><mark>{escape(prompt if text.startswith(prompt) else "")}</mark>{escape(rest)}</pre></div>'
    first = " ".join(text.split())[:60]
    return details(f"Step {_number(event.get('step'))}", first, body, is_open=is_open)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else "?"


def _background(h: History) -> str:
    """Data and tokenizer, config, environment, events."""
    config, machine = h.config_text(), dict(h.environment())
    difference = str(machine.pop("git_diff", "") or "")
    rows = [(name, _plain(value)) for name, value in _flat(machine)]
    environment = facts(rows) if rows else MISSING
    if difference:
        environment += details("Changes to the source since that commit", f"{len(difference):,} characters",
                           f"<pre>{escape(shortened(difference, MOST_TEXT))}</pre>")  # fmt: skip
    data = _data(h)
    return (
        details("Data and tokenizer", "", facts(data) if data else MISSING, is_open=True)
        + details("Config", "reruns the run", f"<pre>{escape(shortened(config, MOST_TEXT))}</pre>" if config else MISSING)
        + details("Environment", "", environment)
        + details("Events", f"{len(h.events):,}", _events(h) if h.events else MISSING)
    )


def _data(h: History) -> list[tuple[str, object]]:
    start, config = h.last("start"), h.config()
    source = start["source"] if isinstance(start.get("source"), dict) else {}
    names = (
        ("train_tokens", "Training tokens"), ("train_rows", "Rows of training"), ("val_tokens", "Held-out tokens"),
        ("val_documents", "Held-out documents"), ("val_bytes", "Held-out bytes"), ("vocab_size", "Vocabulary"),
        ("tokenizer_sha256", "Tokenizer, SHA-256"), ("data_sha256", "Data, SHA-256"),
    )  # fmt: skip
    rows = [(name, _plain(start[key])) for key, name in names if key in start]
    size, tokens = start.get("val_bytes"), start.get("val_tokens")
    if isinstance(size, int) and isinstance(tokens, int) and tokens:
        rows.append(("Bytes per token, held out", f"{size / tokens:.2f}"))
    rows += [(f"Source: {name}", _plain(value)) for name, value in _flat(source)]
    kept = (("data.dir", "Data directory"), ("model.vocab_size", "Vocabulary of the model"))
    return rows + [(name, _plain(config[key])) for key, name in kept if key in config]


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}".replace("_", " "), value


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else shortened(str(value), 2000)


def _events(h: History) -> str:
    """The events in their order; of very many, checkpoints go first and then those in the middle."""
    events = h.events if len(h.events) <= MOST_EVENTS else [e for e in h.events if e["event"] not in ("checkpoint", "sample")]
    shown = [events[n] for n in _spread(len(events), MOST_EVENTS)] if events else h.events[-MOST_EVENTS:]
    times = [event.get("time") for event in h.events]
    begun = next((t for t in times if isinstance(t, (int, float))), 0.0)
    rows = []
    for event in shown:
        at = event.get("time")
        clock = f"+{duration(max(0.0, at - begun)).strip()}" if isinstance(at, (int, float)) and abs(at) < 1e11 else ""
        rest = {key: value for key, value in event.items() if key not in ("time", "event", "step")}
        if event["event"] == "start":
            rest.pop("source", None), rest.pop("plan", None)
        said = "; ".join(f"{name} {_plain(value)}" for name, value in _flat(rest))
        rows.append((clock, escape(event["event"]), _number(event["step"]) if "step" in event else "", escape(shortened(said, 600))))
    left = f'<p class="note">{len(shown):,} of {len(h.events):,}</p>' if len(shown) < len(h.events) else ""
    return left + table(("after", "event", "step", ""), rows)
