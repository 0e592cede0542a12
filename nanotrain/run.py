"""The run folder: who owns it, what it holds, and how a run is asked to stop.

config.toml  reruns the run        env.json  versions, machine, git        What is written as the run goes: nanotrain/ledger.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nanotrain.environment import environment
from nanotrain.files import replace_file
from nanotrain.ledger import Ledger


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


class Run(Ledger):
    """An owned run folder. Use as a context manager: it holds the folder's lock and the signal handlers while inside.

    Raises ValueError, naming the owner, where another process holds the folder.
    """

    def __init__(self, directory: str, stage: str):
        super().__init__(Path(directory or f"runs/{stage}-{time.strftime('%Y%m%d-%H%M%S')}"))
        self.checkpoints = self.path / "checkpoints"
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
        self.open()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if isinstance(error, Exception):
            self.event("error", error=f"{kind.__name__}: {error}")
        self.close(failed=error is not None)
        with suppress(OSError):
            self._lock.close()

    def _on_signal(self, number: int, frame) -> None:
        self.console.wipe()
        if self.stop_signal not in (None, signal.SIGPIPE):
            os._exit(128 + number)
        self.stop_signal = number
        with suppress(OSError):  # a console that has gone, too
            os.write(2, f"\nnanotrain: {signal.Signals(number).name}: finishing this step and saving; once more exits now\n".encode())

    def record(self, config_toml: str) -> None:
        """Write config.toml and env.json."""
        replace_file(self.path / "config.toml", config_toml)
        replace_file(self.path / "env.json", json.dumps(environment(), indent=1) + "\n")
