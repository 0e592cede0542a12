"""pretrain: train a language model to predict the next token.

nanotrain pretrain --data.dir=data/python --train.steps=1000 --run.dir=runs/first
nanotrain pretrain --data.dir=data/python --train.steps=1000 --run.dir=runs/first --resume auto
nanotrain pretrain --data.dir=data/python --train.seconds=300 --model.preset=nano --checkpoint.every=500
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch

from nanotrain import checkpoint, losses, memory
from nanotrain import config as configs
from nanotrain.checkpoint import CheckpointConfig
from nanotrain.data.loader import Batch, Loader
from nanotrain.data.shards import TokenShards, file_sha256
from nanotrain.environment import peak_flops
from nanotrain.eval import bits_per_byte
from nanotrain.model.generate import SamplingConfig, generate
from nanotrain.model.transformer import Dropout, ModelConfig, Transformer, build_model, parameter_count
from nanotrain.optim import OptimConfig, Optimizer, StepResult, check_optim, schedule_factor
from nanotrain.run import Run, RunConfig, choose_device
from nanotrain.stability import WINDOW, make_deterministic, plateau, spiked
from nanotrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    dir: str = "data/python"
    """Data directory made by `nanotrain prepare`."""
    verify: bool = True
    """Check the SHA-256 of every shard at the start; off, only sizes are checked."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop: budget, batch, validation, and what ends it early."""

    steps: int = 0
    """Budget [optimizer steps]; exactly one of steps, tokens and seconds is set."""
    tokens: int = 0
    """Budget [tokens]."""
    seconds: float = 0.0
    """Budget [seconds of training steps, without validation and checkpoints]; resume is then not bitwise."""
    micro_batch: int = 16
    """Rows of a forward and backward."""
    accumulate: int = 1
    """Micro-batches of a step."""
    length: int = 128
    """Tokens of a row."""
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    """Parameters and activations; fp32 masters are kept for the narrow ones, and float16 scales its loss dynamically."""
    val_every: int = 250
    """Steps between validations; 0 validates only at the end."""
    val_tokens: int = 50_000
    """Whole held-out documents scored in such a validation [tokens]; the last one scores all of them."""
    val_stride: int = 0
    """How far a validation window moves on [tokens]; 0 is half of length."""
    sample_every: int = 0
    """Steps between samples written to the log; 0 is none."""
    sample_prompt: str = "def "
    """What samples write on from."""
    early_stop: int = 0
    """Stop after so many validations without a new best; 0 never."""
    plateau: int = 0
    """Report a plateau where the mean loss of so many steps is less than 0.5% below that of the ones before; 0 never."""
    spike_sigma: float = 6.0
    """A loss so many standard deviations over the mean of the last 128 rolls back to the last checkpoint and skips its data; 0 never."""
    spike_lr: float = 1.0
    """Factor on the rate after each roll-back."""
    max_rollbacks: int = 3
    """Roll-backs before giving up."""
    max_skipped: int = 50
    """Non-finite steps in a row before giving up."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is split over processes."""

    dp: int = 1
    """Data-parallel processes; this version trains on one."""


@dataclass(frozen=True)
class Config:
    """Keys of `nanotrain pretrain`."""

    resume: str = "none"
    """`auto` goes on from the newest checkpoint of --run.dir that verifies (or starts, where there is none); `none` starts."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass
class Progress:
    """All of the loop's state besides tensors; goes into state.json."""

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    seconds: float = 0.0
    recent_losses: list[float] = field(default_factory=list)
    best_bpb: float | None = None
    validations_since_best: int = 0
    rollbacks: int = 0
    skipped_in_a_row: int = 0


def check(c: Config) -> None:
    """Every check that needs no device: ValueError naming the flag."""
    t = c.train
    if sum(x > 0 for x in (t.steps, t.tokens, t.seconds)) != 1 or min(t.steps, t.tokens, t.seconds) < 0:
        raise ValueError("--train.steps, --train.tokens, --train.seconds: set exactly one of them, above 0")
    for name in ("micro_batch", "accumulate", "length"):
        if getattr(t, name) < 1:
            raise ValueError(f"--train.{name} {getattr(t, name)}: must be at least 1")
    if t.val_stride < 0 or t.val_stride > t.length:
        raise ValueError(f"--train.val_stride {t.val_stride}: must lie between 1 and --train.length {t.length}, or be 0")
    if c.resume not in ("none", "auto"):
        raise ValueError(f"--resume {c.resume}: auto or none")
    if c.resume == "auto" and not c.run.dir:
        raise ValueError("--resume auto: name the run with --run.dir")
    world = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's way of saying how many processes it started
    if world != 1 or c.parallel.dp != 1:
        raise ValueError(
            f"--parallel.dp {c.parallel.dp} under {world} processes: this version trains on one process; start one, with --parallel.dp=1"
        )
    if c.model.positions == "learned" and t.length > c.model.context:
        raise ValueError(f"--train.length {t.length}: learned positions end at --model.context {c.model.context}")
    if c.run.log_every < 1:
        raise ValueError(f"--run.log_every {c.run.log_every}: must be at least 1")
    check_optim(c.optim)


class Training:
    """What `build` puts together and the loop works on."""

    def __init__(self, c: Config, device: torch.device):
        self.c, self.device = c, device
        self.shards = TokenShards(c.data.dir, "train", verify=c.data.verify)
        self.val_shards = TokenShards(c.data.dir, "val", verify=c.data.verify)
        self.fingerprints = {k: self.shards.index[k] for k in ("tokenizer_sha256", "data_sha256")}
        self.tokenizer_path = Path(c.data.dir) / "tokenizer.model"
        if not self.tokenizer_path.is_file() or file_sha256(self.tokenizer_path) != self.fingerprints["tokenizer_sha256"]:
            raise ValueError(f"{self.tokenizer_path}: missing or not the tokenizer the shards were made with; run nanotrain prepare again")
        self.tokenizer = Tokenizer.load(self.tokenizer_path)
        if not c.model.vocab_size:
            c = self.c = replace(c, model=replace(c.model, vocab_size=self.shards.vocab_size))
        if c.model.vocab_size < self.shards.vocab_size:
            raise ValueError(f"--model.vocab_size {c.model.vocab_size}: the tokenizer of {c.data.dir} has {self.shards.vocab_size} tokens")
        self.loader = Loader(self.shards, length=c.train.length, seed=c.run.seed, device=device)
        self.dtype = getattr(torch, c.train.dtype)
        self.plan = memory.plan(
            c.model, dtype=self.dtype, length=c.train.length, rows=c.train.micro_batch, accumulate=c.train.accumulate,
            muon=c.optim.name == "muon", device=device,
        )  # fmt: skip
        self.peak = memory.PeakMemory(device)
        if device.type == "cpu":
            memory.keep_freed_memory()
        self.model = build_model(c.model, seed=c.run.seed, dtype=self.dtype, device=device)
        self.optimizer = Optimizer(self.model, c.optim)
        self.progress = Progress()

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Every tensor that must survive, by file and name."""
        return {"model": {n: p.detach() for n, p in self.model.named_parameters()}, "optimizer": self.optimizer.state()}

    def state(self) -> dict:
        """Everything else that must survive, as JSON."""
        return dict(
            asdict(self.progress), val_loss=self.progress.best_bpb if self.progress.validations_since_best == 0 else None, dtype=self.c.train.dtype,
            model=asdict(self.c.model), seed=self.c.run.seed, length=self.c.train.length, **self.fingerprints,
        )  # fmt: skip

    def load(self, path: Path) -> None:
        """Take over a verified checkpoint. ValueError, with both values, where it is of other data, tokenizer or shape."""
        state = checkpoint.load_state(path)
        for key, flag in (("tokenizer_sha256", "--data.dir: the tokenizer"), ("data_sha256", "--data.dir: the data")):
            if state[key] != self.fingerprints[key]:
                raise ValueError(f"{flag} changed since {path.name}: {self.fingerprints[key][:16]} here, {state[key][:16]} in the checkpoint; "
                                 "give the same data, or start anew in another --run.dir")  # fmt: skip
        mine = self.state()
        wanted = {f"--model.{k}": (v, mine["model"][k]) for k, v in state["model"].items() if k not in ("preset", "recompute")}
        wanted |= {"--train.dtype": (state["dtype"], mine["dtype"]), "--run.seed": (state["seed"], mine["seed"]),
                   "--train.length": (state["length"], mine["length"])}  # fmt: skip
        for flag, (held, given) in wanted.items():
            if held != given:
                raise ValueError(f"{flag} {given}: the checkpoint {path} was made with {held}; give that, or start anew in another --run.dir")
        checkpoint.load_tensors(path / "model.safetensors", self.tensors()["model"])
        checkpoint.load_tensors(path / "optimizer.safetensors", self.tensors()["optimizer"])
        self.progress = Progress(**{f.name: state[f.name] for f in fields(Progress)})


def step(model: Transformer, optimizer: Optimizer, batches: list[Batch], factor: float, seed: int) -> tuple[torch.Tensor, StepResult]:
    """One update from several micro-batches; returns the mean loss over all their counted tokens, and what was done."""
    denominator = sum(batch.counted for batch in batches)
    parts = []
    for batch in batches:
        loss = forward(model, batch, denominator, seed)
        (loss * optimizer.loss_scale).backward()
        if len(batches) > 1:
            optimizer.accumulate()
        parts.append(loss.detach())
    total = torch.stack(parts).sum()
    return total, optimizer.step(factor, total)


def forward(model: Transformer, batch: Batch, denominator: int, seed: int) -> torch.Tensor:
    """Summed loss of a micro-batch over the step's count of tokens."""
    dropout = Dropout(seed, batch.counters_BT) if model.c.dropout or model.c.embedding_dropout else None
    hidden = model(batch.tokens_BT, batch.positions_BT, cu_seqlens=batch.cu_seqlens, dropout=dropout, max_position=batch.max_position)
    return losses.next_token(model.head, hidden, batch.labels_BT, denominator, rows=batch.rows)


def main(argv: list[str]) -> int:
    """Command line of the stage."""
    config, given = configs.parse(Config, argv, command="pretrain")
    return run(config, given)


def run(config: Config, given: frozenset[str] = frozenset()) -> int:
    """Train as configured; `given` are the keys set by the user, which a model preset does not override."""
    model = config.model.resolved(frozenset(k.removeprefix("model.") for k in given if k.startswith("model.")))
    config = replace(config, model=model)
    check(config)
    device = choose_device(config.run.device)
    with Run(config.run.dir, "pretrain") as folder:
        checkpoint.clean(folder.checkpoints)
        existing = checkpoint.directories(folder.checkpoints)
        if existing and config.resume == "none":
            raise ValueError(
                f"--run.dir {folder.path}: holds a run already ({existing[-1].name}); add --resume auto to go on, or choose another folder"
            )
        training = Training(config, device)
        config = training.c
        if not (folder.path / "tokenizer.model").exists():
            shutil.copyfile(training.tokenizer_path, folder.path / "tokenizer.model")
        folder.record(configs.write_toml(replace(config, run=replace(config.run, dir=str(folder.path)))))
        if config.resume == "auto":
            path = checkpoint.latest(folder.checkpoints, lambda line: (folder.say(f"pretrain: {line}"), folder.event("damaged", text=line)))
            if path is not None:
                training.load(path)
                folder.say(f"pretrain: resumed from {path} (step {training.progress.step:,}, {training.progress.cursor:,} rows read)")
                folder.event("resumed", checkpoint=path.name)
            elif existing:
                raise ValueError(
                    f"--resume auto: none of the {len(existing)} checkpoints in {folder.checkpoints} verifies; move them away to start anew"
                )
        folder.open_metrics(training.progress.step)
        return Loop(training, folder).run()


class Loop:
    """The training loop over a `Training`, in a run folder."""

    def __init__(self, training: Training, folder: Run):
        self.t, self.folder, self.c = training, folder, training.c
        self.rows = self.c.train.micro_batch * self.c.train.accumulate
        self.last_saved: int | None = None
        self.step_seconds = 0.0
        self.unlogged_steps, self.unlogged_seconds = 0, 0.0
        self.checkpoint_seconds = 0.0
        self.val: bits_per_byte.Score | None = None

    def run(self) -> int:
        """Train until the budget, a signal or an early stop; returns the exit code."""
        c, t, p = self.c.train, self.t, self.t.progress
        self.announce()
        reason = ""
        first = p.step
        while True:
            p = t.progress
            if self.folder.stop_signal is not None:
                reason = "stopped by a signal"
            elif self.share_done() >= 1:
                reason = "budget used"
            if reason:
                break
            started = time.perf_counter()
            batches = [t.loader.batch(p.cursor + i * c.micro_batch, c.micro_batch) for i in range(c.accumulate)]
            waited = time.perf_counter() - started
            factor = schedule_factor(self.c.optim, self.share_done(ahead=True)) * c.spike_lr**p.rollbacks
            try:
                loss, result = step(t.model, t.optimizer, batches, factor, self.c.run.seed)
            except (MemoryError, RuntimeError) as error:
                if not memory.is_out_of_memory(error):
                    raise
                advice = memory.out_of_memory_advice(t.plan, micro_batch=c.micro_batch, accumulate=c.accumulate, recompute=self.c.model.recompute)
                raise ValueError(f"step {p.step + 1}: {advice}") from None
            p.step += 1
            p.cursor += self.rows
            p.tokens += self.rows * c.length
            logged = p.step % self.c.run.log_every == 0 or p.step == 1
            if logged:
                loss, norm, clipped, skipped = (float(x) for x in (loss, result.grad_norm, result.clipped, result.skipped))
            self.step_seconds = time.perf_counter() - started
            p.seconds += self.step_seconds
            self.unlogged_steps += 1
            self.unlogged_seconds += self.step_seconds
            if logged:
                if self.rolled_back(loss):
                    continue
                p.skipped_in_a_row = p.skipped_in_a_row + 1 if skipped else 0
                self.log(loss, factor, norm, clipped, skipped, waited)
                if skipped:
                    self.folder.event("skipped", step=p.step, loss=repr(loss), grad_norm=repr(norm))
                    if p.skipped_in_a_row >= c.max_skipped:
                        raise ValueError(f"step {p.step}: {p.skipped_in_a_row} non-finite steps in a row; lower --optim.lr and --optim.muon_lr")
                else:
                    self.remember(loss)
            if p.step == first + 1:
                self.folder.say(
                    f"memory: {memory.format_bytes(t.peak.bytes())} at the peak of step {p.step}, {memory.format_bytes(t.plan.total)} planned"
                )
                self.folder.event("memory", measured_bytes=t.peak.bytes(), planned_bytes=t.plan.total)
            reason = self.between_steps()
        return self.finish(reason)

    def share_done(self, ahead: bool = False) -> float:
        """Share of the budget used; with `ahead`, once the coming step is done."""
        c, p = self.c.train, self.t.progress
        if c.steps:
            return (p.step + ahead) / c.steps
        if c.tokens:
            return (p.tokens + ahead * self.rows * c.length) / c.tokens
        return (p.seconds + ahead * self.step_seconds) / c.seconds

    def announce(self) -> None:
        """Before step 0: model, data, batch, memory plan, and what linear scaling would suggest."""
        c, t, say = self.c, self.t, self.folder.say
        count = parameter_count(c.model)
        say(f"pretrain: {c.model.preset}, {count:,} parameters, {c.train.dtype} on {t.device}, run {self.folder.path}")
        say(f"pretrain: {t.shards.tokens:,} training tokens in {t.loader.rows:,} rows of {c.train.length}; {t.val_shards.tokens:,} held out")
        batch = self.rows * c.train.length
        say(f"pretrain: {batch:,} tokens a step ({c.train.micro_batch} rows of {c.train.length}, {c.train.accumulate} times), {c.optim.name}")
        if batch != c.optim.tuned_batch:
            ratio = batch / c.optim.tuned_batch
            say(
                f"pretrain: rates were tuned at {c.optim.tuned_batch:,} tokens a step; the linear scaling rule suggests"
                f" --optim.lr={c.optim.adamw_lr * ratio:.3g} --optim.muon_lr={c.optim.muon_lr * ratio:.3g} --optim.tuned_batch={batch}"
            )
        say(f"memory: {t.plan}")
        if c.run.deterministic and t.device.type == "cuda":
            batch = t.loader.batch(0, c.train.micro_batch)
            cost = make_deterministic(lambda: torch.autograd.grad(forward(t.model, batch, batch.counted, 0), list(t.model.parameters())))
            say(f"pretrain: deterministic kernels take {cost:.2f} times as long as the fastest")
        self.flops_per_token = 6 * count + 6 * c.model.layers * c.model.heads * c.model.head_dim * c.train.length

    def log(self, loss, factor, norm, clipped, skipped, waited) -> None:
        """A row of metrics.jsonl and a line on the console."""
        c, p, t = self.c, self.t.progress, self.t
        tokens = self.rows * c.train.length
        seconds = self.unlogged_seconds / self.unlogged_steps  # a GPU works on after a step that nobody read
        self.unlogged_steps, self.unlogged_seconds = 0, 0.0
        rate = tokens / seconds
        ceiling = peak_flops(t.device)
        row = dict(
            step=p.step, loss=loss, lr=c.optim.adamw_lr * factor, grad_norm=norm, clipped=int(clipped), skipped=int(skipped), tokens=p.tokens,
            tokens_per_s=round(rate, 1), step_s=round(seconds, 6), data_s=round(waited, 6), checkpoint_s=round(self.checkpoint_seconds, 6),
            mfu=round(rate * self.flops_per_token / ceiling, 4) if ceiling else None, peak_memory_bytes=t.peak.bytes(),
            epoch=round(p.cursor / t.loader.rows, 4),
        )  # fmt: skip
        if t.optimizer.dynamic_scale:
            row["loss_scale"] = float(t.optimizer.loss_scale)
        self.checkpoint_seconds = 0.0
        self.folder.metric(row)
        if p.step <= 5 or p.step % max(10, c.run.log_every) == 0 or skipped:
            done = min(1.0, self.share_done())
            left = timedelta(seconds=int(p.seconds / done * (1 - done)) if done else 0)
            note = "  SKIPPED: not finite" if skipped else ""
            mfu = f"  mfu {row['mfu']:.1%}" if ceiling else ""
            self.folder.say(
                f"step {p.step:>6,}  loss {loss:7.4f}  lr {row['lr']:.2e}  norm {norm:6.2f}  {rate:>9,.0f} tok/s{mfu}"
                f"  {memory.format_bytes(row['peak_memory_bytes'])}  {done:4.0%}  eta {left}{note}"
            )

    def rolled_back(self, loss: float) -> bool:
        """Where the loss spiked: back to the last good checkpoint, past the data that led here."""
        c, p = self.c.train, self.t.progress
        if not math.isfinite(loss) or not spiked(p.recent_losses[-WINDOW:], loss, c.spike_sigma):
            return False
        path = checkpoint.latest(self.folder.checkpoints, self.folder.say)
        if path is None:
            self.folder.event("spike", step=p.step, loss=loss, action="none: no checkpoint yet")
            return False
        if p.rollbacks >= c.max_rollbacks:
            raise ValueError(
                f"step {p.step}: loss {loss:.3f} spiked after {p.rollbacks} roll-backs; lower --optim.lr and --optim.muon_lr, then --resume auto"
            )
        at, cursor, rollbacks, seconds, tokens = p.step, p.cursor, p.rollbacks, p.seconds, p.tokens
        self.t.load(path)
        p = self.t.progress
        p.cursor, p.rollbacks, p.seconds, p.tokens = cursor, rollbacks + 1, seconds, tokens
        self.folder.open_metrics(p.step)
        self.folder.say(f"pretrain: loss {loss:.3f} spiked at step {at:,}; rolled back to {path.name}, its data up to row {cursor:,} is skipped")
        self.folder.event("spike", step=at, loss=loss, action=f"rolled back to {path.name}", cursor=cursor)
        return True

    def remember(self, loss: float) -> None:
        """Keep the losses that spikes and plateaus are judged by; report a plateau."""
        n, p = self.c.train.plateau, self.t.progress
        p.recent_losses = [*p.recent_losses, loss][-max(WINDOW, 2 * n) :]
        flat = plateau(p.recent_losses, n) if n and p.step % n == 0 else None
        if flat:
            self.folder.say(f"pretrain: plateau at step {p.step:,}: mean loss {flat[1]:.4f}, {flat[0]:.4f} over the {n} steps before")
            self.folder.event("plateau", step=p.step, before=flat[0], after=flat[1])

    def between_steps(self) -> str:
        """Validation, samples and checkpoints that are due; returns why to stop, or nothing."""
        c, p = self.c, self.t.progress
        if c.train.val_every and p.step % c.train.val_every == 0 and self.share_done() < 1:
            self.validate(c.train.val_tokens)
        if c.train.sample_every and p.step % c.train.sample_every == 0:
            self.folder.say(f"sample: {self.sample(c.train.sample_prompt)!r}")
        if c.checkpoint.every and p.step % c.checkpoint.every == 0:
            self.save()
        if c.train.early_stop and p.validations_since_best >= c.train.early_stop:
            return f"no better validation in {p.validations_since_best}"
        return ""

    def validate(self, max_tokens: int) -> None:
        """Score held-out documents; a row of metrics.jsonl."""
        c, t, p = self.c.train, self.t, self.t.progress
        started = time.perf_counter()
        stop = (lambda: self.folder.stop_signal is not None) if max_tokens else (lambda: False)
        score = bits_per_byte.score(
            t.model, t.val_shards, length=c.length, stride=c.val_stride or max(1, c.length // 2), device=t.device, max_tokens=max_tokens, stop=stop
        )
        if score is None:
            return
        self.val = score
        seconds = time.perf_counter() - started
        if max_tokens or p.best_bpb is None:  # the last validation scores more documents: no comparison with the others
            better = p.best_bpb is None or score.bits_per_byte < p.best_bpb
            p.best_bpb = score.bits_per_byte if better else p.best_bpb
            p.validations_since_best = 0 if better else p.validations_since_best + 1
        row = dict(
            step=p.step,
            val_loss=score.nats_per_token,
            val_bpb=score.bits_per_byte,
            val_tokens=score.tokens,
            val_documents=score.documents,
            val_s=round(seconds, 3),
        )
        self.folder.metric(row)
        self.folder.say(f"step {p.step:>6,}  validation: {score.nats_per_token:.4f} nats per token, {score.bits_per_byte:.4f} bits per byte"
                        f" ({score.documents} documents, {seconds:.1f} s)")  # fmt: skip

    def sample(self, prompt: str, tokens: int = 64) -> str:
        """A continuation of `prompt`."""
        t = self.t.tokenizer
        ids = [t.bos, *t.encode(prompt)]
        return t.decode([*ids, *generate(self.t.model, ids, SamplingConfig(max_tokens=tokens), stop=frozenset([t.eos]))])

    def save(self) -> None:
        """Write a checkpoint, then drop those no longer to be kept."""
        p = self.t.progress
        if self.last_saved == p.step:
            return
        started = time.perf_counter()
        path = checkpoint.save(self.folder.checkpoints, p.step, self.t.tensors(), self.t.state())
        self.last_saved = p.step
        removed = [r.name for r in checkpoint.retain(self.folder.checkpoints, self.c.checkpoint.keep)]
        self.checkpoint_seconds += time.perf_counter() - started
        self.folder.event("checkpoint", step=p.step, seconds=round(time.perf_counter() - started, 4), removed=removed)
        self.folder.say(f"step {p.step:>6,}  checkpoint: {path}")

    def finish(self, reason: str) -> int:
        """The last validation and checkpoint, and a summary."""
        p = self.t.progress
        stopped = self.folder.stop_signal is not None
        self.val = None  # a validation on the way scored only a part: it is no result
        if not stopped:
            self.validate(0)
        self.save()
        summary = dict(
            reason=reason, step=p.step, tokens=p.tokens, seconds=round(p.seconds, 3), rows_read=p.cursor, peak_memory_bytes=self.t.peak.bytes(),
            val_loss=self.val.nats_per_token if self.val else None, val_bpb=self.val.bits_per_byte if self.val else None,
            state_sha256=checkpoint.fingerprint(self.t.tensors(), {"cursor": p.cursor, "step": p.step, "tokens": p.tokens}),
        )  # fmt: skip
        self.folder.event("end", **summary)
        (self.folder.path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        self.folder.say(f"pretrain: {reason} at step {p.step:,}: {p.tokens:,} tokens in {p.seconds:.1f} s; state {summary['state_sha256'][:16]}")
        return 0
