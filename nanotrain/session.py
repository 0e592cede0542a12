"""How a training run survives: what it has done so far, its checkpoints, going on from one, and going back after a spike."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from nanotrain import checkpoint
from nanotrain.model.transformer import Transformer
from nanotrain.optim import Optimizer
from nanotrain.run import Run
from nanotrain.stability import WINDOW, plateau


@dataclass
class Progress:
    """All of a loop's state besides tensors; goes into state.json."""

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    seconds: float = 0.0
    recent_losses: list[float] = field(default_factory=list)
    served: int = 0
    """The last step after which everything due was done: a validation that a signal cut short is made up for."""
    val_bpb: float | None = None
    """The validation after this very step, where there was one."""
    best_bpb: float | None = None
    validations_since_best: int = 0
    rollbacks: int = 0
    skipped_in_a_row: int = 0


class Session:
    """Model, optimizer and progress of a run, kept in the checkpoints of its folder.

    `facts` are what a checkpoint must have in common with the run that goes on from it: `model` (every key of its config),
    `dtype`, `seed`, `length`, `tokenizer_sha256`, `data_sha256`. They are stored with it.
    """

    def __init__(self, folder: Run, model: Transformer, optimizer: Optimizer, facts: dict[str, Any], keep: int):
        self.folder, self.model, self.optimizer, self.keep = folder, model, optimizer, keep
        self.facts = json.loads(json.dumps(facts))  # as a checkpoint gives them back: tuples are lists there
        self.progress = Progress()
        self.saved: dict[str, Any] | None = None
        """The progress of the newest checkpoint: a roll-back, or a validation made up for, changes it at the same step."""
        self.seconds = 0.0
        """Spent on checkpoints since the loop last asked [s]."""

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Every tensor that must survive, by file and name."""
        return {"model": {n: p.detach() for n, p in self.model.named_parameters()}, "optimizer": self.optimizer.state()}

    def lasting(self) -> dict[str, Any]:
        """The progress but for the seconds it took."""
        return {name: value for name, value in asdict(self.progress).items() if name != "seconds"}

    def fingerprint(self) -> str:
        """SHA-256 of the complete state."""
        return checkpoint.fingerprint(self.tensors(), self.lasting())

    def save(self) -> None:
        """Write a checkpoint unless the newest holds this very state, then drop those no longer to be kept."""
        p, started = self.progress, time.perf_counter()
        if self.saved == self.lasting():
            return
        path = checkpoint.save(self.folder.checkpoints, p.step, self.tensors(), self.facts | asdict(p))
        self.saved = self.lasting()
        removed = [r.name for r in checkpoint.retain(self.folder.checkpoints, self.keep, path)]
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.folder.event("checkpoint", step=p.step, seconds=round(seconds, 4), removed=removed)
        self.folder.say(f"step {p.step:>9,}  checkpoint: {path}")

    def resume(self) -> None:
        """Go on from the newest checkpoint that verifies, or start where there is none at all.

        Raises ValueError where there are some and none verifies, or where it is of another model, data or tokenizer.
        """
        if not checkpoint.directories(self.folder.checkpoints):
            return
        path = self._load_latest()
        if path is None:
            raise ValueError(f"--resume auto: no checkpoint in {self.folder.checkpoints} verifies; move them away to start anew")
        self.folder.say(f"resumed from {path} ({self.progress.cursor:,} rows read)")
        self.folder.event("resumed", checkpoint=path.name)

    def _load_latest(self) -> Path | None:
        def damaged(line):
            self.folder.say(line)
            self.folder.event("damaged", text=line)

        path = checkpoint.latest(self.folder.checkpoints, damaged)
        if path is None:
            return None
        state = checkpoint.load_state(path)
        if not (path / "optimizer.safetensors").is_file():
            source = state.get("converted_from", "elsewhere")
            raise ValueError(f"--resume auto: {path} was converted from {source} and has no optimizer to go on with; train in another --run.dir")
        for key, what in (("tokenizer_sha256", "tokenizer"), ("data_sha256", "data")):
            if state[key] != self.facts[key]:
                raise ValueError(f"--data.dir: the {what} changed since {path.name}: {self.facts[key][:16]} here, {state[key][:16]} in the"
                                 " checkpoint; give the same data, or start anew in another --run.dir")  # fmt: skip
        keys = {f"--model.{k}": (v, self.facts["model"][k]) for k, v in state["model"].items() if k not in ("preset", "recompute")}
        keys |= {flag: (state[k], self.facts[k]) for k, flag in (("dtype", "--train.dtype"), ("seed", "--run.seed"), ("length", "--train.length"))}
        for flag, (held, given) in keys.items():
            if held != given:
                raise ValueError(f"{flag} {given}: the checkpoint {path} was made with {held}; give that, or start anew in another --run.dir")
        for name, tensors in self.tensors().items():
            checkpoint.load_tensors(path / f"{name}.safetensors", tensors)
        self.progress = Progress(**{f.name: state[f.name] for f in fields(Progress)})
        self.saved = self.lasting()
        return path

    def roll_back(self, loss: float, step: int, cursor: int, limit: int) -> bool:
        """After `step`, which had read `cursor` rows, spiked: back to the last checkpoint, past that data.

        False, with an event, where there is no checkpoint yet; ValueError after `limit` roll-backs.
        """
        before = self.progress
        if before.rollbacks >= limit:
            raise ValueError(
                f"step {step}: loss {loss:.3f} spiked after {limit} roll-backs; lower --optim.lr and --optim.muon_lr, then --resume auto"
            )
        path = self._load_latest()
        if path is None:
            self.folder.event("spike", step=step, loss=loss, action="none: no checkpoint yet")
            return False
        p = self.progress
        p.cursor, p.seconds, p.rollbacks = cursor, before.seconds, before.rollbacks + 1
        self.folder.open_metrics(p.step, p.val_bpb is not None)
        self.folder.say(f"loss {loss:.3f} spiked at step {step:,}; rolled back to {path.name}, its data up to row {cursor:,} is skipped")
        self.folder.event("spike", step=step, loss=loss, action=f"rolled back to {path.name}", cursor=cursor)
        return True

    def remember(self, step: int, loss: float, steps: int) -> None:
        """Keep the losses that spikes and plateaus are judged by; report a plateau of `steps` steps (0 never)."""
        p = self.progress
        p.recent_losses = [*p.recent_losses, loss][-max(WINDOW, 2 * steps) :]
        flat = plateau(p.recent_losses, steps) if steps and step % steps == 0 else None
        if flat:
            self.folder.say(f"plateau at step {step:,}: mean loss {flat[1]:.4f}, {flat[0]:.4f} over the {steps} steps before")
            self.folder.event("plateau", step=step, before=flat[0], after=flat[1])
