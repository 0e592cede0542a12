"""python -m benchmarks.head_cpu: a training step with a vocabulary of 151,936 on a CPU, against one that holds its logits.

The model is a small one (256 wide, 2 layers), so that the head is most of the step; the other loop is benchmarks/plain.py, cross-entropy on
logits. Each lives in a process of its own, whose peak memory beyond what it had before it built its model is what is compared; their steps
take turns. First losses must agree.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics

import torch

from benchmarks.common import interleaved, ratio, write_rows
from benchmarks.plain import PlainLoop
from nanotrain.data.loader import Batch
from nanotrain.memory import PeakMemory, format_bytes, keep_freed_memory
from nanotrain.model.build import build_model
from nanotrain.model.transformer import ModelConfig
from nanotrain.optim import OptimConfig, Optimizer
from nanotrain.stages.pretrain import step

VOCABULARY, ROWS, LENGTH = 151_936, 4, 512


class Tokens:
    """A loader of random tokens; a row is a document."""

    length = LENGTH

    def batch(self, cursor: int, rows: int) -> Batch:
        generator = torch.Generator().manual_seed(cursor)
        tokens = torch.randint(VOCABULARY, (1, rows * LENGTH + 1), generator=generator)
        positions = torch.arange(LENGTH).repeat(rows)[None]
        offsets = torch.arange(0, rows * LENGTH + 1, LENGTH, dtype=torch.int32)
        return Batch(tokens[:, :-1], tokens[:, 1:], positions, offsets, positions, None, rows * LENGTH, LENGTH, (LENGTH,) * rows)


def serve(pipe, who: str, dtype: torch.dtype) -> None:
    """A step, and its loss back, for every message until an empty one; then the peak memory [bytes]."""
    peak = PeakMemory(torch.device("cpu"))
    c = ModelConfig(width=256, layers=2, heads=4, vocab_size=VOCABULARY, context=LENGTH).resolved(frozenset(ModelConfig.__dataclass_fields__))
    loader, rows = Tokens(), ROWS
    if who == "ours":
        keep_freed_memory()
        model = build_model(c, seed=0, dtype=dtype, device="cpu")
        optimizer, cursor = Optimizer(model, OptimConfig(name="adamw", lr=1e-4)), 0
    else:
        loop = PlainLoop(build_model(c, seed=0, dtype=dtype, device="cpu"), dtype, loader, rows)
    while pipe.recv():
        if who == "ours":
            loss = float(step(model, optimizer, [loader.batch(cursor, rows)], 1.0, 0)[0])
            cursor += rows
        else:
            loss = loop.step()
        pipe.send(loss)
    pipe.send(peak.bytes())


class Contestant:
    """One loop in its own process."""

    def __init__(self, who: str, dtype: torch.dtype):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, who, dtype), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is seen

    def step(self) -> float:
        self.pipe.send(True)
        return self.pipe.recv()

    def close(self) -> int:
        """Its peak memory [bytes]."""
        self.pipe.send(False)
        peak = self.pipe.recv()
        self.process.join()
        return peak


def main() -> None:
    """Measure, print, and write results/cpu/head_cpu.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    rows = []
    print(f"{VOCABULARY:,} tokens, {ROWS} x {LENGTH} a step, {torch.get_num_threads()} threads; medians of {arguments.rounds} interleaved steps")
    for dtype in (torch.bfloat16, torch.float32):
        ours, plain = Contestant("ours", dtype), Contestant("plain", dtype)
        first = ours.step(), plain.step()
        if not abs(first[0] - first[1]) <= 0.01 * first[1]:
            raise SystemExit(f"the two loops differ: first losses {first}; nothing is reported")
        times = interleaved({"ours": ours.step, "plain": plain.step}, arguments.rounds, warm_up=1)
        peaks = {"ours": ours.close(), "plain": plain.close()}
        seconds = {name: statistics.median(t) for name, t in times.items()}
        row = dict(
            dtype=str(dtype).removeprefix("torch."), ours_s=round(seconds["ours"], 3), logits_s=round(seconds["plain"], 3),
            time_ratio=round(1 / ratio(times, "ours", "plain"), 3), ours_peak_bytes=peaks["ours"], logits_peak_bytes=peaks["plain"],
            memory_ratio=round(peaks["ours"] / peaks["plain"], 3),
        )  # fmt: skip
        rows.append(row)
        print(
            f"  {row['dtype']:9} ours {row['ours_s']:.2f} s, {format_bytes(peaks['ours'])}   with logits {row['logits_s']:.2f} s,"
            f" {format_bytes(peaks['plain'])}   time x {row['time_ratio']:.2f}, memory x {row['memory_ratio']:.2f}"
        )
    print(f"wrote {write_rows('head_cpu', rows)}")


if __name__ == "__main__":
    main()
