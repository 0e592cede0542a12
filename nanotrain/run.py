"""The run folder: who owns it, what it holds, what is logged, and how a run is asked to stop.

config.toml  reruns the run        env.json      versions, machine, git
metrics.jsonl  a row per step      events.jsonl  what happened besides      log.txt  the console's lines
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from nanotrain.environment import environment


@dataclass(frozen=True)
class RunConfig:
    """Where a run lies and how it computes."""

    dir: str = ""
    """Run folder; empty makes runs/<stage>-<date>-<time>."""
    seed: int = 0
    """Seed of initial weights, data order and dropout [any integer]."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    log_every: int = 10
    """Between console lines, for which the host waits for the device [steps]; metrics.jsonl then gets a row of every step."""
    deterministic: bool = False
    """On a GPU, use only kernels whose bits repeat, so that a resumed run equals an undisturbed one; on a CPU they always do."""


def choose_device(name: str) -> torch.device:
    """The device for `--run.device`; ValueError where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--run.device cuda: this machine has no usable NVIDIA GPU; use --run.device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Run:
    """An owned run folder. Use as a context manager: it holds the folder's lock and the signal handlers while inside.

    Raises ValueError, naming the owner, where another process holds the folder.
    """

    def __init__(self, directory: str, stage: str):
        self.path = Path(directory or f"runs/{stage}-{time.strftime('%Y%m%d-%H%M%S')}")
        self.checkpoints = self.path / "checkpoints"
        self.stop_signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Run:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise ValueError(f"--run.dir {self.path}: in use by {owner}; stop that run or choose another folder") from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self._lock.flush()
        self._log = (self.path / "log.txt").open("a", encoding="utf-8", errors="backslashreplace")
        self._events = (self.path / "events.jsonl").open("a")
        self._metrics: TextIO | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if isinstance(error, Exception):
            self.event("error", error=f"{kind.__name__}: {error}")
        for file in (self._metrics, self._events, self._log, self._lock):
            if file is not None:
                with suppress(OSError):  # each line was flushed: what still cannot be written has been reported
                    file.close()

    def _on_signal(self, number: int, frame) -> None:
        if self.stop_signal not in (None, signal.SIGPIPE):
            os._exit(128 + number)
        self.stop_signal = number
        with suppress(OSError):  # a console that has gone, too
            os.write(2, f"\nnanotrain: {signal.Signals(number).name}: finishing this step and saving; once more exits now\n".encode())

    def say(self, line: str) -> None:
        """One line to the console and log.txt; where the console's reader has gone, the run stops as after a SIGTERM."""
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.stop_signal = self.stop_signal or signal.SIGPIPE
        _append(self._log, line)

    def event(self, kind: str, **facts: Any) -> None:
        """A row of events.jsonl."""
        _append(self._events, json.dumps({"time": round(time.time(), 3), "event": kind} | facts))

    def record(self, config_toml: str) -> None:
        """Write config.toml and env.json."""
        replace_file(self.path / "config.toml", config_toml)
        replace_file(self.path / "env.json", json.dumps(environment(), indent=1) + "\n")

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
        """A row of metrics.jsonl; a number that is not finite becomes null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        _append(self._metrics, json.dumps(clean))


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


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a small file whole or not at all; text as UTF-8."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    temporary.replace(path)
