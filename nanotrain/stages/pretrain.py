"""pretrain: train a language model to predict the next token.

nanotrain pretrain --data.dir=data/python --train.steps=1000 --run.dir=runs/first
nanotrain pretrain --data.dir=data/python --train.steps=1000 --run.dir=runs/first --resume auto
nanotrain pretrain --data.dir=data/python --train.seconds=300 --model.preset=nano --checkpoint.every=500
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from nanotrain import checkpoint, losses, memory
from nanotrain import config as configs
from nanotrain.checkpoint import CheckpointConfig
from nanotrain.console import step_line
from nanotrain.data.loader import Batch, Loader
from nanotrain.data.shards import TokenShards, file_sha256
from nanotrain.environment import peak_flops
from nanotrain.eval import bits_per_byte
from nanotrain.files import replace_file
from nanotrain.gpu import GpuWatch
from nanotrain.graphs import CapturedStep
from nanotrain.model.build import build_model, parameter_count
from nanotrain.model.generate import generate
from nanotrain.model.sampling import SamplingConfig
from nanotrain.model.transformer import Dropout, ModelConfig, Transformer
from nanotrain.optim import OptimConfig, Optimizer, StepResult, check_optim, schedule_factor
from nanotrain.run import Run, RunConfig, choose_device
from nanotrain.session import Progress, Session
from nanotrain.stability import WINDOW, make_deterministic, reserve_workspace, sampled, spiked, update_ratios
from nanotrain.tokenizer import Tokenizer
from nanotrain.trackers import LogConfig, check_trackers, open_trackers


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
    micro_batch: int = 8
    """Size of a forward and backward [rows]."""
    accumulate: int = 1
    """Gradients summed for a step [micro-batches]."""
    length: int = 256
    """Length of a row [tokens]."""
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    """Parameters and activations; fp32 masters are kept for the narrow ones, and float16 scales its loss dynamically."""
    val_every: int = 250
    """Between validations [steps]; 0 validates only at the end."""
    val_tokens: int = 50_000
    """Whole held-out documents scored on the way [tokens]; 0 is all of them, as at the end."""
    val_stride: int = 0
    """How far a validation window moves on [tokens]; 0 is half of length."""
    sample_every: int = 0
    """Between samples written to the log [steps]; 0 is none."""
    sample_prompt: str = "def "
    """What samples write on from."""
    ratios_every: int = 50
    """Between measurements of each parameter's |update| / |weight| for metrics.jsonl, the first step's besides [steps]; 0 never."""
    early_stop: int = 0
    """Stop after so many without a new best [validations]; 0 never."""
    plateau: int = 0
    """Report a plateau where the mean loss of so many is less than 0.5% below that of the ones before [steps]; 0 never."""
    spike_sigma: float = 6.0
    """A loss so far over the mean of the last 128 rolls back to the last checkpoint and skips its data [standard deviations]; 0 never."""
    spike_lr: float = 1.0
    """On the rate, after each roll-back [factor]."""
    max_rollbacks: int = 3
    """Before giving up [roll-backs]."""
    max_skipped: int = 50
    """Not finite in a row, before giving up [steps]."""
    cuda_graph: bool = False
    """Submit a step to the GPU as one captured graph, which spares the host its launches; head dims up to 256."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is split over processes."""

    dp: int = 1
    """Data-parallel size [processes]; this version trains on one."""


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
    log: LogConfig = field(default_factory=LogConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def check(c: Config) -> None:
    """Every check that needs no device: ValueError naming the flag."""
    t = c.train
    if sum(x > 0 for x in (t.steps, t.tokens, t.seconds)) != 1 or min(t.steps, t.tokens, t.seconds) < 0:
        raise ValueError("--train.steps, --train.tokens, --train.seconds: set exactly one of them, above 0")
    configs.at_least(t, "train", 1, "micro_batch", "accumulate", "length", "max_skipped")
    configs.at_least(t, "train", 0, "val_every", "val_tokens", "sample_every", "ratios_every", "early_stop", "plateau")
    configs.at_least(t, "train", 0, "spike_sigma", "spike_lr", "max_rollbacks")
    configs.at_least(c.checkpoint, "checkpoint", 0, "every")
    configs.at_least(c.checkpoint, "checkpoint", 1, "keep")
    configs.at_least(c.run, "run", 1, "log_every")
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
    if t.cuda_graph and c.model.head_dim > 256:
        raise ValueError(f"--train.cuda_graph: attention with --model.head_dim {c.model.head_dim}, over 256, waits for the host; leave the graph off")
    if t.early_stop and not t.val_every:
        raise ValueError(f"--train.early_stop {t.early_stop}: counts validations; set --train.val_every too")
    check_optim(c.optim, c.train.dtype)
    check_trackers(c.log)


class Training:
    """Everything a run is made of, built from its config."""

    def __init__(self, c: Config, device: torch.device, folder: Run):
        self.device, self.folder = device, folder
        self.shards = TokenShards(c.data.dir, "train", verify=c.data.verify)
        self.val_shards = TokenShards(c.data.dir, "val", verify=c.data.verify)
        fingerprints = {k: self.shards.index[k] for k in ("tokenizer_sha256", "data_sha256")}
        self.tokenizer_path = Path(c.data.dir) / "tokenizer.model"
        if not self.tokenizer_path.is_file() or file_sha256(self.tokenizer_path) != fingerprints["tokenizer_sha256"]:
            raise ValueError(f"{self.tokenizer_path}: missing or not the tokenizer the shards were made with; run nanotrain prepare again")
        self.tokenizer = Tokenizer.load(self.tokenizer_path)
        if not c.model.vocab_size:
            c = replace(c, model=replace(c.model, vocab_size=self.shards.vocab_size))
        if c.model.vocab_size < self.shards.vocab_size:
            raise ValueError(f"--model.vocab_size {c.model.vocab_size}: the tokenizer of {c.data.dir} has {self.shards.vocab_size} tokens")
        prompt = 1 + len(self.tokenizer.encode(c.train.sample_prompt))
        if c.train.sample_every and c.model.positions == "learned" and prompt >= c.model.context:
            raise ValueError(f"--train.sample_prompt: its {prompt} tokens leave no room in --model.context {c.model.context}; shorten it")
        self.c = c
        self.loader = Loader(self.shards, length=c.train.length, seed=c.run.seed, device=device)
        dtype = getattr(torch, c.train.dtype)
        self.plan = memory.plan(
            c.model, c.optim, dtype=dtype, length=c.train.length, rows=c.train.micro_batch, accumulate=c.train.accumulate, device=device
        )
        self.parameters = parameter_count(c.model)
        self.announce()
        self.peak = memory.PeakMemory(device)
        if device.type == "cpu":
            memory.keep_freed_memory()
        self.model = build_model(c.model, seed=c.run.seed, dtype=dtype, device=device)
        self.optimizer = Optimizer(self.model, c.optim, c.run.seed)
        facts = dict(model=asdict(c.model), dtype=c.train.dtype, seed=c.run.seed, length=c.train.length, **fingerprints)
        self.session = Session(folder, self.model, self.optimizer, facts, c.checkpoint.keep)
        self.gpu = GpuWatch(device)
        self.step = lambda batches, factor: step(self.model, self.optimizer, batches, factor, c.run.seed)
        if c.train.cuda_graph:
            self.optimizer.keep_gradients = True
            self.step = CapturedStep(self.step, lambda: self.model.rotary_tables(c.train.length, device))

    def announce(self) -> None:
        """Before anything large is made: model, data, batch, what linear scaling would suggest, and the memory plan."""
        c, say = self.c, self.folder.say
        say(f"pretrain: {c.model.preset}, {self.parameters:,} parameters, {c.train.dtype} on {self.device}, run {self.folder.path}")
        say(f"pretrain: {self.shards.tokens:,} training tokens in {self.loader.rows:,} rows of {c.train.length}; {self.val_shards.tokens:,} held out")
        batch = c.train.micro_batch * c.train.accumulate * c.train.length
        say(f"pretrain: {batch:,} tokens a step ({c.train.micro_batch} rows of {c.train.length}, {c.train.accumulate} times), {c.optim.name}")
        if batch != c.optim.tuned_batch:
            ratio = batch / c.optim.tuned_batch
            rates = dict(lr=c.optim.peak_lr, embedding_lr=c.optim.peak_embedding_lr, muon_lr=c.optim.muon_lr)
            say(f"pretrain: rates were tuned at {c.optim.tuned_batch:,} tokens a step; the linear scaling rule suggests"
                f" {' '.join(f'--optim.{n}={rate * ratio:.3g}' for n, rate in rates.items())} --optim.tuned_batch={batch}")  # fmt: skip
        say(f"memory: {self.plan}")
        if self.plan.total > self.plan.available:
            say(f"memory: this may not fit; next: {smaller(c)}")

    def facts(self) -> dict[str, Any]:
        """What the run starts from: model, budget, data, and the memory plan in bytes."""
        c, data, held_out, plan = self.c, self.shards, self.val_shards, self.plan
        sizes = {name: getattr(plan, name) for name in ("parameters", "gradients", "optimizer", "workspace", "total", "available")}
        return dict(
            preset=c.model.preset, parameters=self.parameters, dtype=c.train.dtype, device=str(self.device),
            budget={name: value for name in ("steps", "tokens", "seconds") if (value := getattr(c.train, name))},
            train_tokens=data.tokens, train_rows=self.loader.rows, val_tokens=held_out.tokens, val_documents=len(held_out.document_starts),
            val_bytes=held_out.bytes, vocab_size=data.vocab_size, source=data.index["facts"],
            **{name: data.index[name] for name in ("tokenizer_sha256", "data_sha256")},
            plan=sizes | {"activations": plan.rows * plan.activations_per_row},
        )  # fmt: skip


def step(
    model: Transformer, optimizer: Optimizer, batches: list[Batch], factor: float | torch.Tensor, seed: int
) -> tuple[torch.Tensor, StepResult]:  # fmt: skip
    """One update from several micro-batches; returns the mean loss over all their counted tokens, and what was done."""
    denominator = sum(batch.counted for batch in batches)  # on the host, or on the device where the step is captured
    parts = []
    for batch in batches:
        loss = forward(model, batch, denominator, seed, optimizer.loss_scale)
        loss.backward()
        if len(batches) > 1:
            optimizer.accumulate()
        parts.append(loss.detach())
    total = torch.stack(parts).sum() / optimizer.loss_scale
    return total, optimizer.step(factor, total)


def forward(model: Transformer, batch: Batch, denominator: int | torch.Tensor, seed: int, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Summed loss of a micro-batch over the step's count of tokens, times `scale`."""
    dropout = Dropout(seed, batch.counters_BT) if model.c.dropout or model.c.embedding_dropout else None
    documents = dict(cu_seqlens=batch.cu_seqlens, lengths=batch.lengths)
    hidden = model(batch.tokens_BT, batch.positions_BT, **documents, dropout=dropout, max_position=batch.max_position)
    return losses.next_token(model.head, hidden, batch.labels_BT, denominator, rows=batch.rows, scale=scale)


def smaller(c: Config) -> str:
    """The rungs of the memory ladder below this config, with their flags."""
    t = c.train
    return memory.ladder(micro_batch=t.micro_batch, accumulate=t.accumulate, recompute=c.model.recompute, optim=c.optim, dtype=t.dtype)


def main(argv: list[str]) -> int:
    """Command line of the stage."""
    config, given = configs.parse(Config, argv, command="pretrain")
    return run(resolve(config, given))


def resolve(config: Config, given: frozenset[str]) -> Config:
    """The config with its preset's values in all keys but those `given`, checked as far as it can be without data or device."""
    model = config.model.resolved(frozenset(k.removeprefix("model.") for k in given if k.startswith("model.")))
    config = replace(config, model=model)
    check(config)
    return config


def run(config: Config) -> int:
    """Train as configured by a resolved config."""
    device = choose_device(config.run.device)
    if config.train.cuda_graph and device.type != "cuda":
        raise ValueError(f"--train.cuda_graph: there is no graph of a step on {device}; leave it off")
    if config.run.deterministic:
        reserve_workspace()
    with Run(config.run.dir, "pretrain") as folder:
        checkpoint.clean(folder.checkpoints)
        existing = checkpoint.directories(folder.checkpoints)
        if existing and config.resume == "none":
            raise ValueError(
                f"--run.dir {folder.path}: holds a run already ({existing[-1].name}); add --resume auto to go on, or choose another folder"
            )
        try:
            training = Training(config, device, folder)
            if config.resume == "auto":
                training.session.resume()
            replace_file(folder.path / "tokenizer.model", training.tokenizer.model)
            folder.record(configs.write_toml(replace(training.c, run=replace(config.run, dir=str(folder.path)))))
            progress = training.session.progress
            folder.open_metrics(progress.step, progress.val_bpb is not None)
            folder.event("start", step=progress.step, **training.facts())
            folder.trackers = open_trackers(config.log, folder.path, configs.flatten(training.c), progress.step)
            return Loop(training).run()
        except (MemoryError, RuntimeError) as error:
            if not memory.is_out_of_memory(error):
                raise
            raise ValueError(f"out of memory; next: {smaller(config)}") from None


@dataclass
class Pending:
    """A step that the host has not read yet."""

    step: int
    cursor: int
    tokens: int
    factor: float
    waited: float
    """For data [s]."""
    results: torch.Tensor
    """Loss, gradient norm, whether clipped, whether skipped, loss scale."""
    ratios: torch.Tensor | None
    """Of update to weight, a number per parameter, where they were measured."""


class Loop:
    """The training loop over a `Training`."""

    def __init__(self, training: Training):
        self.t, self.folder, self.c = training, training.folder, training.c
        self.rows = self.c.train.micro_batch * self.c.train.accumulate
        self.pending: list[Pending] = []
        self.row: dict[str, Any] | None = None
        """The newest that was logged."""
        self.step_seconds = 0.0
        self.pending_seconds = 0.0

    @property
    def progress(self) -> Progress:
        """What the run has done; a roll-back replaces it."""
        return self.t.session.progress

    def run(self) -> int:
        """Train until the budget, a signal or an early stop; returns the exit code."""
        if self.c.run.deterministic and self.t.device.type == "cuda":
            batch = self.t.loader.batch(0, self.c.train.micro_batch)
            cost = make_deterministic(lambda: torch.autograd.grad(forward(self.t.model, batch, batch.counted, 0), list(self.t.model.parameters())))
            self.folder.say(f"pretrain: deterministic kernels take {cost:.2f} times as long as the fastest")
        first = self.progress.step + 1
        while True:
            self.between_steps()
            reason = self.reason_to_stop()
            if reason:
                if self.look():
                    continue  # the last steps were rolled back
                return self.finish(reason)
            self.train_step()
            if figures := self.t.gpu.read():
                self.folder.metric({"step": self.progress.step} | figures)
            if self.progress.step == first or self.progress.step % self.c.run.log_every == 0:
                self.look()
            self.folder.show(self.share_done(), self.seconds_left(), self.row)
            if self.progress.step == first:
                measured, planned = self.t.peak.bytes(), self.t.plan.total
                self.folder.say(f"memory: {memory.format_bytes(measured)} at the peak of step {first}, {memory.format_bytes(planned)} planned")
                self.folder.event("memory", measured_bytes=measured, planned_bytes=planned)

    def train_step(self) -> None:
        """Load, step, and count; what the step did stays on the device until `look`."""
        c, t, p = self.c.train, self.t, self.progress
        started = time.perf_counter()
        batches = [t.loader.batch(p.cursor + i * c.micro_batch, c.micro_batch) for i in range(c.accumulate)]
        waited = time.perf_counter() - started
        factor = schedule_factor(self.c.optim, self.share_done(ahead=True)) * c.spike_lr**p.rollbacks
        scale = t.optimizer.loss_scale.clone()
        weights = t.optimizer.params | t.optimizer.masters
        before = sampled(weights) if c.ratios_every and (p.step == 0 or (p.step + 1) % c.ratios_every == 0) else None
        loss, result = t.step(batches, factor)
        p.step += 1
        p.cursor += self.rows
        p.tokens += self.rows * c.length
        p.val_bpb = None
        results = torch.stack([x.double() for x in (loss, result.grad_norm, result.clipped, result.skipped, scale)])
        ratios = update_ratios(before, weights) if before else None
        self.pending.append(Pending(p.step, p.cursor, p.tokens, factor, waited, results, ratios))
        self.step_seconds = time.perf_counter() - started
        p.seconds += self.step_seconds
        self.pending_seconds += self.step_seconds

    def share_done(self, ahead: bool = False) -> float:
        """Share of the budget used; with `ahead`, once the coming step is done."""
        c, p = self.c.train, self.progress
        if c.steps:
            return (p.step + ahead) / c.steps
        if c.tokens:
            return (p.tokens + ahead * self.rows * c.length) / c.tokens
        return (p.seconds + ahead * (self.step_seconds or 1e-3 * c.seconds)) / c.seconds

    def seconds_left(self) -> float:
        """What the rest of the budget takes, at the pace so far."""
        share = min(1.0, self.share_done())
        return self.progress.seconds / share * (1 - share) if share else 0.0

    def reason_to_stop(self) -> str:
        """Why to end here, or nothing."""
        c, p = self.c.train, self.progress
        if self.folder.stop_signal is not None:
            return "stopped by a signal"
        if c.early_stop and p.validations_since_best >= c.early_stop:
            return f"no better validation in {p.validations_since_best}"
        return "budget used" if self.share_done() >= 1 else ""

    def look(self) -> bool:
        """Read what the steps since the last look did, which waits for the device: rows of metrics and alarms.

        True where a loss had spiked and the run was rolled back.
        """
        c, started = self.c.train, time.perf_counter()
        values = torch.stack([pending.results for pending in self.pending]).tolist() if self.pending else []
        waited = time.perf_counter() - started
        self.progress.seconds += waited
        seconds = (self.pending_seconds + waited) / max(1, len(values))
        pending, self.pending, self.pending_seconds = self.pending, [], 0.0
        for done, (loss, norm, clipped, skipped, scale) in zip(pending, values, strict=True):
            p = self.progress
            if math.isfinite(loss) and spiked(p.recent_losses[-WINDOW:], loss, c.spike_sigma):
                if self.t.session.roll_back(loss, done.step, done.cursor, c.max_rollbacks):
                    return True
            self.log(done, loss, norm, bool(clipped), bool(skipped), scale, seconds, last=done is pending[-1])
            p.skipped_in_a_row = p.skipped_in_a_row + 1 if skipped else 0
            if not skipped:
                self.t.session.remember(done.step, loss, c.plateau)
            elif p.skipped_in_a_row >= c.max_skipped:
                raise ValueError(f"step {done.step}: {p.skipped_in_a_row} non-finite steps in a row; lower --optim.lr and --optim.muon_lr")
        return False

    def log(self, done: Pending, loss: float, norm: float, clipped: bool, skipped: bool, scale: float, seconds: float, last: bool) -> None:
        """A step's row of metrics.jsonl; a line on the console for the `last` of a look and for one that was skipped."""
        c, t = self.c, self.t
        rate = self.rows * c.train.length / seconds
        model, ceiling = c.model, peak_flops(t.device)
        flops = 6 * t.parameters + 6 * model.layers * model.heads * model.head_dim * c.train.length
        row = dict(
            step=done.step, loss=loss, lr=c.optim.peak_lr * done.factor, grad_norm=norm, clipped=int(clipped), skipped=int(skipped),
            tokens=done.tokens, tokens_per_s=round(rate, 1), step_s=round(seconds, 6), data_s=round(done.waited, 6),
            checkpoint_s=round(t.session.seconds, 6), mfu=round(rate * flops / ceiling, 4) if ceiling else None,
            peak_memory_bytes=t.peak.bytes(), epoch=round(done.cursor / t.loader.rows, 4),
        )  # fmt: skip
        if t.optimizer.dynamic_scale:
            row["loss_scale"] = scale
        if done.ratios is not None:
            row["update_ratio"] = dict(zip(t.optimizer.params, done.ratios.tolist(), strict=True))
        t.session.seconds = 0.0
        self.row = row
        self.folder.metric(row)
        if skipped:
            self.folder.event("skipped", step=done.step, loss=repr(loss), grad_norm=repr(norm))
        if last or skipped:
            self.folder.say(step_line(row, share=min(1.0, self.share_done()), left=self.seconds_left(), gpu=t.gpu.latest))

    def between_steps(self) -> None:
        """The validation, sample and checkpoint that are due after the last step, if they were not done before a resume."""
        c, p = self.c, self.progress
        validate, sample, save = (n and p.step % n == 0 for n in (c.train.val_every, c.train.sample_every, c.checkpoint.every))
        if not p.step or not (validate or sample or save):
            return
        if self.look():
            return
        if p.served != p.step:
            if validate and self.share_done() < 1 and not self.validate():
                return  # stopped by a signal; it is made up for after --resume auto
            if sample:
                self.folder.sample(p.step, c.train.sample_prompt, self.sample(c.train.sample_prompt))
            p.served = p.step
        if save:
            self.t.session.save()

    def validate(self) -> bool:
        """A validation on the way; False where a signal ended it."""
        p = self.progress
        score = self.score(self.c.train.val_tokens)
        if score is None:
            return False
        p.val_bpb = score.bits_per_byte
        if p.best_bpb is None or p.val_bpb < p.best_bpb:
            p.best_bpb, p.validations_since_best = p.val_bpb, 0
        else:
            p.validations_since_best += 1
        return True

    def score(self, max_tokens: int) -> bits_per_byte.Score | None:
        """Score held-out documents, all where `max_tokens` is 0; a row of metrics.jsonl, or None where a signal ended it."""
        c, t, started = self.c.train, self.t, time.perf_counter()
        score = bits_per_byte.score(
            t.model, t.val_shards, length=c.length, stride=c.val_stride or max(1, c.length // 2), device=t.device, max_tokens=max_tokens,
            stop=lambda: self.folder.stop_signal is not None,
        )  # fmt: skip
        if score is not None:
            seconds, step = time.perf_counter() - started, self.progress.step
            self.folder.metric(dict(step=step, val_loss=score.nats_per_token, val_bpb=score.bits_per_byte, val_tokens=score.tokens,
                                    val_documents=score.documents, val_s=round(seconds, 3)))  # fmt: skip
            self.folder.say(f"step {step:>9,}  validation: {score.nats_per_token:.4f} nats per token, {score.bits_per_byte:.4f} bits per byte"
                            f" ({score.documents} documents, {seconds:.1f} s)")  # fmt: skip
        return score

    def sample(self, prompt: str, tokens: int = 64) -> str:
        """A continuation of `prompt`."""
        t = self.t.tokenizer
        ids = [t.bos, *t.encode(prompt)]
        return prompt + generate(self.t.model, [ids], SamplingConfig(max_tokens=tokens), stop=t.stop_ids, tokenizer=t)[0].text

    def finish(self, reason: str) -> int:
        """The last checkpoint, the validation of all held-out documents (unless a signal hurries), and a summary."""
        self.t.session.save()
        p = self.progress
        score = self.score(0) if self.folder.stop_signal is None else None
        summary = dict(
            reason=reason, step=p.step, tokens=p.tokens, seconds=round(p.seconds, 3), rows_read=p.cursor, peak_memory_bytes=self.t.peak.bytes(),
            val_loss=score.nats_per_token if score else None, val_bpb=score.bits_per_byte if score else None,
            state_sha256=self.t.session.fingerprint(),
        )  # fmt: skip
        self.folder.event("end", **summary)
        replace_file(self.folder.path / "summary.json", json.dumps(summary, indent=1) + "\n")
        self.folder.say(f"pretrain: {reason} at step {p.step:,}: {p.tokens:,} tokens in {p.seconds:.1f} s; state {summary['state_sha256'][:16]}")
        return 0
