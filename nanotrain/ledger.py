"""What a run writes as it goes: lines on the console and in log.txt, events, metrics, and what outside loggers get of them.

metrics.jsonl  a row per step, validation and reading of the GPU      events.jsonl  what happened besides      log.txt  the console's lines
"""

from __future__ import annotations

import json
import math
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from nanotrain.console import Console
from nanotrain.files import replace_file
from nanotrain.trackers import Tracker, close_trackers, send


class Ledger:
    """The files in the folder `path` that a run appends to, each line flushed as it is written.

    `trackers` are the outside loggers. OSError, with the file's name, where one cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.trackers: list[Tracker] = []
        self.stop_signal: int | None = None
        """The signal that asks the run to end: SIGPIPE where the console's reader has gone."""

    def open(self) -> None:
        """Go on with the files; rows of metrics wait for `open_metrics`."""
        self._log = (self.path / "log.txt").open("a", encoding="utf-8", errors="backslashreplace")
        self._events = (self.path / "events.jsonl").open("a")
        self._metrics: TextIO | None = None
        self.console = Console()

    def close(self, failed: bool) -> None:
        """Take the bar off the screen, let the trackers send what is left, and close the files."""
        self.console.close()
        close_trackers(self.trackers, failed, self.say)
        for file in (self._metrics, self._events, self._log):
            if file is not None:
                with suppress(OSError):  # each line was flushed: what still cannot be written has been reported
                    file.close()

    def say(self, line: str) -> None:
        """One line to the console and log.txt; where the console's reader has gone, the run stops as after a SIGTERM."""
        if not self.console.say(line):
            self.stop_signal = self.stop_signal or signal.SIGPIPE
        _append(self._log, line)

    def show(self, share: float, left: float, row: dict[str, Any] | None) -> None:
        """Keep the bar on a terminal: `share` of the budget, seconds left, and the newest row of a step."""
        if not self.console.show(share, left, row):
            self.stop_signal = self.stop_signal or signal.SIGPIPE

    def event(self, kind: str, **facts: Any) -> None:
        """A row of events.jsonl."""
        _append(self._events, json.dumps({"time": round(time.time(), 3), "event": kind} | facts))

    def open_metrics(self, step: int, validated: bool = False) -> None:
        """Continue metrics.jsonl after `step`: later rows are dropped, a torn last line, and unless it was `validated`, its validation."""
        path = self.path / "metrics.jsonl"
        if self._metrics is not None:
            self._metrics.close()
        if path.exists():
            lines = path.read_text(errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _is_kept(line, step, validated)]
            if kept != lines:
                replace_file(path, "".join(kept))
        self._metrics = path.open("a")

    def metric(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl, for the trackers too; a number that is not finite becomes null."""
        row = _finite(row)
        _append(self._metrics, json.dumps(row))
        send(self.trackers, row, self.say)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A text that the model wrote: a line, an event, and the trackers' own record of it."""
        self.say(f"sample: {text!r}")
        self.event("sample", step=step, prompt=prompt, text=text)
        send(self.trackers, {"step": step, "sample": text}, self.say)


def _append(file: TextIO, line: str) -> None:
    try:
        file.write(line + "\n")
        file.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from None  # a failed write does not know its file


def _is_kept(line: str, step: int, validated: bool) -> bool:
    try:
        row = json.loads(line)
        return line.endswith("\n") and (row["step"] < step or (row["step"] == step and (validated or "val_bpb" not in row)))
    except (ValueError, KeyError, TypeError):
        return False


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
