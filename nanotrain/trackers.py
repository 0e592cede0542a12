"""Outside loggers: Weights & Biases, TensorBoard and MLflow, fed with the rows of metrics.jsonl and the samples.

Each is an extra of the package and off by default. They get numbers, samples and the config, never an environment variable or a key.
A run that is resumed goes on in the same run of the tool: its id is kept in trackers.json of the run folder.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class LogConfig:
    """Outside loggers, beside the run folder's own files."""

    wandb: str = ""
    """Weights & Biases project, as `project` or `entity/project`; empty is off."""
    tensorboard: bool = False
    """Write TensorBoard's files into the run folder's tensorboard/."""
    mlflow: str = ""
    """MLflow experiment; where its server is, MLflow itself is told (MLFLOW_TRACKING_URI). Empty is off."""


class Tracker(Protocol):
    """What a tool's class offers. It may raise whatever its tool raises."""

    name: str

    def log(self, step: int, values: dict[str, float | str]) -> None:
        """Numbers and texts by name, as of `step`."""

    def close(self, failed: bool) -> None:
        """Send what is left; `failed` where an error ended the run."""


def check_trackers(c: LogConfig) -> None:
    """Raise ValueError naming the flag where a tool that is asked for is not installed."""
    for name in ("wandb", "tensorboard", "mlflow"):
        value = getattr(c, name)
        # A mere folder of the tool's name in the working directory, as wandb makes one, is found too, but has no origin.
        if value and getattr(importlib.util.find_spec(name), "origin", None) is None:
            raise ValueError(f"--log.{name} {str(value).lower() if value is True else value}: the package {name} is not installed;"
                             f" pip install 'nanotrain[{name}]'")  # fmt: skip


def open_trackers(c: LogConfig, folder: Path, config: dict[str, Any], step: int) -> list[Tracker]:
    """The tools asked for, told the flat `config`, for a run that goes on after `step`.

    Raises ValueError naming the flag for one that does not start.
    """
    opened: list[Tracker] = []
    for name, kind in (("wandb", Wandb), ("tensorboard", TensorBoard), ("mlflow", MLflow)):
        value = getattr(c, name)
        if value:
            try:
                opened.append(kind(value, folder, config, step))
            except Exception as error:
                close_trackers(opened, True, lambda line: None)
                raise ValueError(f"--log.{name} {value}: did not start: {_line(error)}; mend that, or go on without it") from error
    return opened


def send(trackers: list[Tracker], row: dict[str, Any], say: Callable[[str], None]) -> None:
    """Give a row's numbers and texts to every tool. One that fails is named once and dropped: the run goes on without it."""
    values = {name: value for name, value in _flat(row).items() if name != "step" and isinstance(value, (int, float, str))}
    for tracker in list(trackers):
        try:
            tracker.log(row["step"], values)
        except Exception as error:
            trackers.remove(tracker)
            say(f"--log.{tracker.name}: failed and is off from step {row['step']:,}: {_line(error)}")
            close_trackers([tracker], True, lambda line: None)


def close_trackers(trackers: list[Tracker], failed: bool, say: Callable[[str], None]) -> None:
    """Close every tool; one that cannot is named."""
    while trackers:
        tracker = trackers.pop()
        try:
            tracker.close(failed)
        except Exception as error:
            say(f"--log.{tracker.name}: its last rows may be missing: {_line(error)}")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= {f"{name}/{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Wandb:
    """A run of Weights & Biases, named as the run folder."""

    name = "wandb"

    def __init__(self, project: str, folder: Path, config: dict[str, Any], step: int):
        import wandb

        entity, _, project = project.rpartition("/")
        identity = _remembered(folder, "wandb") or _remember(folder, "wandb", secrets.token_hex(4))
        self.run = wandb.init(
            entity=entity or None, project=project, name=folder.resolve().name, id=identity, resume="allow", dir=str(folder), config=config,
            settings=wandb.Settings(console="off"),  # it would take over standard output, and with it the bar
        )  # fmt: skip
        self.run.config.update(config, allow_val_change=True)
        # Its own count of steps never goes back, as a run does after a roll-back or a kill: the step is a metric of its own.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float | str]) -> None:
        """As of `step`, which is sent along."""
        self.run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        """Wait until everything is sent."""
        self.run.finish(exit_code=int(failed))


class TensorBoard:
    """Event files in the run folder's tensorboard/."""

    name = "tensorboard"

    def __init__(self, on: bool, folder: Path, config: dict[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.writer.add_text("config", _verbatim("\n".join(f"{key} = {value}" for key, value in config.items())), step)

    def log(self, step: int, values: dict[str, float | str]) -> None:
        """Scalars and texts."""
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, _verbatim(value), step)
            else:
                self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self.writer.close()


def _verbatim(text: str) -> str:
    """As a block of code in Markdown, which TensorBoard shows texts as."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


class MLflow:
    """A run of an MLflow experiment, named as the run folder. Rows are gathered and sent together, for each sending waits for the server."""

    name = "mlflow"
    EVERY_S = 10.0
    """Between sendings [s]."""

    def __init__(self, experiment: str, folder: Path, config: dict[str, Any], step: int):
        import mlflow

        self.mlflow, self.client = mlflow, mlflow.MlflowClient()
        self.waiting: list[Any] = []
        self.sent = time.monotonic()
        self.run_id = _remembered(folder, "mlflow")
        if self.run_id is None:
            found = self.client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else self.client.create_experiment(experiment)
            self.run_id = self.client.create_run(experiment_id, run_name=folder.resolve().name).info.run_id
            _remember(folder, "mlflow", self.run_id)
            params = [mlflow.entities.Param(key, str(value)[:500]) for key, value in config.items()]
            for first in range(0, len(params), 100):  # the most that one call takes
                self.client.log_batch(self.run_id, params=params[first : first + 100])
        else:  # its parameters cannot be changed any more
            self.client.update_run(self.run_id, status="RUNNING")

    def log(self, step: int, values: dict[str, float | str]) -> None:
        """Metrics, and a text as an artifact of its own."""
        now = int(time.time() * 1000)
        for name, value in values.items():
            if isinstance(value, str):
                self.client.log_text(self.run_id, value, f"{name}/step-{step:08d}.txt")
            else:
                self.waiting.append(self.mlflow.entities.Metric(name, value, now, step))
        if time.monotonic() - self.sent >= self.EVERY_S:
            self._send()

    def _send(self) -> None:
        for first in range(0, len(self.waiting), 1000):  # the most that one call takes
            self.client.log_batch(self.run_id, metrics=self.waiting[first : first + 1000])
        self.waiting, self.sent = [], time.monotonic()

    def close(self, failed: bool) -> None:
        """Send what is left, and say how the run ended."""
        self._send()
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


def _remembered(folder: Path, tool: str) -> str | None:
    """The id that a tool's run of this folder has, if it has one."""
    try:
        return json.loads((folder / "trackers.json").read_text()).get(tool)
    except (OSError, ValueError, AttributeError):
        return None


def _remember(folder: Path, tool: str, identity: str) -> str:
    held = {name: known for name in ("wandb", "mlflow") if (known := _remembered(folder, name))}
    (folder / "trackers.json").write_text(json.dumps(held | {tool: identity}) + "\n")
    return identity
