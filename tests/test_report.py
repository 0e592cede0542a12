"""nanotrain report: what is read of a run's folder, what is drawn of it, and the page in a real browser."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import re
import time

import numpy as np
import pytest

from nanotrain import report
from nanotrain.config import HelpRequested
from nanotrain.reporting import charts, health
from nanotrain.reporting.cards import layers_of
from nanotrain.reporting.history import History, Table, Tail
from nanotrain.reporting.page import escape
from tests import browser as browsers
from tests.conftest import TINY

HOSTILE = "</script></pre><img src=x onerror=\"window.hacked=1\"><script>window.hacked=1</script>\x00\x1b[2J \ud800 ]]>&lt;"
RATIOS = ["embed.weight", *(f"blocks.{n}.{part}.weight" for n in range(12) for part in ("attention.q_proj", "feed_forward.up")), "head.weight"]


def step_row(step: int, **changes) -> dict:
    """A healthy step's row of metrics.jsonl."""
    noise = random.Random(step)
    loss = 8 / (1 + step / 30) ** 0.5 + noise.gauss(0, 0.02)
    row = dict(step=step, loss=loss, lr=1e-3, grad_norm=0.8 + noise.random() / 9, clipped=0, skipped=0, tokens=step * 512, tokens_per_s=5000.0,
               step_s=0.1 + noise.random() / 99, data_s=0.001, checkpoint_s=0.0, mfu=0.41, peak_memory_bytes=3 << 20, epoch=step / 100)  # fmt: skip
    return row | changes


def write_run(folder, steps=300, *, events=True, hostile="", row=step_row, **config):
    """A run's folder that holds everything there is to record."""
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            ratios = {"update_ratio": {name: 3e-3 / (1 + n / 9) for n, name in enumerate(RATIOS)}} if events and step % 20 == 1 else {}
            file.write(json.dumps(row(step) | ratios) + "\n")
            if step % 50 == 0:
                validation = dict(val_loss=3 + 30 / step, val_bpb=1 + 30 / step, val_tokens=900 if step < steps else 5000, val_documents=7, val_s=0.5)
                file.write(json.dumps({"step": step} | validation) + "\n")
            if events and step % 10 == 0:
                file.write(json.dumps(dict(step=step, gpu_utilisation=90, gpu_watts=610.5 + step % 7, gpu_celsius=61, gpu_mhz=1980,
                                           gpu_memory_bytes=1 << 33, gpu_ecc_errors=0, gpu_throttled=["power cap"])) + "\n")  # fmt: skip
    table = {"train": {"steps": steps, "dtype": "bfloat16"}, "optim": {"name": "muon"}} | config
    (folder / "config.toml").write_text("".join(f"[{s}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in t.items()) for s, t in table.items()))
    if events:
        sizes = dict(parameters=1 << 20, gradients=1 << 20, optimizer=2 << 20, activations=5 << 20, workspace=1 << 19, total=0, available=1 << 34)
        rows = [
            dict(event="start", preset="nano", parameters=123456, dtype="bfloat16", device="cuda:0", budget={"steps": steps}, train_tokens=9999,
                 val_tokens=500, val_bytes=1500, vocab_size=512, tokenizer_sha256="ab" * 32, source={"source": f"notes {hostile}"}, plan=sizes),
            *(dict(event="checkpoint", step=n, seconds=0.1, removed=[]) for n in range(100, steps + 1, 100)),
            dict(event="resumed", checkpoint="step-00000100"), dict(event="spike", step=120, loss=9.0, action="rolled back"),
            *(dict(event="sample", step=n, prompt="def ", text=f"def f(x): return {n} {hostile}") for n in (100, 200)),
            dict(event="end", reason="budget used", step=steps, tokens=steps * 512, seconds=31.5, peak_memory_bytes=11 << 20),
        ]  # fmt: skip
        (folder / "events.jsonl").write_text("".join(json.dumps({"time": 1.7e9 + n} | e) + "\n" for n, e in enumerate(rows)))
        environment = dict(python="3.11", gpu=["H100"], packages={"torch": "2.13"}, git_diff=f"+ {hostile}")
        (folder / "env.json").write_text(json.dumps(environment))
    return folder


@pytest.fixture(scope="module")
def browser():
    program = browsers.find()
    if program is None:
        pytest.skip("chromium: none is installed")
    with browsers.Browser(program) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report of one run, and one of two with batches of different sizes."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first")
    second = write_run(folder / "second", 200, row=lambda n: step_row(n, tokens=n * 1024), optim={"name": "adamw"})
    assert report.main([str(first)]) == 0 and report.main([str(first), str(second)]) == 0
    return {"one": first / "report.html", "two": first / "report-compare.html"}


# Reading.


def test_a_torn_line_waits_and_broken_ones_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert list(tail.rows()) == []
    path.write_bytes(b'{"step": 1}\n\xff\xfe{\n[1]\n\n{"step": 2, "lo')
    assert list(tail.rows()) == [[{"step": 1}]] and tail.unreadable == 3
    with path.open("ab") as file:
        file.write(b'ss": 5}\n')
    assert list(tail.rows()) == [[{"step": 2, "loss": 5}]] and list(tail.rows()) == []


def test_only_the_new_is_read_and_a_replaced_file_anew(tmp_path):
    folder = write_run(tmp_path / "run", 5, events=False)
    h = History(folder).update()
    read = h.metrics_file._file.tell()
    assert len(h.steps) == 5 and len(h.update().steps) == 5 and h.metrics_file._file.tell() == read == (folder / "metrics.jsonl").stat().st_size
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_row(6)) + "\n")
    assert h.update().steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    shorter = "".join(json.dumps(step_row(n)) + "\n" for n in (1, 2, 3))  # as after a roll-back
    (folder / "other").write_text(shorter)
    (folder / "other").replace(folder / "metrics.jsonl")
    assert h.update().steps["step"].tolist() == [1, 2, 3]


def test_a_limit_reads_the_end_from_a_whole_line(tmp_path):
    folder = write_run(tmp_path / "run", 100, events=False)
    h = History(folder, limit=2000).update()
    assert h.metrics_file.cut and 3 <= len(h.steps) <= 8 and h.steps["step"][-1] == 100 and not h.unreadable


def test_tables_take_any_rows():
    table = Table()
    table.extend([{"step": 1, "loss": 2}, {"step": 2, "loss": None}, {"step": 3, "loss": "x"}, {"loss": 1}], ("step", "loss"))
    table.extend([{"step": 4, "loss": 10**400}, {"step": 5, "loss": math.inf}, {"step": 6, "loss": [1]}, {"step": 2, "loss": 7.5}], ("step", "loss"))
    assert table["step"].tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(table["loss"], [2, 7.5, *[math.nan] * 4])
    assert np.isnan(table["lr"]).all() and table.names() == ["loss"]


@pytest.mark.parametrize(
    "kinds,lock,state",
    [
        (["start", "end"], "", "finished"),
        (["end", "error"], "", "finished"),
        (["start", "error"], "", "failed"),
        (["end", "resumed"], "", "interrupted"),
        (["start"], "process 999999999 on {host} since 2026-01-01", "interrupted"),
        (["start"], "process {own} on {host} since 2026-01-01", "running"),
        (["start"], "process 999999999 on elsewhere since 2026-01-01", "running"),
    ],
)
def test_state(tmp_path, kinds, lock, state):
    (tmp_path / "events.jsonl").write_text("".join(json.dumps({"event": kind}) + "\n" for kind in kinds))
    (tmp_path / "lock").write_text(lock.format(own=os.getpid(), host=platform.node()))
    assert History(tmp_path).update().state()[0] == state


# Drawing.


def test_ticks():
    assert charts.ticks(0, 1208, 5) == [0, 200, 400, 600, 800, 1000, 1200]
    assert charts.ticks(-0.3, 0.2, 4) == [-0.3, -0.2, -0.1, 0, 0.1, 0.2] and charts.ticks(3, 3, 4) == [3]
    assert charts.log_ticks(0.04, 2, 5) == [0.05, 0.1, 0.2, 0.5, 1, 2] and charts.log_ticks(1e-6, 10, 5) == [1e-6, 1e-4, 1e-2, 1]
    for low, high in ((0, 1), (1e-9, 3e-9), (-5e12, 7e12), (2.13, 2.14), (999, 1_000_001)):
        found = charts.ticks(low, high, 5)
        labels = [charts.compact(tick, found[1] - found[0]) for tick in found]
        assert 3 <= len(found) <= 9 and len(set(labels)) == len(labels) and all(low <= tick <= high for tick in found)


def test_labels():
    for value, step, text in ((0, 1e-4, "0"), (2e-4, 1e-4, "2e-4"), (1500, 500, "1.5k"), (1e6, 0, "1M"), (2, 0.5, "2.0"), (-30, 10, "-30")):
        assert charts.compact(value, step) == text


def test_what_is_left_out_cannot_be_seen():
    values = np.random.default_rng(0).normal(size=100_003)
    values[70_001], values[70_002], values[5:2000] = 50, -50, np.nan
    kept = charts.envelope(values, 1200)
    assert len(kept) <= 1202 and (np.diff(kept) > 0).all() and {0, 70_001, 70_002, 100_002} <= set(kept.tolist())
    assert np.isnan(values[kept[kept < 1900]]).any()  # the gap stays
    assert charts.envelope(values[:900], 1200).tolist() == list(range(900))


def test_smoothing_is_the_mean_of_what_is_finite():
    values = np.array([9.0, 5, np.nan, 4, 3, 100, 2, 1, 1])
    wanted = [np.nanmean(values[max(0, n - min(2, n)) : n + min(2, n) + 1]) for n in range(9)]
    np.testing.assert_allclose(charts.smooth(values, 5), wanted)
    assert np.isnan(charts.smooth(np.full(4, np.nan), 3)).all() and not len(charts.smooth(np.empty(0), 3))


def test_a_few_far_out_do_not_flatten_the_others():
    y = np.append(np.linspace(3, 2, 1000), 1e6)
    scale, over = charts.fit([charts.Series("", np.arange(1001.0), y)])
    assert over == 1 and 3 < scale.high < 4
    assert charts.fit([charts.Series("", np.arange(3.0), np.array([3.0, 50, 2]))])[0].high > 50


def test_layers():
    assert layers_of(["embed.weight", "blocks.10.a.weight", "blocks.10.b.weight", "head.weight"]) == {
        "embed": ["embed.weight"], "block 10": ["blocks.10.a.weight", "blocks.10.b.weight"], "head": ["head.weight"]}  # fmt: skip


# Judging.


@pytest.mark.parametrize(
    "name,change",
    [
        ("Loss at the end", dict(loss=3.0)),
        ("Gradient norm", dict(grad_norm=12.0)),
        ("Gradient norm", dict(grad_norm=0.05)),
        ("Clipped steps", dict(clipped=1)),
        ("Non-finite steps", dict(skipped=1, loss=None)),
        ("Wait for data", dict(data_s=0.02)),
        ("Communication", dict(communication_s=0.05)),
        ("Update over weight", dict(update_ratio={"a": 0.05})),
        ("GPU utilisation", dict(gpu_utilisation=45)),
        ("GPU temperature", dict(gpu_celsius=86)),
    ],
)
def test_verdicts(tmp_path, name, change):
    def judged(row):
        h = History(write_run(tmp_path / str(len(list(tmp_path.iterdir()))), 100, events=False))
        (h.path / "metrics.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(1, 101)))
        return {v.name: v for v in health.verdicts(h.update())}[name]

    gpu = name.startswith("GPU")
    more = dict(communication_s=0.01, update_ratio={"a": 3e-3})
    row = (lambda n: dict(step=n, gpu_utilisation=88, gpu_celsius=60)) if gpu else (lambda n: step_row(n, **more))
    good, bad, none = judged(row), judged(lambda n: row(n) | change), judged(lambda n: {"step": n})
    assert (good.state, bad.state, none.state) == ("OK", "look", "no data") and good.measured != bad.measured and none.measured == "not recorded"


@pytest.mark.parametrize("name,change", [("Throughput", dict(tokens_per_s=4000.0)), ("Longest step", dict(step_s=2.0))])
def test_verdicts_on_the_last_steps(tmp_path, name, change):
    h = History(write_run(tmp_path / "run", 100, events=False, row=lambda n: step_row(n, **(change if n > 90 else {})))).update()
    assert {v.name: v.state for v in health.verdicts(h)}[name] == "look"


# The command.


def test_differences():
    assert list(report._differences([2.0, 3.0, 2.0, math.nan], "{:.1f}".format)) == [
        "2.0", "3.0<small>+1.0, ×1.5</small>", "2.0<small>the same</small>", "–"]  # fmt: skip
    configs = [{"run.dir": "a", "optim.lr": 1, "same": 2}, {"run.dir": "b", "optim.lr": 3, "same": 2, "new": True}]
    assert report.changed(configs) == [("optim.lr", ["1", "3"]), ("new", ["–", "True"])]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "no run folder given"),
        (["--out"], "--out: a value is missing"),
        (["run", "--color"], "--color: unknown"),
        (["nowhere"], "nowhere: no such folder"),
        (["."], ".: no run folder"),
        (["run", "--out=nowhere/page.html"], "--out nowhere/page.html: no folder nowhere"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", 1)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        report.main(arguments)
    with pytest.raises(HelpRequested, match="usage"):
        report.main(["--help"])


def test_where_the_page_goes(tmp_path, capsys):
    a, b = write_run(tmp_path / "x/run", 3), write_run(tmp_path / "y/run", 3)
    for arguments, path in (([a], a / "report.html"), ([a, b], a / "report-compare.html"), ([b, "--out", tmp_path / "p.html"], tmp_path / "p.html")):
        assert report.main([*map(str, arguments)]) == 0 and capsys.readouterr().out == f"{path}\n" and path.stat().st_size > 1000
    assert "x/run" in (a / "report-compare.html").read_text()  # runs of one name are told apart


@pytest.mark.parametrize("kind", ["empty", "config", "one step", "all null", "torn", "nonsense"])
def test_whatever_a_folder_holds(tmp_path, browser, kind):
    folder = write_run(tmp_path / "run", {"one step": 1, "empty": 0, "config": 0}.get(kind, 30), events=kind == "one step")
    metrics = folder / "metrics.jsonl"
    if kind == "config":
        metrics.unlink()
    elif kind == "all null":
        metrics.write_text("".join(json.dumps(dict.fromkeys(step_row(1)) | {"step": n}) + "\n" for n in range(30)))
    elif kind == "torn":
        metrics.write_bytes(metrics.read_bytes()[:-30])
    elif kind == "nonsense":
        metrics.write_text('{"step": 1, "loss": {"a": [1]}, "update_ratio": {"": "x", "b": -1}}\n{"step": "2", "loss": 1}\n'
                           '{"step": 3, "loss": true}\n')  # fmt: skip
        (folder / "events.jsonl").write_text('{"event": "start", "plan": 3, "source": [], "budget": 1}\n{"event": "sample", "text": 5}\n'
                                             '{"event": "checkpoint", "step": "x", "time": "y"}\n{"event": "end", "seconds": "z"}\n')  # fmt: skip
        (folder / "env.json").write_text("[")
        (folder / "config.toml").write_text("= broken")
    report.main([str(folder)])
    browser.open(folder / "report.html", width=390)
    assert browser.problems == [] and browser.run("document.querySelector('h1').textContent") == "run"
    assert browser.run("document.querySelector('#missing h3').textContent") == "Not recorded"


def test_a_hostile_run_injects_nothing(tmp_path, browser):
    folder = write_run(tmp_path / "<b onclick=alert(1)>&", 60, hostile=HOSTILE, data={"dir": HOSTILE[:-12]})
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": HOSTILE, HOSTILE: HOSTILE, "error": HOSTILE}) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_row(61, update_ratio={HOSTILE: 0.003})) + "\n")
    report.main([str(folder)])
    browser.open(folder / "report.html", width=1280)
    assert browser.problems == [] and browser.requests == [(folder / "report.html").resolve().as_uri()]
    injected = "[window.hacked, document.images.length, document.scripts.length, document.querySelectorAll('[onclick], [onerror]').length]"
    assert browser.run(injected) == [None, 0, 2, 0]
    assert "onerror=" in browser.run("document.querySelector('#samples').textContent")
    assert escape("\x00<\x1b>\ud800") == "␀&lt;␛&gt;?"


def test_a_long_run_stays_small_and_its_spike_visible(tmp_path):
    folder = write_run(tmp_path / "run", 40_000, row=lambda n: step_row(n, loss=40.0 if n == 31_234 else 3 + math.sin(n) / 9))
    started = time.process_time()
    report.main([str(folder)])
    assert time.process_time() - started < 10
    page = (folder / "report.html").read_text()
    assert len(page) < 1_500_000
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page)[1])
    loss = figures["plots"][0]["series"][0]
    assert len(loss["y"]) <= 1202 and dict(zip(figures["xs"][loss["x"]], loss["y"], strict=True))[31_234] == 40
    assert re.search(r"above the picture: \d+, the highest 40<", page)


def test_a_real_run(data, tmp_path, browser, nanotrain):
    flags = ["--train.steps=60", "--train.sample_every=20", "--checkpoint.every=20", f"--data.dir={data}", f"--run.dir={tmp_path}/run"]
    done = nanotrain("pretrain", *TINY, *flags)
    assert done.returncode == 0, done.stderr
    assert report.main([f"{tmp_path}/run"]) == 0
    browser.open(tmp_path / "run/report.html", width=1280)
    text = browser.run("document.body.innerText")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert browser.problems == [] and f"{summary['val_bpb']:.4f}" in text and f"{summary['tokens']:,}" in text and "finished: budget used" in text


# The page in a browser.

OVERLAPS = """(() => {
  const found = [];
  for (const figure of document.querySelectorAll("figure, header, .tiles > *, .health > *")) {
    const texts = [...figure.querySelectorAll("svg text, h1, h3, p, dt, dd, .legend li, .health b, .health span:not(.state), summary")]
      .map(e => ({e, r: e.getBoundingClientRect()})).filter(({r}) => r.width && r.height);
    texts.forEach((a, i) => texts.slice(i + 1).forEach(b => {
      if (a.e.contains(b.e) || b.e.contains(a.e)) return;
      const across = Math.min(a.r.right, b.r.right) - Math.max(a.r.left, b.r.left);
      const down = Math.min(a.r.bottom, b.r.bottom) - Math.max(a.r.top, b.r.top);
      if (across > 0.5 && down > 0.5) found.push(figure.id + ": " + a.e.textContent + " / " + b.e.textContent);
    }));
    for (const {e, r} of texts) if (r.left < 0 || r.right > innerWidth + 0.5) found.push(figure.id + ": " + e.textContent + " leaves the window");
  }
  return found;
})()"""

CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                          return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                       return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  let lowest = [99, ""], count = 0;
  document.querySelectorAll("details").forEach(d => d.open = true);
  for (const e of document.querySelectorAll("main *")) {
    const isText = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!isText || e.closest("title") || !e.getBoundingClientRect().width) continue;
    const style = getComputedStyle(e), colour = rgb(e instanceof SVGElement ? style.fill : style.color);
    let under = e, back;
    do { back = rgb(getComputedStyle(under).backgroundColor); under = under.parentElement; } while (back[3] < 255 && under);
    const [a, b] = [light(colour.slice(0, 3)), light(back.slice(0, 3))].sort((p, q) => q - p), ratio = (a + 0.05) / (b + 0.05);
    count++;
    if (ratio < lowest[0]) lowest = [ratio, e.textContent.slice(0, 50)];
  }
  return [...lowest, count];
})()"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["one", "two"])
def test_nothing_overlaps_or_leaves_the_page(browser, pages, kind, width):
    browser.open(pages[kind], width=width)
    assert browser.problems == [] and browser.requests == [pages[kind].resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelectorAll('.plot').length") >= 13
    assert browser.run(OVERLAPS) == []
    heights = browser.run("[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)")
    assert min(heights) >= 11  # not shrunk with the picture


def test_every_chart_is_drawn(browser, pages, tmp_path):
    """What is on the screen changes as the lines of one chart after the other are hidden."""
    browser.open(pages["one"], width=390)
    for number in range(browser.run("document.querySelectorAll('.ink').length")):
        before, after = tmp_path / "before.png", tmp_path / "after.png"
        browser.run(f"document.querySelectorAll('.ink')[{number}].parentElement.scrollIntoView({{block: 'center'}})")
        browser.picture(before, whole=False)
        browser.run(f"document.querySelectorAll('.ink')[{number}].style.visibility = 'hidden'")
        browser.picture(after, whole=False)
        assert before.read_bytes() != after.read_bytes(), number


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", ["one", "two"])
def test_contrast(browser, pages, kind, dark):
    browser.open(pages[kind], width=1280, dark=dark)
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 60) == dark
    ratio, text, count = browser.run(CONTRAST)
    assert ratio >= 4.5 and count > 150, text


def tip(browser) -> str:
    return browser.run("document.getElementById('tip').hidden ? '' : document.getElementById('tip').innerText")


def place(browser, selector: str, share: float) -> tuple[float, float]:
    """Where in the window a share of a plot's width lies, halfway down; scrolls there."""
    left, top, width, height = browser.run(f"(() => {{const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
                                           "const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; })()")  # fmt: skip
    return left + share * width, top + height / 2


@pytest.mark.parametrize("width", [1280, 390])
def test_pointing_shows_the_values(browser, pages, width):
    browser.open(pages["one"], width=width)
    for step in (1, 150, 299):
        browser.move(*place(browser, "#loss .plot", step / 300))
        shown = tip(browser)
        # A finger or a mouse stands on whole pixels: the step under it is the wanted one or, on a phone, one beside it.
        found = int(re.search(r"step (\d+)", shown)[1])
        assert abs(found - step) <= (1 if width == 390 else 0)
        assert float(re.search(r"training\s+([\d.]+)", shown)[1]) == float(f"{step_row(found)['loss']:.5g}")
        box = browser.run("(() => {const r = document.getElementById('tip').getBoundingClientRect(); return [r.left, r.right]; })()")
        assert box[0] >= 0 and box[1] <= width
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.querySelectorAll('.spot').length") >= 2 and browser.run("document.querySelectorAll('.cross').length") >= 13
    browser.move(*place(browser, "#loss .plot", 150 / 300))
    assert re.search(r"validation, 900 tokens\s+3\.2\b", tip(browser)) and "at 300" in tip(browser)  # the one of another amount is elsewhere
    browser.move(*place(browser, "#lanes .plot", 100 / 300))
    assert "checkpoint" in tip(browser) and "restart" in tip(browser) and "spike" not in tip(browser)
    browser.move(*place(browser, "#norm .plot:last-of-type", 0.5))
    assert "clipped\n0%" in tip(browser)
    browser.move(2, 2)
    assert tip(browser) == ""


def test_touch_and_keys(browser, pages):
    browser.open(pages["two"], width=390)
    browser.touch(*place(browser, "#speed .plot", 0.25))
    assert re.search(r"tokens \d\d,\d{3}", tip(browser)) and "A tokens per second" in tip(browser) and "B tokens per second" in tip(browser)
    browser.touch(3, 3)
    assert tip(browser) == ""
    browser.run("document.querySelector('#loss .plot').focus()")
    for key, tokens in (("Home", "512"), ("ArrowRight", "1,024"), ("ArrowRight", "1,536"), ("ArrowLeft", "1,024")):
        browser.press(key)
        assert tip(browser).startswith(f"tokens {tokens}\n")
    browser.press("Escape")
    assert tip(browser) == ""


def test_the_table_of_differences(browser, pages):
    browser.open(pages["two"], width=1280)
    rows = browser.run("[...document.querySelectorAll('#results tr, #differences tr')].map(r => [...r.cells].map(c => c.innerText))")
    table = {row[0]: row[1:] for row in rows}
    assert table["Steps"] == ["300", "200\n−100, ×0.667"] and table["Tokens"] == ["153,600", "204,800\n+51,200, ×1.33"]
    assert table["optim.name"] == ["muon", "adamw"] and table["train.steps"] == ["300", "200"] and "train.dtype" not in table
