"""python -m benchmarks.train_cpu: a training step on a CPU against a plain PyTorch loop of the same model.

The plain loop (benchmarks/plain.py) is what one writes in an hour, with torch's fused AdamW, in a process of its own: what the engine
does to its process (memory kept between steps) is part of it. Steps of both take turns.
Also: what the engine around the step costs (loader, logging, bookkeeping), and how much faster the loader is than the model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import replace

import torch

from benchmarks.common import interleaved, ratio, write_rows
from benchmarks.plain import PlainLoop
from nanotrain import quickstart
from nanotrain.data.loader import Loader
from nanotrain.data.shards import TokenShards
from nanotrain.model.build import build_model
from nanotrain.model.transformer import ModelConfig
from nanotrain.optim import OptimConfig, Optimizer
from nanotrain.run import Run
from nanotrain.stages import pretrain
from nanotrain.stages.pretrain import Config, DataConfig, Loop, Training, step


class Ours:
    """The engine's own step with its loader."""

    def __init__(self, training: Training, dtype: torch.dtype, optimizer: str):
        c = training.c
        self.model = build_model(c.model, seed=0, dtype=dtype, device="cpu")
        self.optimizer = Optimizer(self.model, OptimConfig(name=optimizer, lr=1e-4))
        self.loader, self.rows, self.cursor = training.loader, c.train.micro_batch, 0

    def step(self):
        batch = self.loader.batch(self.cursor, self.rows)
        self.cursor += self.rows
        return float(step(self.model, self.optimizer, [batch], 1.0, 0)[0])


def serve(pipe, data: str, dtype: torch.dtype) -> None:
    """The plain loop's process: a step, and its loss back, for every message until an empty one."""
    c, shards = quickstart.Config(), TokenShards(data, "train", verify=False)
    model = build_model(replace(c.model.resolved(), vocab_size=shards.vocab_size), seed=0, dtype=dtype, device="cpu")
    loop = PlainLoop(model, dtype, Loader(shards, length=c.train.length, seed=0, device=torch.device("cpu")), c.train.micro_batch)
    while pipe.recv():
        pipe.send(loop.step())


class Plain:
    """A step of the plain loop, at a call."""

    def __init__(self, data: str, dtype: torch.dtype):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, data, dtype), daemon=True)
        self.process.start()

    def step(self) -> float:
        self.pipe.send(True)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(False)
        self.process.join()


def main() -> None:
    """Measure, print, and write results/cpu/train_cpu.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/python", help="data directory made by nanotrain prepare")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    train = replace(quickstart.Config().train, steps=4 * arguments.rounds, val_every=0)
    config = Config(model=ModelConfig().resolved(), data=DataConfig(dir=arguments.data), train=train)
    with tempfile.TemporaryDirectory() as directory, Run(f"{directory}/run", "benchmark") as folder:
        compare(Training(config, torch.device("cpu"), folder), arguments.rounds)
    with tempfile.TemporaryDirectory() as directory, Run(f"{directory}/run", "benchmark") as folder:
        row = engine(Training(config, torch.device("cpu"), folder))
    print(f"wrote {write_rows('engine_cpu', [row])}")


def compare(training: Training, rounds: int) -> None:
    """Steps of the plain loop and of ours in turns, in bf16 and fp32."""
    c = training.c
    tokens = c.train.micro_batch * c.train.length
    rows = []
    print(
        f"{c.model.preset}, {c.train.micro_batch} x {c.train.length} tokens a step, {torch.get_num_threads()} threads;"
        f" medians of {rounds} interleaved steps"
    )
    for dtype in (torch.bfloat16, torch.float32):
        plain, ours, muon = (
            Plain(c.data.dir, dtype),
            Ours(training, dtype, "adamw"),
            Ours(training, dtype, "muon"),
        )
        first = (plain.step(), ours.step())
        if abs(first[0] - first[1]) > 0.02 * first[0]:
            raise SystemExit(f"the two loops differ: first losses {first}; nothing is reported")
        times = interleaved({"plain": plain.step, "ours": ours.step, "ours, muon": muon.step}, rounds)
        plain.close()
        rate = {n: tokens / statistics.median(t) for n, t in times.items()}
        row = dict(dtype=str(dtype).removeprefix("torch."), plain_tokens_per_s=round(rate["plain"]), ours_tokens_per_s=round(rate["ours"]),
                   ratio=round(ratio(times, "ours", "plain"), 3), ours_muon_tokens_per_s=round(rate["ours, muon"]))  # fmt: skip
        rows.append(row)
        print(
            f"  {row['dtype']:9} plain loop {rate['plain']:8,.0f} tok/s   ours, AdamW {rate['ours']:8,.0f} tok/s   ratio {row['ratio']:.2f}"
            f"   ours, Muon {rate['ours, muon']:8,.0f} tok/s"
        )
    print(f"wrote {write_rows('train_cpu', rows)}")


def engine(training: Training) -> dict:
    """Share of a step that is not the step itself, from a run of the loop as a user has it, console and log.txt included."""
    spent = {"step": 0.0, "log": 0.0, "data": 0.0}

    def timed(name, function):
        def call(*arguments, **options):
            started = time.perf_counter()
            result = function(*arguments, **options)
            spent[name] += time.perf_counter() - started
            return result

        return call

    training.folder.open_metrics(0)
    loop = Loop(training)
    loop.log, loop.finish, training.loader.batch = timed("log", loop.log), lambda reason: 0, timed("data", training.loader.batch)
    pretrain.step = timed("step", step)
    started = time.perf_counter()
    try:
        loop.run()
    finally:
        pretrain.step = step
    total = time.perf_counter() - started
    tokens, waited = loop.progress.tokens, spent["data"]
    row = dict(
        steps=loop.progress.step, overhead_percent=round(100 * (total - spent["step"]) / total, 2),
        logging_percent=round(100 * spent["log"] / total, 3),
        data_wait_percent=round(100 * waited / total, 3), loader_over_model=round((tokens / waited) / (tokens / spent["step"]), 1),
        loader_tokens_per_s=round(tokens / waited),
    )  # fmt: skip
    print(f"  engine: {row['overhead_percent']}% of a step is not the step; logging {row['logging_percent']}%, data wait {row['data_wait_percent']}%,"
          f" the loader gives {row['loader_over_model']}x what the model takes")  # fmt: skip
    return row


if __name__ == "__main__":
    main()
