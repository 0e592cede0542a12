"""python -m benchmarks.kernels [NAME ...]: every kernel proven right, then measured against its peers and the roofline.

Each case of benchmarks/kernel_cases.py, at each of its shapes, in bf16 and fp32, forward and backward apart. First the results and every
gradient are compared with the reference's in float64: where ours err more than twice as far as the reference in the same dtype (and two
roundings), the row says so, no speed of it is reported and the exit status is 1. Then ours and every peer that is installed take turns on
equal inputs, made anew before each run, with a cold L2 cache and the GPU's queue kept full; where a call's Python takes longer than its
kernels, "host" shows it. A peer whose results are far off is left out, with a line. torch.compile, which takes seconds for each shape, is
asked for the first shapes alone.

A row has the 20th, 50th and 80th percentile, GB/s and TFLOP/s by the case's cost, the share of the roofline (benchmarks/roofline.py), peak
memory beyond the inputs, and by peer its median over ours. Rows go to results/<gpu>/kernels.csv as they come, in the place of earlier rows
of the same kernel, shape, dtype and direction; others stay, under their own commit. roofline.svg beside it is a picture of the table.

Without a GPU nothing is measured: the compile gate's table is printed, and the least time that an H100 could take by the roofline.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from benchmarks import compile_gate
from benchmarks.cases import Case, Inputs, results, upstream, wanted
from benchmarks.common import RESULTS, quantiles
from benchmarks.kernel_cases import CASES, select
from benchmarks.roofline import H100, Board, Point, Roof, board, picture, roof_of
from nanotrain.environment import environment, git, version
from nanotrain.memory import format_bytes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

PEERS = tuple(dict.fromkeys(name for case in CASES for name in case.peers))

WARM_UP = 3
"""Runs of each contestant that are not counted; in the first, kernels are compiled."""


def machine() -> str:
    """The folder of this machine's results."""
    return torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"


def stamp(found: Board, commit: str | None = None) -> dict[str, object]:
    """What each row says of where it comes from; `commit` as it was given. Results themselves are no changes. "" is what is not known."""
    facts = environment()
    head, changes = git("rev-parse", "HEAD"), git("diff", "--name-only", "HEAD", "--", ".", ":!benchmarks/results")
    commit = (commit or head or "")[:12]
    known = changes is not None and head is not None and head.startswith(commit)
    return dict(
        machine=facts["gpu"][0] if facts["gpu"] else facts["processor"], power_cap_watts=found.power_cap_watts or "",
        memory_mhz=found.memory_mhz or "", driver=found.driver or "", torch=torch.__version__, triton=facts["packages"]["triton"] or "",
        liger=version("liger-kernel") or "", transformers=version("transformers") or "", commit=commit, dirty=bool(changes) if known else "",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )  # fmt: skip


def stamped(facts: dict[str, object]) -> str:
    """The stamp as a line, without what is not known."""
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value != "")


def commit_hash(text: str) -> str:
    """An argument that names a commit."""
    if not re.fullmatch("[0-9a-f]{7,40}", text):
        raise argparse.ArgumentTypeError(f"{text}: must be 7 to 40 hexadecimal digits")
    return text


def command(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command that measures on a GPU; its description is wrapped to the terminal's width."""
    width = min(100, shutil.get_terminal_size().columns - 2)
    text = "\n\n".join(textwrap.fill(paragraph, width) for paragraph in description.split("\n\n"))
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", type=commit_hash, metavar="HASH", help="what rows say of the source, where there is no git to ask")
    return parser


class Table:
    """A CSV file that holds one row for each `key`, written whole with each new row, so that what was measured before an end is kept.

    Rows that the file had stay, but for those with the same key as a new one.
    """

    def __init__(self, path: Path, columns: Sequence[str], stamp: dict[str, object], key: Sequence[str]):
        """ValueError where there is a file that lacks the key's columns."""
        self.path, self.columns, self.stamp, self.key = path, [*columns, *stamp], stamp, key
        self.rows: dict[tuple[str, ...], dict[str, object]] = {}
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                if not set(key) <= set(reader.fieldnames or ()):
                    raise ValueError(f"{path}: has no columns {', '.join(key)}, so it is not written over")
                self.rows = {self._key(row): {name: row.get(name) or "" for name in self.columns} for row in reader}

    def _key(self, row: dict[str, object]) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in self.key)

    def write(self, row: dict[str, object]) -> None:
        """Add a row, or put it in the place of the one with its key; columns that it lacks stay empty. ValueError for one too many."""
        if extra := row.keys() - set(self.columns):
            raise ValueError(f"{self.path}: has no column {', '.join(sorted(extra))}")
        self.rows[self._key(row)] = row | self.stamp
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_name(f"{self.path.name}.tmp")
        with half.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows.values())
        os.replace(half, self.path)


class CudaTimer:
    """Times calls on the GPU, between two CUDA events, after its L2 cache was overwritten.

    The cache is overwritten as often as the host needs to queue the call, so that the GPU never waits for Python within the span.
    """

    MOST = 200
    """Fills before a call: a host that takes longer than they do is a part of what is timed."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffer = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
        self.start, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.fill_seconds = min(self._span(lambda: self._fill(20))[0] for _ in range(3)) / 20

    def _fill(self, times: int) -> None:
        for _ in range(times):
            self.buffer.zero_()

    def _span(self, call: Callable[[], object]) -> tuple[float, float]:
        self.start.record()
        began = time.perf_counter()
        call()
        host = time.perf_counter() - began
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3, host

    def __call__(self, call: Callable[[], object], lead: float) -> tuple[float, float]:
        """(seconds of the GPU, seconds until the call returned); `lead` is how long the host is expected to take [s]."""
        self._fill(min(self.MOST, 1 + math.ceil(lead / self.fill_seconds)))
        return self._span(call)

    def peak(self, call: Callable[[], object]) -> int:
        """Most bytes that were allocated at once during the call, beyond those before it."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Tensors in nested dicts and sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for item in value.values() for t in _tensors(item))
    elif isinstance(value, (list, tuple)):
        yield from (t for item in value for t in _tensors(item))


def _wide(value: object) -> object:
    """The same values with every floating-point tensor in float64."""
    if isinstance(value, torch.Tensor):
        return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return {name: _wide(item) for name, item in value.items()}
    return type(value)(map(_wide, value)) if isinstance(value, (list, tuple)) else value


Function = Callable[[Inputs], object]
"""A contestant: of the inputs, the result."""


class Workload:
    """A case at one shape and dtype. Every run finds the same inputs, whatever the one before did to them."""

    def __init__(self, case: Case, shape: tuple[int, ...], dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        self.case, self.shape, self.dtype = case, shape, dtype
        self.inputs = case.make(shape, dtype, device)
        self.ups: list[torch.Tensor] = []
        self.kept = [t.detach().clone() for t in _tensors(self.inputs)]
        if case.backward_cost:
            self.ups = upstream(self._differentiable(self.reference(self.inputs)))
            self.kept += [t.clone() for t in self.ups]
            self.restore()

    def reference(self, inputs: Inputs) -> object:
        """What ours is proven against."""
        return self.case.call(inputs, "reference")

    @staticmethod
    def _differentiable(output: object) -> list[torch.Tensor]:
        return [x for x in results(output) if x.requires_grad]

    @torch.no_grad()
    def restore(self) -> None:
        """Give inputs and upstream gradients their first values."""
        for tensor, kept in zip([*_tensors(self.inputs), *self.ups], self.kept, strict=True):
            tensor.copy_(kept)

    def ready(self, function: Function, direction: str) -> Callable[[], object]:
        """What is to be timed; all that comes before it is done."""
        self.restore()
        if direction == "forward":
            return partial(function, self.inputs)
        outputs = self._differentiable(function(self.inputs))
        return partial(torch.autograd.grad, outputs, wanted(self.inputs), self.ups)

    def answers(self, function: Function, inputs: Inputs | None = None, ups: list[torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Results by name: outputs, gradients, and of a function that writes in place its inputs after it."""
        if inputs is None:
            self.restore()
            inputs, ups = self.inputs, self.ups
        output = function(inputs)
        found = {f"output {i}": x.detach().clone() for i, x in enumerate(results(output))}
        if self.case.in_place:
            found |= {f"input {i} after it": t.detach().clone() for i, t in enumerate(_tensors(inputs)) if t.is_floating_point()}
        if self.case.backward_cost:
            names = [name for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad]
            gradients = torch.autograd.grad(self._differentiable(output), wanted(inputs), ups)
            found |= {f"gradient of {name}": gradient.clone() for name, gradient in zip(names, gradients, strict=True)}
        return found

    def judge(self, functions: dict[str, Function]) -> dict[str, str]:
        """What is wrong with each function's results, or nothing."""
        same = self.answers(self.reference)
        self.restore()
        exact = self.answers(self.reference, _wide(self.inputs), [up.double() for up in self.ups])

        def verdict(name, call):
            answers = self.answers(call)  # of a peer that computes something near too: it must run
            return "" if name in self.case.unlike else compare(answers, exact, same, peer=name != "ours")

        return {name: _attempt(partial(verdict, name, call), name) for name, call in functions.items()}


class DeviceLost(RuntimeError):
    """A call has left the GPU's context unusable: whatever this process asked of it next would fail too. The message names the call."""


def _attempt(question: Callable[[], str], name: str) -> str:
    try:
        return question()
    except DeviceLost:
        raise
    except Exception as error:  # whatever a kernel or a peer fails with, the others are still measured
        what = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:160]}"
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                raise DeviceLost(f"{name}: {what}") from lost
        return what


def compare(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], same: dict[str, torch.Tensor], *, peer: bool = False) -> str:
    """Where results err more than twice as far from `exact` as `same` (the reference in their dtype) does, and two roundings; or nothing.

    Errors are the largest of an element and the root of the mean square. A peer, which must compute the same thing but may round more
    often, or to another dtype, may err 16 times as far.
    """
    if list(got) != list(exact):
        return f"returns {', '.join(got)}, not {', '.join(exact)}"
    for what, ours in got.items():
        truth, usual = exact[what], same[what]
        if ours.shape != truth.shape or (ours.dtype != usual.dtype and not peer):
            return f"{what} is {tuple(ours.shape)} {ours.dtype}, not {tuple(truth.shape)} {usual.dtype}"
        if not ours.numel():
            continue
        floor = 2 * max(torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0 for x in (ours, usual))
        for measure in (lambda x: x.abs().max().item(), lambda x: x.square().mean().sqrt().item()):
            error, plain, size = (measure(x.double()) for x in (ours.double() - truth, usual.double() - truth, truth))
            if not error <= (16 if peer else 2) * plain + floor * size:  # NaN is wrong too
                return f"{what}: error {error:.3g}, PyTorch's {plain:.3g}, of size {size:.3g}"
    return ""


@dataclass
class Measured:
    """Runs of one contestant."""

    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    peak: int = 0


def measure(work: Workload, contestants: dict[str, Function], direction: str, timer, rounds: int) -> dict[str, Measured]:
    """Time all contestants in turns, each round beginning with the next one. `timer` is a CudaTimer, or behaves as one."""
    found, lead = {name: Measured() for name in contestants}, {}
    for name, function in contestants.items():
        for _ in range(WARM_UP):
            lead[name] = 1.5 * timer(work.ready(function, direction), 0.0)[1]
        found[name].peak = timer.peak(work.ready(function, direction))
    names = list(contestants)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds, host = timer(work.ready(contestants[name], direction), lead[name])
            found[name].seconds.append(seconds)
            found[name].host.append(host)
    return found


KEY = ("kernel", "variant", "shape", "dtype", "direction")

COLUMNS = (
    *KEY, "wrong", "p20_ms", "p50_ms", "p80_ms", "gb_per_s", "tflop_per_s", "roof_share",
    "peak_bytes", "host_ms", *(f"{peer}_{what}" for peer in PEERS for what in ("ms", "ratio", "peak_bytes")),
)  # fmt: skip


def row_of(work: Workload, direction: str, found: dict[str, Measured], roof: Roof | None) -> dict[str, object]:
    """A row of figures; of a peer its median, that over ours, and its peak memory."""
    nbytes, flops = cost_of(work, direction)
    low, middle, high = quantiles(found["ours"].seconds)
    row = head_of(work.case, work.shape, work.dtype, direction) | dict(
        p20_ms=_short(1e3 * low), p50_ms=_short(1e3 * middle), p80_ms=_short(1e3 * high), gb_per_s=_short(nbytes / middle / 1e9),
        tflop_per_s=_short(flops / middle / 1e12), roof_share=_short(roof.seconds(nbytes, flops) / middle) if roof else "",
        peak_bytes=found["ours"].peak, host_ms=_short(1e3 * quantiles(found["ours"].host)[1]),
    )  # fmt: skip
    for name, theirs in found.items():
        if name != "ours":
            median = quantiles(theirs.seconds)[1]
            row |= {f"{name}_ms": _short(1e3 * median), f"{name}_ratio": _short(median / middle), f"{name}_peak_bytes": theirs.peak}
    return row


def head_of(case: Case, shape: tuple[int, ...], dtype: torch.dtype, direction: str, wrong: str = "") -> dict[str, object]:
    """What a row is about."""
    return dict(kernel=case.name, variant=case.variant, shape=_times(shape), dtype=_dtype(dtype), direction=direction, wrong=wrong)


def directions_of(case: Case) -> tuple[str, ...]:
    """What of a case is measured."""
    return ("forward", "backward") if case.backward_cost else ("forward",)


def cost_of(work: Workload, direction: str) -> tuple[int, int]:
    """(bytes, FLOPs) of one direction."""
    return (work.case.cost if direction == "forward" else work.case.backward_cost)(work.shape, work.dtype)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _dtype(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def workloads(cases: Sequence[Case], dtypes: Iterable[torch.dtype]) -> list[tuple[Case, tuple[int, ...], torch.dtype]]:
    """What there is to measure: the first shape of every case, then the second of each, so that an early end leaves no kernel out."""
    dtypes = list(dtypes)
    most = max((len(case.shapes) for case in cases), default=0)
    return [(case, case.shapes[n], d) for n in range(most) for d in dtypes for case in cases if n < len(case.shapes) and d in case.dtypes]


class Bench:
    """The measuring itself, on whatever device and by whatever timer. Rows go to `table` as they come."""

    def __init__(self, device: str, timer, roof: Roof | None, table: Table, *, rounds: int = 30, impl: str = "triton"):
        self.device, self.timer, self.roof, self.table, self.rounds, self.impl = device, timer, roof, table, rounds, impl
        self.failed = 0
        self.absent: set[str] = set()

    def run(self, work: list[tuple[Case, tuple[int, ...], torch.dtype]], seconds: float = math.inf) -> int:
        """Measure until all is done or so many seconds are over; returns how many workloads are left. DeviceLost where none can follow."""
        began = time.monotonic()
        for number, (case, shape, dtype) in enumerate(work):
            if time.monotonic() - began >= seconds:
                return len(work) - number
            try:
                wrong = _attempt(lambda case=case, shape=shape, dtype=dtype: self.one(case, shape, dtype), "a measured call")
            except DeviceLost as lost:
                self._refuse(case, shape, dtype, f"the GPU was lost to {lost}")
                raise
            if wrong:
                self._refuse(case, shape, dtype, wrong)
        return 0

    def _refuse(self, case: Case, shape: tuple[int, ...], dtype: torch.dtype, wrong: str) -> None:
        self.failed += 1
        print(f"{case.title:32} {_times(shape):24} {_dtype(dtype)}  NOT REPORTED: {wrong}", flush=True)
        for direction in directions_of(case):
            self.table.write(head_of(case, shape, dtype, direction, wrong))

    def one(self, case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        """Prove and measure one workload; returns what is wrong with ours, or nothing."""
        peers = case.installed_peers()
        self.absent |= case.peers.keys() - peers.keys()
        if shape != case.shapes[0]:
            peers.pop("torch.compile", None)
        elif "torch.compile" in peers:
            torch.compiler.reset()  # its limit of recompilations would otherwise have later dtypes run uncompiled
        work = Workload(case, shape, dtype, self.device)
        contestants = {"ours": lambda inputs: case.call(inputs, self.impl)} | peers
        verdicts = work.judge(contestants)
        if verdicts["ours"]:
            return verdicts["ours"]
        for name, verdict in verdicts.items():
            if verdict:
                print(f"  {name} left out of {case.title} {_times(shape)} {_dtype(dtype)}: {verdict}", flush=True)
        contestants = {name: function for name, function in contestants.items() if not verdicts[name]}
        for direction in directions_of(case):
            found = measure(work, contestants, direction, self.timer, self.rounds)
            row = row_of(work, direction, found, self.roof)
            self.table.write(row)
            print(line_of(case.title, row, list(found)), flush=True)
        return ""


def points_of(table: Table, cases: Sequence[Case] = CASES) -> tuple[list[Point], list[str]]:
    """For the picture: of each case and direction its first workload in the table, bf16 before others; and the commits they are of."""
    points: dict[tuple[str, str], Point] = {}
    commits: dict[str, None] = {}
    for case, shape, dtype in workloads(cases, DTYPES.values()):
        for direction in directions_of(case):
            head = head_of(case, shape, dtype, direction)
            row = table.rows.get(tuple(head[name] for name in KEY), {})
            if row.get("p50_ms") and (case.title, direction) not in points:
                seconds = float(row["p50_ms"]) * 1e-3
                nbytes, flops = 1e9 * seconds * float(row["gb_per_s"]), 1e12 * seconds * float(row["tflop_per_s"])
                points[case.title, direction] = Point(case.title, direction, nbytes, flops, seconds, measured=True)
                commits[f"{row['commit'] or 'unknown'}{' with changes' if str(row['dirty']) == 'True' else ''}"] = None
    return list(points.values()), list(commits)


def line_of(title: str, row: dict[str, object], contestants: list[str]) -> str:
    """A row for people: ours, and below it the rest."""
    share = f"{row['roof_share']:5.0%} of the roof" if row["roof_share"] != "" else "roof unknown"
    peers = "".join(f", {name} {row[f'{name}_ratio']:.2f}x" for name in contestants if name != "ours")
    return (
        f"{title:26} {row['shape']:12} {row['dtype']} {row['direction']:8} {row['p50_ms']:9.4f} ms {row['gb_per_s']:7,.0f} GB/s"
        f" {row['tflop_per_s']:8.2f} TFLOP/s {share}\n"
        f"    {row['p20_ms']:.4f} to {row['p80_ms']:.4f} ms, host {row['host_ms']:.3f} ms, {format_bytes(row['peak_bytes'])}{peers}"
    )


def predict(names: Sequence[str], dtypes: Sequence[torch.dtype], svg: Path | None) -> int:
    """Without a GPU: the compile gate's table, and what the roofline allows an H100; the gate's exit status."""
    cases = select(names)
    print("compile gate, no GPU needed:")
    status = _attempt_gate(names)
    print(f"\npredicted, not measured: the least that {H100.name} could take at its stated {H100.bandwidth / 1e12:.2f} TB/s and"
          f" {H100.flops / 1e12:.0f} TFLOP/s (bf16)")  # fmt: skip
    print(f"{'kernel':41} {'shape':25} {'dtype':5} {'direction':9} {'MB moved':>10} {'GFLOP':>9} {'FLOP/byte':>9} {'predicted us':>13}")
    points: dict[tuple[str, str], Point] = {}
    for case in cases:
        for shape in case.shapes:
            for dtype in (d for d in dtypes if d in case.dtypes):
                for direction, cost in (("forward", case.cost), ("backward", case.backward_cost)):
                    if cost is None:
                        continue
                    nbytes, flops = cost(shape, dtype)
                    seconds = H100.seconds(nbytes, flops)
                    points.setdefault((case.title, direction), Point(case.title, direction, nbytes, flops, seconds, measured=False))
                    print(f"{case.title:41} {_times(shape):25} {_dtype(dtype):5} {direction:9} {nbytes / 1e6:10.2f} {flops / 1e9:9.3f}"
                          f" {flops / nbytes:9.2f} {1e6 * seconds:13.2f}")  # fmt: skip
    if svg is not None:
        draw(svg, H100, list(points.values()), "predicted, not measured: where each kernel's bytes and FLOPs put it")
    return status


def _attempt_gate(names: Sequence[str]) -> int:
    try:
        return compile_gate.report(compile_gate.rows(names))
    except RuntimeError as error:
        print(f"kernels: no table of the compile gate: {error}", file=sys.stderr)
        return 2


def draw(path: Path, roof: Roof, points: list[Point], note: str) -> None:
    """Write the picture, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(picture(roof, points, note))
    print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where a kernel is wrong (without a GPU: breaks its budget); 2 for what cannot be measured here."""
    parser = command("kernels", __doc__)
    known = ", ".join(dict.fromkeys(case.name for case in CASES))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; all where none is given")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"], help="default: bf16 fp32")
    parser.add_argument("--rounds", type=int, default=30, help="timed runs of each contestant, default %(default)s")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no workload after so many [s], default never; first shapes come first")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="on a GPU alone, default: results/<gpu>/kernels.csv")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="default on a GPU: roofline.svg beside the CSV file")
    options = parser.parse_args(argv)
    dtypes = [DTYPES[name] for name in options.dtype]
    try:
        cases = select(options.names)
    except ValueError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 2
    if options.rounds < 2:
        print(f"kernels: --rounds {options.rounds}: percentiles need at least 2", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        if options.csv:
            print("kernels: --csv: no GPU, so nothing is measured; benchmarks.compile_gate has a --csv for its own table", file=sys.stderr)
            return 2
        return predict(options.names, dtypes, options.svg)
    device = torch.device("cuda", torch.cuda.current_device())
    found = board(device)
    roof, facts = roof_of(torch.cuda.get_device_name(device), found), stamp(found, options.commit)
    print(stamped(facts))
    print(f"roof: {roof.bandwidth / 1e12:.2f} TB/s, {roof.flops / 1e12 if roof.flops else math.nan:.0f} TFLOP/s" if roof else "roof: unknown GPU")
    try:
        table = Table(options.csv or RESULTS / machine() / "kernels.csv", COLUMNS, facts, KEY)
    except ValueError as error:
        print(f"kernels: --csv {error}", file=sys.stderr)
        return 2
    bench = Bench(str(device), CudaTimer(device), roof, table, rounds=options.rounds)
    return conclude(bench, workloads(cases, dtypes), options.seconds, options.svg or table.path.with_name("roofline.svg"))


def conclude(bench: Bench, work: list[tuple[Case, tuple[int, ...], torch.dtype]], seconds: float, svg: Path) -> int:
    """Run it, and say what is left, wrong and written; the exit status."""
    try:
        if left := bench.run(work, seconds):
            print(f"{left} of {len(work)} workloads not measured: --seconds {seconds:g} are over")
    except DeviceLost as lost:
        print(f"kernels: stopped, for no call of this process can use the GPU after {lost}", file=sys.stderr)
    if bench.absent:
        print(f"peers not installed: {', '.join(sorted(bench.absent))}")
    if bench.table.rows:
        print(f"wrote {bench.table.path}")
    points, commits = points_of(bench.table)
    if bench.roof and any(point.flops for point in points):
        draw(svg, bench.roof, points, note_of(bench.table.stamp, commits))
    if bench.failed:
        print(f"kernels: {bench.failed} workloads are wrong, and not reported", file=sys.stderr)
    return 1 if bench.failed else 0


def note_of(facts: dict[str, object], commits: list[str]) -> str:
    """The picture's second line."""
    cap = f", power cap {facts['power_cap_watts']:.0f} W" if facts["power_cap_watts"] else ""
    return f"measured at commit {', '.join(commits)}, the last {facts['date']}{cap}; the first shape of each kernel, with its share of the roof"


if __name__ == "__main__":
    sys.exit(main())
