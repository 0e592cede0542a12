"""The console of a run: one aligned line for each step that was looked at and, on a terminal, a live bar under the lines.

The bar is drawn from what the host knows already; it never waits for the device.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from contextlib import suppress
from typing import Any

from tqdm import tqdm

REDRAWN = 0.5
"""Between two drawings of the bar [s]; a log line redraws it at once."""
_CLEAR = "\r\x1b[K"


class Console:
    """Standard output: lines, and the bar where it is a terminal.

    In a pipe or a file there is no bar, and not one control character.
    """

    def __init__(self):
        self._stream = sys.stdout
        self.live = self._stream.isatty()
        """Whether there is a bar to show."""
        self._bar, self._drawn = "", -REDRAWN

    def say(self, line: str) -> bool:
        """Print a line, above the bar; False where the console's reader has gone, after which nothing is shown any more."""
        return self._write(f"{_CLEAR}{line}\n{self._bar}" if self._bar else f"{line}\n")

    def show(self, share: float, left: float, row: dict[str, Any] | None) -> bool:
        """Draw the bar, unless it was drawn just now: `share` of the budget, seconds left, loss and speed of a step's `row`.

        False where the console's reader has gone.
        """
        now = time.perf_counter()
        if not self.live or now - self._drawn < REDRAWN:
            return True
        self._drawn, share = now, min(1.0, share)
        columns = self._columns()
        fields = [f"{share:4.0%}", f"eta {duration(left)}"]
        if row:
            fields += [f"loss {row['loss']:.4f}", f"{row['tokens_per_s']:,.0f} tok/s"]
        while len(fields) > 1 and len("  ".join(fields)) + 6 > columns:
            fields.pop()
        text = f"{'  '.join(fields)} |{{bar}}|"
        try:
            "█▏".encode(self._stream.encoding or "ascii")
            ascii_only = False
        except UnicodeEncodeError:
            ascii_only = True
        # The last column stays free: some terminals begin a new line as soon as it is filled.
        self._bar = tqdm.format_meter(share, 1.0, 1.0, ncols=columns - 1, bar_format=text, ascii=ascii_only)
        return self._write(f"{_CLEAR}{self._bar}")

    def wipe(self) -> None:
        """Take the bar off the screen from within a signal handler, which must not use the buffered stream."""
        if self._bar:
            with suppress(OSError):
                os.write(self._stream.fileno(), _CLEAR.encode())

    def close(self) -> None:
        """Take the bar off the screen for good."""
        if self._bar:
            self._write(_CLEAR)
        self.live, self._bar = False, ""

    def _columns(self) -> int:
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return columns or 80  # a terminal that does not know its size says 0

    def _write(self, text: str) -> bool:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a closed pipe, a terminal that hung up
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self.live, self._bar = False, ""
            return False
        return True


def duration(seconds: float) -> str:
    """3725 -> '   1:02:05', ten columns up to a year."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:>4}:{minute:02}:{second:02}"


def step_line(row: dict[str, Any], *, share: float, left: float, gpu: dict[str, Any] | None) -> str:
    """A step's line, from its row of metrics.jsonl and the newest figures of the GPU; each figure keeps its columns as it grows."""
    mfu = f"  mfu {row['mfu']:5.1%}" if row["mfu"] is not None else ""
    line = (
        f"step {row['step']:>9,}  loss {_figure(row['loss'], 8, 4)}  lr {row['lr']:.2e}  norm {_figure(row['grad_norm'], 8, 2)}"
        f"  {row['tokens_per_s']:>10,.0f} tok/s{mfu}  {row['peak_memory_bytes'] / 2**30:6.2f} GiB  {share:4.0%}  eta {duration(left)}"
    )
    if gpu is not None:
        units = (("gpu_utilisation", 4, "%"), ("gpu_watts", 5, " W"), ("gpu_celsius", 4, " C"))
        line += "  gpu" + "".join(f"{'-' if gpu[key] is None else round(gpu[key]):>{width}}{unit}" for key, width, unit in units)
    return line + ("  SKIPPED: not finite" if row["skipped"] else "")


def _figure(value: float, width: int, decimals: int) -> str:
    """In `width` columns, with an exponent where it would not fit."""
    text = f"{value:{width}.{decimals}f}"
    return text if len(text) <= width else f"{value:{width}.1e}"
