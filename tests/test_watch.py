"""nanotrain watch: what it shows of a run, in place on a terminal and once elsewhere, and when it ends."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

from nanotrain import watch
from nanotrain.config import HelpRequested
from nanotrain.reporting.history import History


def write(folder, steps, *, first=1, events=(), running=True, **changes):
    """Append rows of steps and events to a run's folder."""
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(first, first + steps):
            row = dict(step=step, loss=8 / step, lr=1e-3, grad_norm=0.5, clipped=0, skipped=0, tokens=step * 512, tokens_per_s=5120.0, step_s=0.1,
                       data_s=0.001, mfu=None, peak_memory_bytes=3 << 20)  # fmt: skip
            file.write(json.dumps(row | changes) + "\n")
    with (folder / "events.jsonl").open("a") as file:
        for event in events:
            file.write(json.dumps({"time": 1.7e9} | event) + "\n")
    (folder / "config.toml").write_text("[train]\nsteps = 40\n")
    if running:
        (folder / "lock").write_text(f"process {os.getpid()} on {platform.node()} since 2026-01-01 00:00:00\n")
    return folder


def lines(folder, width=100, boards=()):
    return watch.screen(History(folder).update(), list(boards), width)


@pytest.mark.parametrize(
    "values,width,kind,drawn",
    [
        (range(8), 8, "mean", "▁▂▃▄▅▆▇█"),
        (range(8), 99, "mean", "▁▂▃▄▅▆▇█"),
        ([1, 1, 3, 3, 2, 2], 3, "mean", "▁█▅"),
        ([0, 0, 0, 9, 0, 0], 3, "max", "▁█▁"),
        ([0, math.nan, 7], 3, "mean", "▁ █"),
        ([5, 5], 2, "mean", "▁▁"),
        ([math.nan], 1, "mean", " "),
        ([], 9, "mean", ""),
    ],
)
def test_sparkline(values, width, kind, drawn):
    assert watch.sparkline(np.array(list(values), dtype=float), width, kind) == drawn


def test_the_screen(tmp_path):
    ratios = {"update_ratio": {"a": 0.003}}
    folder = write(tmp_path / "run", 10, events=[dict(event="start", budget={"steps": 40}), dict(event="checkpoint", step=10, seconds=0.5)], **ratios)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "val_bpb": 1.25}\n{"step": 10, "gpu_utilisation": 91, "gpu_watts": 600, "gpu_celsius": 60}\n{"step": 11, "lo')
    shown = lines(folder, boards=["GPU 0  board"])
    text = "\n".join(shown)
    assert shown[0] == f"run: running (process {os.getpid()} on {platform.node()})"
    assert re.fullmatch(r"step 10   25%  0:00:03 left  \[█{10} {30}\]", shown[1])
    assert re.search(r"^loss +0\.8000  █▄▃▂▂▂▁▁▁▁ +0\.8000 to 8\.0000$", text, re.M) and re.search(r"^validation, bpb +1\.2500  ▁", text, re.M)
    assert re.search(r"^GPU, % +91 ", text, re.M) and re.search(r"^peak memory +3\.0 MiB ", text, re.M) and "MFU" not in text
    assert "GPU 0  board" in text and "checkpoint  step 10, seconds 0.5" in shown[-1] and "look:" not in text


@pytest.mark.parametrize("budget,rest", [({"tokens": 10240}, "50%  0:00:01"), ({"seconds": 4.0}, "25%  0:00:03"), ({}, "")])
def test_progress_by_any_budget(tmp_path, budget, rest):
    line = lines(write(tmp_path / "run", 10, events=[dict(event="start", budget=budget)]))[1]
    assert line.startswith("step 10") and (rest in line if rest else line == "step 10")


def test_worries_are_named(tmp_path):
    text = "\n".join(lines(write(tmp_path / "run", 60, skipped=1, loss=None, clipped=1, events=[dict(event="spike", step=7)])))
    for worry in ("look: Non-finite steps: 60 of 60 steps", "look: Clipped steps: 100% of steps", "look: Loss spikes: 1"):
        assert worry in text


@pytest.mark.parametrize("width", [100, 40, 25, 10])
def test_narrow_terminals(tmp_path, width):
    folder = write(tmp_path / "run", 30, events=[dict(event="error", error="a\x1b[2Jb\r" + "界" * 200)])
    shown = [watch._clip(line, width) for line in lines(folder, width)]
    assert all(line.isprintable() for line in shown) and any(line.startswith("loss") for line in shown)
    assert max(len(line) + sum(c == "界" for c in line) for line in shown) <= width
    assert any("▁" in line for line in shown) == (width >= 40)


def test_once_where_there_is_no_terminal(tmp_path, capsys):
    folder = write(tmp_path / "run", 3)
    assert watch.main([str(folder)]) == 0  # though it is running
    out = capsys.readouterr().out
    assert out.startswith("run: running") and "\x1b" not in out and out.count("\n") > 6
    for name in ("metrics.jsonl", "events.jsonl"):
        (folder / name).unlink()
    assert watch.main([str(folder), "--once"]) == 0 and "no step has been recorded yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "no run folder given"),
        (["nowhere"], "nowhere: no such folder"),
        (["."], ".: no run folder"),
        (["a", "b"], "b: a second run folder after a"),
        (["a", "--interval=soon"], "--interval soon: a number"),
        (["a", "--interval"], "--interval: a value is missing"),
        (["a", "--often"], "--often: unknown"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        watch.main(arguments)
    with pytest.raises(HelpRequested, match="usage"):
        watch.main(["-h"])


def test_boards(monkeypatch):
    class Nvml:
        NVML_TEMPERATURE_GPU = NVML_CLOCK_SM = 0
        nvmlInit = staticmethod(lambda: None)
        nvmlDeviceGetCount = staticmethod(lambda: 1)
        nvmlDeviceGetHandleByIndex = staticmethod(lambda n: n)
        nvmlDeviceGetName = staticmethod(lambda h: "Board")
        nvmlDeviceGetPowerUsage = staticmethod(lambda h: 612_400)
        nvmlDeviceGetTemperature = staticmethod(lambda h, kind: 61)
        nvmlDeviceGetClockInfo = staticmethod(lambda h, kind: 1980)
        nvmlDeviceGetMemoryInfo = staticmethod(lambda h: type("Memory", (), dict(used=1 << 30, total=80 << 30)))

    monkeypatch.setitem(sys.modules, "pynvml", Nvml)  # which lacks the utilisation
    assert watch.Boards().lines() == ["GPU 0  Board  -  612 W  61 °C  1,980 MHz  1.0 GiB of 80.0 GiB"]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert watch.Boards().lines() == []


class Terminal:
    """`nanotrain watch` in a terminal of its own; keeps a screen as a terminal would."""

    def __init__(self, *arguments, columns=90, rows=40):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        code = "import sys; from nanotrain import watch; sys.exit(watch.main(sys.argv[1:]))"
        self.process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                                        env=os.environ | {"PYTHONIOENCODING": "utf-8"})  # fmt: skip
        os.close(slave)
        self.rows, self.row, self.text, self.lowest = rows, 0, [""] * (rows + 1), 0

    def until(self, wanted, seconds=30):
        """Read until the screen holds `wanted`; returns the screen."""
        end, left = time.monotonic() + seconds, b""
        while time.monotonic() < end:
            if any(wanted in line for line in self.text):
                return self.text
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    part = os.read(self.master, 1 << 16)
                except OSError:  # the program has ended
                    part = b""
                if not part:
                    break
                *whole, left = (left + part).split(b"\n")
                for line in whole:
                    self._line(line.decode())
        assert any(wanted in line for line in self.text), (wanted, self.text)
        return self.text

    def _line(self, line):
        while match := re.match(r"[\r]*\x1b\[(\d*)([AJK])", line):
            if match[2] == "A":
                self.row -= int(match[1] or 1)
                assert self.row >= 0
            elif match[2] == "J":
                self.text[self.row :] = [""] * (len(self.text) - self.row)
            line = line[match.end() :]
        self.text[self.row] = line.replace("\r", "").removesuffix("\x1b[K")
        self.row += 1
        self.lowest = max(self.lowest, self.row)
        assert self.row < self.rows, "it scrolled"


def test_it_redraws_in_place_until_the_run_ends(tmp_path):
    folder = write(tmp_path / "run", 10)
    terminal = Terminal(str(folder), "--interval=0.1")
    terminal.until("step 10 ")
    write(folder, 10, first=11)
    shown = terminal.until("step 20 ")
    assert sum(line.startswith("run: running") for line in shown) == 1 and sum(line.startswith("loss") for line in shown) == 1
    (folder / "other").write_text("".join((folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:15]))
    (folder / "other").replace(folder / "metrics.jsonl")  # rolled back
    terminal.until("step 15 ")
    write(folder, 25, first=16, events=[dict(event="end", reason="budget used", step=40)])
    terminal.until("run: finished (budget used)")
    assert terminal.process.wait(20) == 0
    os.close(terminal.master)


def test_a_low_terminal_does_not_scroll_and_ctrl_c_ends(tmp_path):
    terminal = Terminal(str(write(tmp_path / "run", 10)), "--interval=0.1", rows=6)
    terminal.until("loss")
    terminal.process.send_signal(signal.SIGINT)  # what Ctrl-C sends
    assert terminal.process.wait(20) == 0 and terminal.lowest <= 5
    os.close(terminal.master)
