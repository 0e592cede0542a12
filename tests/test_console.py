"""The console: lines whose columns stand still, and a bar that is there on a terminal only and leaves nothing behind."""

import fcntl
import os
import pty
import signal
import struct
import sys
import termios
import threading

import pytest

from nanotrain import console
from nanotrain.__main__ import main
from nanotrain.console import Console, duration, step_line
from nanotrain.stages import pretrain
from tests.stages.test_pretrain import events, flags, stop_after

ROW = dict(step=1, loss=6.2, lr=1e-4, grad_norm=1.0, tokens_per_s=900.0, mfu=None, peak_memory_bytes=5 << 20, skipped=0)


class Terminal:
    """A pseudo-terminal as standard output; `screen()` is what it shows, its lines without trailing blanks."""

    def __init__(self, columns: int):
        self.master, self.slave = pty.openpty()
        self.resize(columns)
        self.stream = os.fdopen(self.slave, "w", encoding="utf-8", closefd=False)
        self._bytes = b""
        self._reader = threading.Thread(target=self._read, daemon=True)  # a terminal that nobody reads fills up
        self._reader.start()

    def resize(self, columns: int) -> None:
        self.columns = columns
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def _read(self) -> None:
        try:
            while block := os.read(self.master, 1 << 16):
                self._bytes += block
        except OSError:
            pass  # the last writer has closed it

    def finish(self) -> str:
        """Everything that was written."""
        self.stream.close()
        os.close(self.slave)
        self._reader.join(10)
        return self._bytes.decode()

    def screen(self) -> list[str]:
        lines, column = [[]], 0
        text = self.finish()
        while text:
            if text.startswith("\x1b[K"):
                del lines[-1][column:]
                text = text[3:]
                continue
            character, text = text[0], text[1:]
            if character == "\r":
                column = 0
            elif character == "\n":
                lines.append([])
                column = 0
            else:
                assert character.isprintable(), repr(character)
                lines[-1] += " " * (column + 1 - len(lines[-1]))
                lines[-1][column] = character
                column += 1
        return ["".join(line).rstrip() for line in lines]


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard output a terminal so many columns wide, and has the bar drawn at every call."""

    def make(columns: int) -> Terminal:
        made = Terminal(columns)
        monkeypatch.setattr(sys, "stdout", made.stream)
        monkeypatch.setattr(console, "REDRAWN", 0.0)
        return made

    return make


def test_columns_stand_still_while_figures_grow():
    gpu = dict(gpu_utilisation=5, gpu_watts=61.4, gpu_celsius=31)
    small = step_line(ROW | dict(mfu=0.01), share=0.0, left=1.0, gpu=gpu)
    large = dict(step=1_234_567, loss=12.3456, grad_norm=98765.4, tokens_per_s=1e6, mfu=0.51, peak_memory_bytes=75 << 30)
    grown = [
        step_line(ROW | large, share=1.0, left=400_000.0, gpu=dict(gpu_utilisation=100, gpu_watts=700.0, gpu_celsius=85)),
        step_line(ROW | large | dict(loss=float("nan"), grad_norm=float("inf")), share=0.5, left=0.0, gpu=dict.fromkeys(gpu)),
        step_line(ROW | large | dict(loss=3e7, grad_norm=2.5e11), share=0.5, left=0.0, gpu=gpu),
    ]
    assert "step 1,234,567  loss  12.3456  lr 1.00e-04  norm 98765.40   1,000,000 tok/s  mfu 51.0%   75.00 GiB  100%  eta  111:06:40" in grown[0]
    assert "gpu 100%  700 W  85 C" in grown[0] and "gpu   -%    - W   - C" in grown[1]
    for line in grown:
        assert "\n" not in line and len(line) == len(small)
        for word in ("loss", "lr", "norm", "tok/s", "mfu", "GiB", "%  eta", "gpu", " W ", " C"):
            assert line.index(word) == small.index(word), (word, line)
    assert step_line(ROW | dict(skipped=1), share=0.1, left=9.0, gpu=None).endswith("  SKIPPED: not finite")
    assert [duration(s) for s in (0, 3725.9, 86400 * 30)] == ["   0:00:00", "   1:02:05", " 720:00:00"]


@pytest.mark.parametrize("columns", [40, 100, 0])
def test_the_bar_stays_under_the_lines_and_within_the_terminal(terminal, columns):
    there = terminal(columns)
    c = Console()
    c.say("first")
    for n in range(5):
        c.show(n / 4, 83.0, ROW)
        c.say(f"line {n}")
    if columns == 100:
        there.resize(40)
        c.show(0.5, 83.0, ROW)
        c.show(1.7, 0.0, ROW)  # a budget in seconds is overrun
    text = there.finish()
    bars = [part for part in text.replace("\n", "\r").split("\r") if "|" in part]
    assert {"  0%", " 25%", " 50%", "100%"} <= {bar.removeprefix("\x1b[K")[:4] for bar in bars} and all("eta    0:0" in bar for bar in bars)
    assert all(len(bar.removeprefix("\x1b[K")) <= (columns or 80) - 1 for bar in bars)
    assert [("6.2000" in bar, "900 tok/s" in bar) for bar in bars[:1]] == [(True, columns != 40)]
    if columns == 100:
        assert all(len(bar.removeprefix("\x1b[K")) < 40 for bar in bars[-2:]) and "100%" in bars[-1]


def test_nothing_is_left_of_the_bar(terminal):
    there = terminal(60)
    c = Console()
    for n in range(3):
        c.say(f"line {n}")
        c.show(0.5, 1.0, None)
    c.wipe()
    c.close()
    c.show(0.6, 1.0, None)
    c.say("end")
    assert there.screen() == ["line 0", "line 1", "line 2", "end", ""]


def test_it_is_drawn_twice_a_second_at_most(terminal, monkeypatch):
    there, now = terminal(60), [0.0]
    monkeypatch.setattr(console, "REDRAWN", 0.5)
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    c = Console()
    for n in range(1001):
        now[0] = n / 1000
        c.show(n / 1000, 1.0, None)
    assert there.finish().count("eta") == 3


def test_a_terminal_without_blocks_gets_plain_characters(terminal, monkeypatch):
    there = terminal(60)
    there.stream.reconfigure(encoding="latin-1")
    Console().show(0.5, 1.0, None)
    assert "#" in (text := there.finish()) and text.isascii()


@pytest.mark.parametrize("gone", ["terminal", "pipe"])
def test_a_reader_that_has_gone_is_told_once(monkeypatch, gone):
    reader, writer = pty.openpty() if gone == "terminal" else os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    c = Console()
    assert c.live == (gone == "terminal")
    os.close(reader)
    assert [c.say("a"), c.say("b"), c.show(0.5, 1.0, None)] == [False, True, True]


@pytest.mark.parametrize("end", ["budget", "signal", "error"])
def test_a_run_on_a_terminal_leaves_its_lines_and_no_bar(data, tmp_path, terminal, monkeypatch, end):
    there = terminal(1000)
    arguments = flags(data, tmp_path / "r", "--train.steps=6")
    if end == "signal":
        stop_after(3, arguments)
    elif end == "error":
        step = pretrain.step

        def broken(model, optimizer, *more):
            if optimizer.steps == 4:
                raise ValueError("broken")
            return step(model, optimizer, *more)

        monkeypatch.setattr(pretrain, "step", broken)
        assert main(arguments) == 2 and events(tmp_path / "r", "error")
    else:
        assert main(arguments) == 0
    shown = there.screen()
    assert there._bytes.count(b"\x1b[K") > 6 and b"eta" in there._bytes  # there was one
    assert shown == [*(tmp_path / "r/log.txt").read_text().splitlines(), ""]


def test_a_run_in_a_pipe_shows_no_bar(data, tmp_path, nanotrain):
    done = nanotrain(*flags(data, tmp_path / "r", "--train.steps=3"))
    assert done.returncode == 0 and done.stdout == (tmp_path / "r/log.txt").read_text() and done.stdout.isprintable() is False
    assert not {"\r", "\x1b"} & set(done.stdout + done.stderr)


def test_a_second_signal_takes_the_bar_off_too(terminal, monkeypatch, tmp_path):
    from nanotrain.run import Run

    there = terminal(60)
    monkeypatch.setattr(os, "_exit", lambda code: left.append(code))
    left = []
    with Run(str(tmp_path / "r"), "test") as folder:
        folder.show(0.5, 1.0, None)
        os.kill(os.getpid(), signal.SIGTERM)
        folder.show(0.5, 1.0, None)
        os.kill(os.getpid(), signal.SIGTERM)
        folder.console._bar = ""  # as far as an exit comes
    assert left == [128 + signal.SIGTERM] and there.screen()[-1] == ""
