"""python -m benchmarks.step [--model gpt2-124m llama3.2-1b]: a whole training step, as a user's run makes it.

build_model, Optimizer and pretrain.step in bf16 with fp32 masters and AdamW, on batches as the loader makes them, a document to a row. Of
every model first "step" and "peer", then the rest:

"step": tokens/s, model FLOPs utilisation, peak memory. FLOPs of a token are 6 times the parameters, and of the attention nothing (mfu_6n),
its causal half as pretrain.py reports it (mfu_causal), or all of it as PaLM counts (mfu_full).

"peer": transformers (fp32 weights under bf16 autocast, sdpa attention, torch's fused AdamW), without and with liger-kernel, each in a process
of its own, from the same weights on the same batches; our step from a CUDA graph, and with Muon. Turns are between it and ours. Nothing of
it is reported unless its first gradient has the norm of ours, and its first losses, some on batches it has seen, are ours: "gap" is how far
they are apart.

"part": where a step's time goes: attention, norms, projections, head and loss, optimizer, rest; forward and backward together. A mean, with
hooks that cost time themselves.

"kernel off": the step with one kernel's reference in its place, in turns with the step as it is; with Muon, the kernels that AdamW lacks.

Rows go to results/<gpu>/step.csv as they come, in the place of earlier ones of the same name. Without a GPU a tiny `--model nano` is timed on
the CPU, to show that the command works; the large ones are refused.
"""

from __future__ import annotations

import functools
import gc
import inspect
import math
import multiprocessing
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from unittest import mock

import torch

from benchmarks.common import RESULTS, interleaved, quantiles
from benchmarks.kernels import Table, command, machine, stamp, stamped
from benchmarks.roofline import board
from benchmarks.transformers_loop import TransformersLoop
from nanotrain import optim
from nanotrain.data.loader import Batch
from nanotrain.environment import peak_flops
from nanotrain.graphs import CapturedStep
from nanotrain.losses import IGNORED
from nanotrain.memory import PeakMemory, format_bytes, is_out_of_memory
from nanotrain.model import transformer
from nanotrain.model.build import build_model, parameter_count
from nanotrain.model.linear import Linear
from nanotrain.model.transformer import ModelConfig
from nanotrain.optim import OptimConfig, Optimizer
from nanotrain.stages import pretrain

SHAPES = {"nano": (8, 256), "gpt2-124m": (16, 1024), "llama3.2-1b": (4, 2048)}
"""Rows of a step, and their length [tokens], of each model."""

OPTIM = OptimConfig(name="adamw", lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, decay_embeddings=True)

MUON = OptimConfig(name="muon")

BATCHES = 4
"""Made before anything is timed, and used in turn."""

OPENING = BATCHES + 2
"""Steps by which a peer is compared with ours."""

SAME_NORM, SAME_LOSS, SAME_LOSS_AGAIN = 5e-3, 5e-4, 2e-3
"""How far from ours the norm of a peer's first gradient, its losses on new batches and those on batches seen before may lie, relative to it.

Both round to bf16, each in its own places. Of small models on a CPU transformers' differed by 4e-4, 6e-5 and 3e-4; one that has weights by
another seed lies beyond 1e-3 in one of the losses, and often by 2e-2 in the norm.
"""


@dataclass(frozen=True)
class Task:
    """What is trained."""

    c: ModelConfig
    rows: int
    length: int
    device: str
    dtype: torch.dtype = torch.bfloat16
    """Of our weights, beside fp32 masters, and of a peer's autocast; float32 is float32 throughout."""

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * self.length

    def batch(self, number: int) -> Batch:
        """Random tokens, the same for everyone."""
        N, generator = self.tokens, torch.Generator().manual_seed(number)
        tokens = torch.randint(self.c.vocab_size, (self.rows, self.length), generator=generator)
        labels = torch.cat([tokens[:, 1:], torch.full((self.rows, 1), IGNORED)], 1)
        tensors = (
            tokens.view(1, -1), labels.view(1, -1), torch.arange(self.length).repeat(self.rows)[None],
            torch.arange(0, N + 1, self.length, dtype=torch.int32), torch.arange(N)[None],
        )  # fmt: skip
        return Batch(*(t.to(self.device) for t in tensors), None, N - self.rows, self.length, (self.length,) * self.rows)

    def utilisation(self, seconds: float) -> dict[str, float | str]:
        """Share of the GPU's bf16 peak by each way of counting FLOPs; empty where the peak is unknown."""
        ceiling = peak_flops(torch.device(self.device))
        attention = 12 * self.c.layers * self.c.heads * self.c.head_dim * self.length
        counts = {"mfu_6n": 0.0, "mfu_causal": 0.5 * attention, "mfu_full": attention}
        linear = 6 * parameter_count(self.c)
        return {name: round((linear + extra) * self.tokens / seconds / ceiling, 4) if ceiling else "" for name, extra in counts.items()}


class Ours:
    """The engine's own step."""

    def __init__(self, task: Task, c: OptimConfig = OPTIM, *, graph: bool = False):
        """`graph` replays the step from a CUDA graph, as --train.cuda_graph does."""
        self.task, self.peak = task, PeakMemory(torch.device(task.device))
        self.base = torch.cuda.memory_allocated() if task.device != "cpu" else 0
        self.model = build_model(task.c, seed=0, dtype=task.dtype, device=task.device)
        self.optimizer = Optimizer(self.model, c)
        self.run = functools.partial(pretrain.step, self.model, self.optimizer, seed=0)
        if graph:
            self.optimizer.keep_gradients = True
            self.run = CapturedStep(self.run, lambda: self.model.rotary_tables(task.length, task.device))
        self.batches, self.count = [task.batch(n) for n in range(BATCHES)], 0
        self.norm: torch.Tensor | None = None

    def step(self) -> float:
        """One step; reading its loss waits for the device."""
        batch = self.batches[self.count % BATCHES]
        self.count += 1
        loss, result = self.run([batch], 1.0)
        self.norm = result.grad_norm
        return float(loss)

    def gradient_norm(self) -> float:
        """Of the last step, before clipping."""
        return float(self.norm)

    def peak_bytes(self) -> int:
        """Most memory since this was made, without what was there before."""
        return self.peak.bytes() - self.base

    def close(self) -> None:
        """Nothing to end: it goes with its memory."""


class Transformers:
    """transformers on the batches of a task."""

    def __init__(self, task: Task, liger: bool = False):
        """ImportError as TransformersLoop has it."""
        self.loop = TransformersLoop(task.c, OPTIM, task.dtype, task.device, liger)
        self.batches, self.count = [task.batch(n).tokens_BT.view(task.rows, -1) for n in range(BATCHES)], 0

    def step(self) -> float:
        """One step; the loss."""
        self.count += 1
        return self.loop.step(self.batches[(self.count - 1) % BATCHES])

    def gradient_norm(self) -> float:
        """Of the last step, before clipping."""
        return self.loop.norm.item()


def serve(pipe, task: Task, liger: bool) -> None:
    """A peer's process: says what it lacks, or nothing; then answers "step" with the loss, "norm" and "peak" until it is told None."""
    try:
        peak = PeakMemory(torch.device(task.device))
        peer = Transformers(task, liger)
    except ImportError as error:
        pipe.send(str(error))
        return
    pipe.send("")
    answers = {"step": peer.step, "norm": peer.gradient_norm, "peak": peak.bytes}
    while (question := pipe.recv()) is not None:
        pipe.send(answers[question]())


class Peer:
    """transformers in a process of its own: liger-kernel rewrites its modules, and its peak memory is its own."""

    def __init__(self, task: Task, liger: bool):
        """ImportError as Transformers has it."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, task, liger), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process
        if missing := self._answer():
            self.process.join()
            raise ImportError(missing)

    def _answer(self):
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError("its process ended; its own message stands above") from None

    def step(self) -> float:
        """One step; the loss."""
        self.pipe.send("step")
        return self._answer()

    def gradient_norm(self) -> float:
        """Of the last step, before clipping."""
        self.pipe.send("norm")
        return self._answer()

    def peak_bytes(self) -> int:
        """Most memory that it held at once."""
        self.pipe.send("peak")
        return self._answer()

    def close(self) -> None:
        """End the process."""
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join()


# Is it the same step?


@dataclass(frozen=True)
class Opening:
    """How a contestant's training begins."""

    norm: float
    """Of the first gradient."""
    losses: list[float]
    """Of OPENING steps."""


def opening(contestant: Ours | Peer) -> Opening:
    """The first steps of a contestant that has made none."""
    losses = [contestant.step()]
    norm = contestant.gradient_norm()
    return Opening(norm, losses + [contestant.step() for _ in range(OPENING - 1)])


def difference(ours: Opening, theirs: Opening, losses: int = OPENING) -> tuple[float, str]:
    """(largest relative difference of norm and of so many losses, why it is not the same step or nothing)."""
    gaps, why = [], ""
    for number, (a, b) in enumerate([(ours.norm, theirs.norm), *zip(ours.losses[:losses], theirs.losses, strict=False)]):
        most = SAME_NORM if number == 0 else SAME_LOSS if number <= BATCHES else SAME_LOSS_AGAIN
        gaps.append(abs(b - a) / abs(a))
        if not gaps[-1] <= most and not why:  # NaN is another step too
            what = f"loss {number}" if number else "first gradient's norm"
            why = f"its {what} is {b:.5g}, ours {a:.5g}: not the same step"
    return max(gaps), why


# Kernels on and off


def _is_kernel(value: object) -> bool:
    """Whether this is a public function of kernels/ that takes `impl`."""
    ours = isinstance(value, types.FunctionType) and value.__module__.startswith("nanotrain.kernels.")
    return ours and "impl" in inspect.signature(value).parameters


def kernels_of(model: torch.nn.Module) -> dict[str, list[tuple[object, str]]]:
    """By the name of each kernel that model or optimizer can call, the (owner, attribute) places that hold it."""
    found: dict[str, list[tuple[object, str]]] = {}
    for owner in (transformer, optim, *model.modules()):
        for name, value in vars(owner).items():
            if _is_kernel(value):
                found.setdefault(value.__name__, []).append((owner, name))
    return found


@contextmanager
def swapped(places: list[tuple[object, str]], make: Callable[[Callable], Callable]) -> Iterator[None]:
    """Within, what stands at these places is make(what stood there)."""
    with ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))
        yield


def off(kernel: Callable) -> Callable:
    """Its reference in a kernel's place."""
    return functools.partial(kernel, impl="reference")


def called(ours: Ours) -> list[str]:
    """Names of the kernels that a step calls."""
    seen: dict[str, None] = {}

    def noted(kernel):
        @functools.wraps(kernel)
        def call(*arguments, **options):
            seen[kernel.__name__] = None
            return kernel(*arguments, **options)

        return call

    with swapped([place for places in kernels_of(ours.model).values() for place in places], noted):
        ours.step()
    return list(seen)


# Time by part

ATTENTION, NORMS, PROJECTIONS, HEAD, OPTIMIZER, REST = PARTS = ("attention", "norms", "projections", "head and loss", "optimizer", "rest")

OWNERS = {"flash_attention": ATTENTION, "rms_norm": NORMS, "layer_norm": NORMS, "qk_norm_rope": NORMS, "linear_cross_entropy": HEAD}
"""Part of each kernel; others are parts under their own names."""


@dataclass(eq=False)
class Span:
    """One call of a part."""

    part: str


@dataclass
class Timeline:
    """Which part the device works for, mark by mark. `now` makes a mark; `between` gives the seconds from one to another."""

    now: Callable[[], object]
    between: Callable[[object, object], float]
    marks: list[tuple[str, object]] = field(default_factory=list)
    current: Span | None = None
    forward: bool = False
    """Whether a part's forward is running."""

    def enter(self, span: Span | None) -> None:
        """From here on the time is that part's; None: the rest's."""
        self.current = span
        self.marks.append((span.part if span else REST, self.now()))

    def leave(self, span: Span) -> None:
        """The part is done, unless another has begun."""
        if self.current is span:
            self.enter(None)

    def around(self, part: str, function: Callable) -> Callable:
        """The function, its forward and its backward counted as `part`; within another part it counts as that.

        The backward begins as the gradients of its results are whole, and ends as autograd goes on to what made its inputs.
        """

        @functools.wraps(function)
        def call(*arguments, **options):
            if self.forward:
                return function(*arguments, **options)
            span, self.forward = Span(part), True
            self.enter(span)
            for x in (*arguments, *options.values()):
                if isinstance(x, torch.Tensor) and x.requires_grad and not x.is_leaf:
                    x.register_hook(lambda _: self.leave(span))
            try:
                output = function(*arguments, **options)
            finally:
                self.forward = False
            for x in output if isinstance(output, tuple) else (output,):
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    x.register_hook(lambda _: self.enter(span))
            self.leave(span)
            return output

        return call

    def seconds(self) -> dict[str, float]:
        """Of each part, between the first mark and the last."""
        spent = dict.fromkeys(PARTS, 0.0)
        for (part, a), (_, b) in pairwise(self.marks):
            spent[part] = spent.get(part, 0.0) + self.between(a, b)
        return spent | {REST: spent.pop(REST)}  # which comes last


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def timeline(device: str) -> Timeline:
    """By CUDA events, or on a CPU by the clock."""
    if device != "cpu":
        return Timeline(_event, lambda a, b: 1e-3 * a.elapsed_time(b))
    return Timeline(perf_counter, lambda a, b: b - a)


def parts(ours: Ours, steps: int) -> dict[str, float]:
    """Seconds of each part of a step, the mean over `steps`."""
    line = timeline(ours.task.device)
    with ExitStack() as stack:
        for name, held in kernels_of(ours.model).items():
            stack.enter_context(swapped([(owner, at) for owner, at in held if owner is not optim],
                                        lambda kernel, name=name: line.around(OWNERS.get(name, name), kernel)))  # fmt: skip
        stack.enter_context(swapped([(Linear, "forward")], lambda forward: line.around(PROJECTIONS, forward)))
        stack.enter_context(swapped([(ours.optimizer, "step")], lambda step: line.around(OPTIMIZER, step)))
        for _ in range(steps):
            line.enter(None)
            ours.step()
        line.enter(None)
    if ours.task.device != "cpu":
        torch.cuda.synchronize()
    return {part: seconds / steps for part, seconds in line.seconds().items()}


# Rows

KEY = ("model", "kind", "name")

COLUMNS = (*KEY, "parameters", "rows", "length", "p20_ms", "p50_ms", "p80_ms", "mean_ms", "tokens_per_s", "mfu_6n", "mfu_causal", "mfu_full",
           "peak_bytes", "share", "ratio", "gap", "missing")  # fmt: skip
"""`share` is of a step's time. `ratio` is the median over that of ours in the same rounds: above 1, ours is faster."""


def row_of(task: Task, kind: str, name: str, times: list[float], peak: int | str = "", ratio: float | str = "") -> dict[str, object]:
    """A row of figures of steps."""
    low, middle, high = quantiles(times)
    figures = dict(p20_ms=round(1e3 * low, 3), p50_ms=round(1e3 * middle, 3), p80_ms=round(1e3 * high, 3), tokens_per_s=round(task.tokens / middle))
    return dict(kind=kind, name=name, peak_bytes=peak, ratio=ratio) | figures | task.utilisation(middle)


def _median_ratio(times: dict[str, list[float]], name: str) -> float:
    return round(quantiles(times[name])[1] / quantiles(times["ours"])[1], 3)


def headline(task: Task, steps: int) -> Iterator[dict[str, object]]:
    """The step and its peers, each row as soon as it is measured. `steps` are timed of each contestant."""
    ours = Ours(task)
    first = opening(ours)
    peak = ours.peak_bytes()
    yield row_of(task, "step", "ours", interleaved({"ours": ours.step}, steps, warm_up=1)["ours"], peak)
    yield against(task, ours, first, "transformers", lambda: Peer(task, liger=False), steps)
    yield against(task, ours, first, "transformers, liger", lambda: Peer(task, liger=True), steps)
    if task.device != "cpu":
        yield against(task, ours, first, "ours, graph", lambda: Ours(task, graph=True), steps)
    yield against(task, ours, first, "ours, muon", lambda: Ours(task, MUON), steps, losses=1)  # after which it goes its own way


def detail(task: Task, steps: int) -> Iterator[dict[str, object]]:
    """Where the time goes, and each kernel on and off; each row as soon as it is measured."""
    ours = Ours(task)
    names = called(ours)
    ours.step()
    spent = parts(ours, steps)
    total = sum(spent.values())
    for part, seconds in spent.items():
        yield dict(kind="part", name=part, mean_ms=round(1e3 * seconds, 3), share=round(seconds / total, 4))
    yield from switched_off(task, ours, "kernel off", names, steps)
    del ours  # its memory is the next one's
    ours = Ours(task, MUON)
    yield from switched_off(task, ours, "kernel off, muon", [name for name in called(ours) if name not in names], steps)


def switched_off(task: Task, ours: Ours, kind: str, names: list[str], steps: int) -> Iterator[dict[str, object]]:
    """The step without each of these kernels, and without any, in turns with the step as it is."""
    held = kernels_of(ours.model)
    for name in [*names, "every kernel"]:
        chosen = [place for kernel, places in held.items() if name in (kernel, "every kernel") for place in places]
        try:
            times = interleaved({"ours": ours.step, name: functools.partial(_stepped_without, ours, chosen)}, steps, warm_up=1)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            ours.model.zero_grad()  # of the step that was broken off
            yield dict(kind=kind, name=name, missing="its reference runs out of memory")
        else:
            yield row_of(task, kind, name, times[name], ratio=_median_ratio(times, name))


def _stepped_without(ours: Ours, places: list[tuple[object, str]]) -> float:
    with swapped(places, off):
        return ours.step()


def against(
    task: Task, ours: Ours, first: Opening, name: str, make: Callable[[], Ours | Peer], steps: int, losses: int = OPENING
) -> dict[str, object]:  # fmt: skip
    """A peer's row: its steps in turns with ours, or why there are none. `first` is how ours began; `losses` of it must be the peer's."""
    gc.collect()
    if task.device != "cpu":
        torch.cuda.empty_cache()  # for a peer in another process
    try:
        peer = make()
    except (ImportError, RuntimeError, ValueError) as error:
        return dict(kind="peer", name=name, missing=_line(error))
    try:
        gap, why = difference(first, opening(peer), losses)
        if why:
            return dict(kind="peer", name=name, missing=why)
        peak = peer.peak_bytes()  # before ours steps in what may be the same process
        times = interleaved({"ours": ours.step, name: peer.step}, steps, warm_up=1)
        return row_of(task, "peer", name, times[name], peak, _median_ratio(times, name)) | dict(gap=float(f"{gap:.2g}"))
    except RuntimeError as error:
        return dict(kind="peer", name=name, missing=_line(error))
    finally:
        peer.close()


def within(seconds: float, rows: Iterable[dict[str, object]]) -> Iterator[dict[str, object]]:
    """The rows that can be begun within so many seconds."""
    ends, rows = perf_counter() + seconds, iter(rows)
    while perf_counter() < ends and (row := next(rows, None)) is not None:
        yield row


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def line_of(row: dict[str, object]) -> str:
    """A row for people; utilisation stands below it."""
    text = f"  {row['kind']:16} {row['name']:20}"
    if row.get("missing"):
        return f"{text} not measured: {row['missing']}"
    if row["kind"] == "part":
        return f"{text} {row['mean_ms']:9.2f} ms {row['share']:6.1%}  mean, instrumented"
    text += f" {row['p50_ms']:9.2f} ms ({row['p20_ms']:.2f}, {row['p80_ms']:.2f}) {row['tokens_per_s']:9,} tokens/s"
    text += f"  {format_bytes(row['peak_bytes'])}" if row["peak_bytes"] != "" else ""
    text += f"  {row['ratio']:.2f}x the time of ours" if row["ratio"] != "" else ""
    if row["mfu_6n"] != "":
        text += f"\n{'':21}MFU {row['mfu_6n']:.1%} of 6N, {row['mfu_causal']:.1%} with causal attention, {row['mfu_full']:.1%} with full"
    return text


def task_of(model: str, device: str) -> Task:
    """The model at its shape; on a CPU a tiny one."""
    if device == "cpu":
        return Task(ModelConfig(preset=model, width=96, vocab_size=256).resolved(frozenset({"width", "vocab_size"})), 2, 32, device, torch.float32)
    c = ModelConfig(preset=model).resolved()
    return Task(replace(c, vocab_size=c.vocab_size or 2048), *SHAPES[model], device)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for what cannot be measured here."""
    parser = command("step", __doc__)
    parser.add_argument("--model", nargs="+", choices=SHAPES, metavar="NAME", help=f"of {', '.join(SHAPES)}; default: all but nano, on a CPU nano")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each contestant, default %(default)s")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after so many [s], default never")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="default on a GPU: results/<gpu>/step.csv")
    options = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    models = options.model or (["gpt2-124m", "llama3.2-1b"] if on_gpu else ["nano"])
    if not on_gpu and models != ["nano"]:
        print(f"step: {', '.join(m for m in models if m != 'nano')} needs a GPU; here only --model nano can run", file=sys.stderr)
        return 2
    if options.steps < 2:
        print(f"step: --steps {options.steps}: percentiles need at least 2", file=sys.stderr)
        return 2
    device = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
    facts = stamp(board(torch.device(device)), options.commit)
    print(stamped(facts))
    path = options.csv or (RESULTS / machine() / "step.csv" if on_gpu else None)
    try:
        table = Table(path, COLUMNS, facts, KEY) if path else None
    except ValueError as error:
        print(f"step: --csv {error}", file=sys.stderr)
        return 2
    began = perf_counter()
    for row in within(options.seconds, _rows(models, device, options.steps)):
        print(line_of(row), flush=True)
        if table:
            table.write(row)
    if perf_counter() - began >= options.seconds:
        print(f"step: --seconds {options.seconds:g} are over: what is missing above was not begun")
    if table and table.rows:
        print(f"wrote {path}")
    return 0


def _rows(models: list[str], device: str, steps: int) -> Iterator[dict[str, object]]:
    """Every row of all models, what is asked for most of each first."""
    for rows in (headline, detail):
        for model in models:
            task = task_of(model, device)
            facts = dict(model=model, parameters=parameter_count(task.c), rows=task.rows, length=task.length)
            tiny = "; tiny, on a CPU: no figure to compare with" if device == "cpu" else ""
            print(f"{model}: {facts['parameters']:,} parameters, {task.rows} x {task.length} tokens a step{tiny}", flush=True)
            for row in rows(task, steps):
                yield facts | row


if __name__ == "__main__":
    sys.exit(main())
