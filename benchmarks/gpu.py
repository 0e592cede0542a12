"""python -m benchmarks.gpu [--minutes 8]: all that a GPU is asked, in one command: the kernels' tests, the kernel table, the whole-step table.

Each part runs in a process of its own with its share of the time that is left; one that takes longer is cut short, and the next ones run.
What parts say and write goes to results/<gpu>/ as it comes: tests.log, kernels.log, step.log, kernels.csv, roofline.svg, step.csv, and
summary.txt at the end. The exit status is 1 where a part failed or was cut short.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import RESULTS
from benchmarks.kernels import machine

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """A command with its share of the time."""

    name: str
    weight: float
    """Its share is this over the sum of this and those of the parts after it."""
    command: Callable[[float], list[str]]
    """(seconds it may take) -> arguments."""


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    name: str
    seconds: float
    code: int | None
    """Exit status; None where it was cut short."""

    def __str__(self):
        end = "cut short" if self.code is None else "done" if self.code == 0 else f"failed, exit status {self.code}"
        return f"{self.name:8} {self.seconds:6.1f} s  {end}"


def parts(out: Path) -> list[Part]:
    """What is run. The kernel table ends by itself a little before it would be cut short, so that its picture is drawn."""
    python = [sys.executable, "-u", "-m"]
    return [
        Part("tests", 3.0, lambda _: [*python, "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"]),
        Part("kernels", 4.0, lambda seconds: [*python, "benchmarks.kernels", f"--seconds={0.8 * seconds:.0f}", f"--csv={out / 'kernels.csv'}",
                                              f"--svg={out / 'roofline.svg'}"]),
        Part("step", 3.0, lambda _: [*python, "benchmarks.step", f"--csv={out / 'step.csv'}"]),
    ]  # fmt: skip


def run(chosen: Sequence[Part], seconds: float, out: Path) -> list[Outcome]:
    """Run the parts one after another within so many seconds in all; their output goes to the console and to <out>/<name>.log."""
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + seconds
    outcomes = []
    for number, part in enumerate(chosen):
        left = max(0.0, ends - time.monotonic())
        share = left * part.weight / sum(p.weight for p in chosen[number:])
        print(f"gpu: {part.name}, at most {share:.0f} s of {left:.0f} s left", flush=True)
        outcomes.append(run_part(part, share, out / f"{part.name}.log"))
        print(f"gpu: {outcomes[-1]}", flush=True)
    return outcomes


def run_part(part: Part, seconds: float, log: Path) -> Outcome:
    """Run one part, at most so many seconds."""
    began = time.monotonic()
    # In a session of its own, so that the processes it starts can be ended with it.
    process = subprocess.Popen(part.command(seconds), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", start_new_session=True)  # fmt: skip
    with log.open("w") as file:
        reader = threading.Thread(target=_copy, args=(process.stdout, file), daemon=True)
        reader.start()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
            reader.join(5)  # what left the session may hold the pipe still
    return Outcome(part.name, time.monotonic() - began, code)


def _copy(source, file) -> None:
    for line in source:
        file.write(line)
        file.flush()
        print(line, end="", flush=True)


def _end(process: subprocess.Popen) -> None:
    """End what is left of a part: it, and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a part failed or was cut short, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything [min]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: results/<gpu>")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu: needs an NVIDIA GPU, and this machine has none that torch can use", file=sys.stderr)
        return 2
    if not options.minutes > 0:
        print(f"gpu: --minutes {options.minutes:g}: must be positive", file=sys.stderr)
        return 2
    out = (options.out or RESULTS / machine()).resolve()
    outcomes = run(parts(out), 60 * options.minutes, out)
    text = "\n".join(map(str, outcomes))
    (out / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\nwrote {out}")
    return 0 if all(outcome.code == 0 for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
