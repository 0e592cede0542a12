"""What a run has recorded, read back: rows of metrics and events, as far as they are whole, while it runs or after.

Reading is incremental: `History.update` reads what was written since. Whatever a run did not record is empty here, never an error.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

STEP = ("step", "loss", "lr", "grad_norm", "clipped", "skipped", "tokens", "tokens_per_s", "step_s", "data_s", "communication_s", "checkpoint_s",
        "mfu", "peak_memory_bytes", "epoch", "loss_scale")  # fmt: skip
"""Columns of a step's row."""
VALIDATION = ("step", "val_loss", "val_bpb", "val_tokens", "val_documents", "val_s")
"""Columns of a validation's row."""
GPU = ("step", "gpu_utilisation", "gpu_watts", "gpu_celsius", "gpu_mhz", "gpu_memory_bytes")
"""Columns of a row of GPU figures."""
_BLOCK = 1 << 22


class Tail:
    """The whole lines of a JSON-lines file that another process appends to, or replaces, since they were last asked for."""

    def __init__(self, path: Path, limit: int = 0):
        """With a `limit`, a file that is longer at first is read from that many bytes before its end; 0 reads all of it."""
        self.path, self.limit = path, limit
        self.unreadable = 0
        """Lines that hold no JSON object."""
        self.cut = False
        """Whether the file's beginning was left out."""
        self._file: BinaryIO | None = None
        self._rest = b""

    def replaced(self) -> bool:
        """Whether the file is another one, or shorter, than it was: it is then read anew from its beginning."""
        try:
            now = self.path.stat()
        except OSError:
            return False
        if self._file is not None:
            held = os.fstat(self._file.fileno())  # held open, so that its number cannot be another file's
            if (held.st_dev, held.st_ino) == (now.st_dev, now.st_ino) and now.st_size >= self._file.tell():
                return False
            self.close()
            self._open(now.st_size)
            return True
        return False

    def _open(self, size: int) -> None:
        self._file, self._rest, self.unreadable, self.cut = self.path.open("rb"), b"", 0, False
        if 0 < self.limit < size:
            self._file.seek(size - self.limit)
            self._file.readline()
            self.cut = True

    def rows(self) -> Iterator[list[dict[str, Any]]]:
        """What was written since, in blocks. A last line without its end waits for it."""
        if self._file is None:
            try:
                self._open(self.path.stat().st_size)
            except OSError:
                return
        while block := self._file.read(_BLOCK):
            *lines, self._rest = (self._rest + block).split(b"\n")
            rows = [row for row in _parse(lines) if isinstance(row, dict)]
            self.unreadable += len(lines) - len(rows)
            yield rows

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _parse(lines: list[bytes]) -> list[Any]:
    """The values of lines, None where one is no JSON; all at once where all are."""
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")
        if len(rows) == len(lines):
            return rows
    except (ValueError, RecursionError):
        pass
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            rows.append(None)
    return rows


class Table:
    """Rows as columns of float64, by name; what a row lacks, or is no finite number, is NaN. `step` rises strictly."""

    def __init__(self):
        self._columns: dict[str, np.ndarray] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._columns:
            return np.full(self._count, np.nan)
        return self._columns[name][: self._count]

    def has(self, name: str) -> bool:
        """Whether any row holds a number of this name."""
        return bool(np.isfinite(self[name]).any())

    def names(self) -> list[str]:
        """Of the columns, but for `step`."""
        return [name for name in self._columns if name != "step"]

    def extend(self, rows: list[dict[str, Any]], names: Iterable[str]) -> None:
        """Append rows, of which those `names` count. A step that comes again, as after a roll-back, replaces its first row."""
        rows = [row for row in rows if math.isfinite(_number(row.get("step")))]
        if not rows:
            return
        start, stop = self._count, self._count + len(rows)
        for name in names:
            values = _numbers([row.get(name) for row in rows])
            column = self._columns.get(name, np.empty(0))
            if len(column) < stop:
                grown = np.full(max(64, 2 * stop), np.nan)
                grown[: len(column)] = column
                self._columns[name] = column = grown
            column[start:stop] = values
        self._count = stop
        steps = self["step"]
        if np.any(np.diff(steps[max(0, start - 1) :]) <= 0):
            _, last = np.unique(steps[::-1], return_index=True)
            keep = stop - 1 - last
            self._columns = {name: column[:stop][keep] for name, column in self._columns.items()}
            self._count = len(keep)


def _numbers(values: list[Any]) -> np.ndarray:
    try:
        numbers = np.array(values, dtype=np.float64)
        if numbers.ndim != 1:
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        numbers = np.array([_number(value) for value in values])
    numbers[~np.isfinite(numbers)] = np.nan
    return numbers


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


class History:
    """A run folder's records. ValueError where the folder is none.

    `steps`, `validations`, `gpu` and `ratios` (a column per parameter) are tables; `events` the rows of events.jsonl.
    """

    def __init__(self, path: str | Path, limit: int = 0):
        """Reads nothing of the metrics yet; `limit` as in `Tail`."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{path}: no such folder; give the folder of a run (its --run.dir)")
        if not any((self.path / name).is_file() for name in ("metrics.jsonl", "events.jsonl", "config.toml")):
            raise ValueError(f"{path}: no run folder (no metrics.jsonl, events.jsonl or config.toml in it); give a run's --run.dir")
        self.name = self.path.resolve().name
        self.events: list[dict[str, Any]] = []
        self.metrics_file, self._events_file = Tail(self.path / "metrics.jsonl", limit), Tail(self.path / "events.jsonl")
        self._clear()

    def _clear(self) -> None:
        self.steps, self.validations, self.gpu, self.ratios = Table(), Table(), Table(), Table()
        self.throttled: Counter[str] = Counter()

    def update(self) -> History:
        """Read what was written since; returns itself."""
        if self.metrics_file.replaced():
            self._clear()
        for rows in self.metrics_file.rows():
            self._add(rows)
        if self._events_file.replaced():
            self.events.clear()
        for rows in self._events_file.rows():
            self.events += [row for row in rows if isinstance(row.get("event"), str)]
        return self

    def _add(self, rows: list[dict[str, Any]]) -> None:
        self.steps.extend([row for row in rows if "loss" in row], STEP)
        others = [row for row in rows if "loss" not in row]
        self.validations.extend([row for row in others if "val_loss" in row or "val_bpb" in row], VALIDATION)
        gpu = [row for row in others if "gpu_utilisation" in row]
        self.gpu.extend(gpu, GPU)
        for row in gpu:
            if isinstance(row.get("gpu_throttled"), list):
                self.throttled.update(map(str, row["gpu_throttled"]))
        ratios = [row["update_ratio"] | {"step": row.get("step")} for row in rows if isinstance(row.get("update_ratio"), dict)]
        self.ratios.extend(ratios, dict.fromkeys(name for row in ratios for name in row))

    @property
    def unreadable(self) -> int:
        """Lines of metrics and events that hold no JSON object."""
        return self.metrics_file.unreadable + self._events_file.unreadable

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of these kinds, in their order."""
        return [event for event in self.events if event["event"] in kinds]

    def last(self, kind: str) -> dict[str, Any]:
        """The newest event of a kind; empty where there is none."""
        return next((event for event in reversed(self.events) if event["event"] == kind), {})

    def state(self) -> tuple[str, str]:
        """(finished, failed, running or interrupted; and what there is to say about it)."""
        word, why = "", ""
        for event in self.events:
            if event["event"] == "end":
                word, why = "finished", str(event.get("reason", ""))
            elif event["event"] == "error":
                if word != "finished":  # else another process was refused the folder of a run that had ended
                    word, why = "failed", str(event.get("error", ""))
            else:
                word, why = "", ""
        if word:
            return word, why
        owner = self._owner()
        if owner and owner[1] == platform.node() and not _lives(owner[0]):
            return "interrupted", "its process has gone without an end; --resume auto goes on"
        return ("running", f"process {owner[0]} on {owner[1]}") if owner else ("interrupted", "no process is known to run it")

    def _owner(self) -> tuple[int, str] | None:
        """The process that last held the folder's lock, and its machine."""
        try:
            match = re.match(r"process (\d{1,9}) on (\S*) since", (self.path / "lock").read_text(errors="replace"))
        except OSError:
            return None
        return (int(match[1]), match[2]) if match else None

    def config_text(self) -> str:
        """config.toml as it stands; empty where there is none."""
        return _text(self.path / "config.toml")

    def config(self) -> dict[str, Any]:
        """Dotted key -> value of config.toml; empty where it cannot be read."""
        try:
            return dict(_flat(tomllib.loads(self.config_text())))
        except ValueError:
            return {}

    def environment(self) -> dict[str, Any]:
        """env.json; empty where it cannot be read."""
        try:
            table = json.loads(_text(self.path / "env.json"))
        except (ValueError, RecursionError):
            return {}
        return table if isinstance(table, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
