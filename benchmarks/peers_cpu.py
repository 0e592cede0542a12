"""python -m benchmarks.peers_cpu: a training step on a CPU against transformers and against a plain PyTorch loop.

One Llama-shaped model of 2.6M parameters, one set of initial weights, one stream of rows, AdamW with the same settings. Each contestant
trains as its users would, in a process of its own, so that its peak memory and what it does to its process are its own; their steps
take turns. Nothing is reported unless their losses agree.

ours          the engine's step: weights in the dtype, fp32 masters, freed memory kept from step to step
transformers  LlamaForCausalLM with sdpa attention, fp32 weights (under bf16 autocast), torch's fused AdamW
plain         benchmarks/plain.py, a nanoGPT-style loop in the same manner; it stands in for litgpt too, which cannot be installed beside
              this transformers (they need different huggingface_hub)

A second table flips the memory setting of each: it is one call, which the others' users could make and ours could leave out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import interleaved, quantiles, ratios, write_rows
from benchmarks.plain import PlainLoop
from benchmarks.transformers_loop import TransformersLoop, torch_adamw
from nanotrain.data.loader import Batch
from nanotrain.losses import IGNORED
from nanotrain.memory import PeakMemory, format_bytes, keep_freed_memory
from nanotrain.model.build import build_model, parameter_count
from nanotrain.model.transformer import ModelConfig
from nanotrain.optim import OptimConfig, Optimizer
from nanotrain.stages import pretrain

SHAPE = ModelConfig(preset="nano", vocab_size=2048, qk_norm=False).resolved(frozenset({"vocab_size", "qk_norm"}))
"""The nano preset as a Llama: no norm on queries and keys."""

OPTIM = OptimConfig(name="adamw", lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, decay_embeddings=True, clip=1.0)

THREADS = 2

FIRST = {torch.float32: 1e-6, torch.bfloat16: 1e-4}
"""How far the first losses may lie apart, relative to the largest."""

LAST = {torch.float32: 1e-5, torch.bfloat16: 5e-4}
"""How far those of the last step may: rounding differs, and AdamW's first steps amplify it."""


@dataclass(frozen=True)
class Task:
    """What every contestant trains."""

    c: ModelConfig
    dtype: torch.dtype
    """bfloat16 trains in it, or under autocast to it; float32 is float32 throughout."""
    rows: int
    """Of a batch."""
    length: int
    """Of a row [tokens]."""

    def batch(self, cursor: int, rows: int) -> Batch:
        """Rows `cursor` to `cursor` + `rows` of an endless stream, a document each: tokens drawn with a bias that can be learned."""
        N = rows * self.length
        draws = torch.rand(rows, self.length, generator=torch.Generator().manual_seed(cursor))
        tokens = (self.c.vocab_size * draws**3).long()
        labels = torch.cat([tokens[:, 1:], torch.full((rows, 1), IGNORED)], 1)
        return Batch(
            tokens.view(1, -1), labels.view(1, -1), torch.arange(self.length).repeat(rows)[None],
            torch.arange(0, N + 1, self.length, dtype=torch.int32), torch.arange(N)[None], None, N - rows, self.length,
            (self.length,) * rows,
        )  # fmt: skip


class Ours:
    """The engine's own step."""

    keeps_memory = True

    def __init__(self, task: Task):
        self.task, self.cursor = task, 0
        self.model = build_model(task.c, seed=0, dtype=task.dtype, device="cpu")
        self.optimizer = Optimizer(self.model, OPTIM)

    def step(self) -> float:
        """One step; returns the loss."""
        batch = self.task.batch(self.cursor, self.task.rows)
        self.cursor += self.task.rows
        return float(pretrain.step(self.model, self.optimizer, [batch], 1.0, 0)[0])

    def mark(self) -> None:
        """Have a profile name what belongs to the optimizer."""
        self.optimizer.step = _marked("optimizer", self.optimizer.step)


class Transformers:
    """LlamaForCausalLM in the loop that its documentation shows."""

    keeps_memory = False

    def __init__(self, task: Task):
        self.task, self.cursor = task, 0
        self.loop = TransformersLoop(task.c, OPTIM, task.dtype, "cpu")
        self.model = self.loop.model

    def step(self) -> float:
        """One step; returns the loss."""
        tokens = self.task.batch(self.cursor, self.task.rows).tokens_BT.view(self.task.rows, -1)
        self.cursor += self.task.rows
        return self.loop.step(tokens)

    def mark(self) -> None:
        """Have a profile name what belongs to the optimizer."""
        self.loop.update = _marked("optimizer", self.loop.update)


class Plain(PlainLoop):
    """The plain loop, with the optimizer of the others; it asks its loader for batches, which is the task here."""

    keeps_memory = False

    def __init__(self, task: Task):
        super().__init__(build_model(task.c, seed=0, dtype=task.dtype, device="cpu"), task.dtype, task, task.rows)
        self.optimizers, self.peaks = [torch_adamw(self.w.values(), OPTIM)], [OPTIM.lr]


CONTESTANTS = {"ours": Ours, "transformers": Transformers, "plain": Plain}


def serve(pipe, name: str, task: Task, keep: bool) -> None:
    """A contestant's process: answers "step" with the loss, "peak" with bytes, "profile" with seconds by group, until it is told None."""
    torch.set_num_threads(THREADS)
    make = CONTESTANTS[name]
    make(replace(task, c=replace(task.c, layers=1, vocab_size=64), rows=1, length=16)).step()  # what libraries take at their first use
    peak = PeakMemory(torch.device("cpu"))
    if keep:
        keep_freed_memory()
    contestant = make(task)
    answers = {"step": contestant.step, "peak": peak.bytes, "profile": lambda: profiled(contestant)}
    while (question := pipe.recv()) is not None:
        pipe.send(answers[question]())


class Process:
    """A contestant in a process of its own."""

    def __init__(self, name: str, task: Task, flip: bool = False):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.losses: list[float] = []
        self.process = context.Process(target=serve, args=(theirs, name, task, CONTESTANTS[name].keeps_memory != flip), daemon=True)
        self.process.start()

    def ask(self, question: str):
        """The answer to a question that `serve` knows."""
        self.pipe.send(question)
        return self.pipe.recv()

    def step(self) -> None:
        """One step, its loss noted."""
        self.losses.append(self.ask("step"))

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


MATMUL, ATTENTION, NORM, ACTIVATION, HEAD, OPTIMIZER, CASTS, REST = GROUPS = (
    "matrix products", "attention", "normalisation", "activation", "head and loss", "optimizer", "casts and copies", "python and the rest",
)  # fmt: skip

SCOPES = {
    "Linear": MATMUL, "Attention": ATTENTION, "LlamaAttention": ATTENTION, "Norm": NORM, "LlamaRMSNorm": NORM, "FeedForward": ACTIVATION,
    "LlamaMLP": ACTIVATION, "Head": HEAD, "LlamaForCausalLM": HEAD, "Transformer": REST, "LlamaModel": REST,
}  # fmt: skip
"""Classes of modules, ours and theirs, and the group of the operations inside them that no module within claims."""


def _marked(group, function):
    def call(*arguments):
        with record_function(f"group:{group}"):
            return function(*arguments)

    return call


def profiled(contestant: Ours | Transformers, steps: int = 10) -> dict[str, float]:
    """Shares of a step's time by group. A backward's operations count where its forward's do."""
    open_scopes = []

    def enter(scope):
        open_scopes.append(record_function(scope))
        open_scopes[-1].__enter__()

    for name, module in contestant.model.named_modules():
        if type(module).__name__ in SCOPES and name != "lm_head":
            scope = f"group:{SCOPES[type(module).__name__]}"
            module.register_forward_pre_hook(lambda *_, scope=scope: enter(scope))
            module.register_forward_hook(lambda *_: open_scopes.pop().__exit__(None, None, None))
    contestant.mark()
    for _ in range(2):  # the first time the profiler's own memory comes between a step's, which then takes fresh pages
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            started = time.perf_counter()
            for _ in range(steps):
                contestant.step()
            seconds = time.perf_counter() - started
    return shares(profiler.events(), seconds)


def shares(events, seconds: float) -> dict[str, float]:
    """Shares by group of `seconds` of profiled steps; what no operation took, Python mostly, is with the rest."""
    forward: dict[int, str] = {}

    def scope(event) -> str:
        while event is not None:
            if event.name.startswith("group:"):
                return event.name.removeprefix("group:")
            if event.name.startswith("autograd::engine::evaluate_function"):
                return forward.get(event.sequence_nr, REST)
            event = event.cpu_parent
        return REST

    events = sorted(events, key=lambda event: event.time_range.start)
    for event in events:
        if event.sequence_nr >= 0 and "Backward" not in event.name:
            forward[event.sequence_nr] = scope(event)  # the last one with a number is the one that made the node
    spent = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        group = scope(event)
        if event.name.startswith(("group:", "autograd::")) and group != OPTIMIZER:
            group = REST  # of modules in Python and of autograd between the operations
        elif event.name == "aten::copy_" and group != OPTIMIZER:
            group = CASTS
        spent[group] += event.self_cpu_time_total * 1e-6
    spent[REST] += seconds - sum(spent.values())
    return {group: value / seconds for group, value in spent.items()}


def main() -> None:
    """Measure, print, and write results/cpu/peers_cpu.csv and peers_cpu_profile.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="steps of each [steps]")
    parser.add_argument("--rows", type=int, default=8, help="of a batch [rows]")
    parser.add_argument("--length", type=int, default=256, help="of a row [tokens]")
    parser.add_argument("--dtype", choices=("both", "bfloat16", "float32"), default="both")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    print(f"{parameter_count(SHAPE):,} parameters, {arguments.rows} x {arguments.length} tokens a step, {THREADS} threads; {arguments.rounds} rounds")
    rows, profiles = [], []
    for dtype in ("bfloat16", "float32") if arguments.dtype == "both" else (arguments.dtype,):
        table, times = compare(Task(SHAPE, getattr(torch, dtype), arguments.rows, arguments.length), arguments.rounds)
        rows, profiles = rows + table, profiles + times
    print(f"wrote {write_rows('peers_cpu', rows)}")
    print(f"wrote {write_rows('peers_cpu_profile', profiles)}")


def compare(task: Task, rounds: int) -> tuple[list[dict], list[dict]]:
    """Rows of both tables for a dtype, printed."""
    dtype = str(task.dtype).removeprefix("torch.")
    processes = {(name, flip): Process(name, task, flip) for flip in (False, True) for name in CONTESTANTS}
    times = interleaved({key: process.step for key, process in processes.items()}, rounds)
    agree(task, {key: process.losses for key, process in processes.items()})
    peaks = {key: process.ask("peak") for key, process in processes.items()}
    shares = {name: processes[name, False].ask("profile") for name in ("ours", "transformers")}
    for process in processes.values():
        process.close()
    tokens = task.rows * task.length
    rows = []
    for key in processes:
        name, flip = key
        low, middle, high = quantiles(ratios(times, ("ours", False), key))
        rows.append(dict(
            dtype=dtype, contestant=name, memory="kept" if CONTESTANTS[name].keeps_memory != flip else "returned", as_users_run_it=not flip,
            tokens_per_s=round(tokens / statistics.median(times[key])), peak_bytes=peaks[key], ours_speed_ratio=round(middle, 3),
            ours_speed_ratio_p20=round(low, 3), ours_speed_ratio_p80=round(high, 3), ours_memory_ratio=round(peaks["ours", False] / peaks[key], 3),
        ))  # fmt: skip
    print(f"{dtype:14}   tokens/s   peak memory   ours against it: speed (p20, p80)   memory")
    for row in rows:
        note = "" if row["as_users_run_it"] else f"   freed memory {row['memory']}"
        print(f"  {row['contestant']:14} {row['tokens_per_s']:8,} {format_bytes(row['peak_bytes']):>13}   {row['ours_speed_ratio']:13.2f}x"
              f" ({row['ours_speed_ratio_p20']:.2f}, {row['ours_speed_ratio_p80']:.2f}) {row['ours_memory_ratio']:14.2f}x{note}")  # fmt: skip
    step_ms = {name: 1e3 * statistics.median(times[name, False]) for name in shares}
    profiles = [dict(dtype=dtype, group=group) | {f"{name}_{unit}": round(share[group] * scale, 2) for name, share in shares.items()
                                                 for unit, scale in (("percent", 100), ("ms", step_ms[name]))} for group in GROUPS]  # fmt: skip
    print("  where a step's time goes   " + "   ".join(f"{name:>18}" for name in shares))
    for row in profiles:
        print(f"  {row['group']:24}   " + "   ".join(f"{row[f'{name}_percent']:5.1f}%  {row[f'{name}_ms']:6.1f} ms" for name in shares))
    return rows, profiles


def agree(task: Task, losses: dict) -> None:
    """SystemExit unless the first losses and the last are the same in all, as far as rounding allows."""
    for step, tolerance in ((0, FIRST[task.dtype]), (-1, LAST[task.dtype])):
        found = {" ".join((name, "flipped" * flip)).strip(): values[step] for (name, flip), values in losses.items()}
        spread = (max(found.values()) - min(found.values())) / max(found.values())
        print(f"  losses of step {step % len(losses['ours', False]) + 1}: ours {found['ours']:.5f}, furthest apart {spread:.1e}")
        if not spread <= tolerance:
            raise SystemExit(f"peers_cpu: losses are further apart than {tolerance}: {found}; nothing is reported")


if __name__ == "__main__":
    main()
