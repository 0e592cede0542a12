"""python -m benchmarks.gpu [--minutes 8]: all that a GPU is asked, in one command: the kernels' tests, the kernel table, the whole-step table.

Each part runs in a process of its own with its share of the time that is left; one that takes longer is cut short, and the next ones run.
The test files run side by side. What parts say and write goes to results/<gpu>/ as it comes: tests.log, kernels.log, step.log, kernels.csv,
roofline.svg, step.csv, and summary.txt at the end. The exit status is 1 where a part failed, was cut short or could not run.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import RESULTS
from benchmarks.kernels import command, machine

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """A command with its share of the time."""

    name: str
    weight: float
    """Its share is this over the sum of this and those of the parts after it."""
    command: Callable[[float], list[str]]
    """(seconds it may take) -> arguments."""
    needs: tuple[str, ...] = ()
    """Packages without which it is not run."""


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    name: str
    seconds: float
    code: int | None
    """Exit status; None where it was cut short or not run."""
    absent: tuple[str, ...] = ()
    """Packages that it lacked to run."""

    def __str__(self):
        end = "cut short" if self.code is None else "done" if self.code == 0 else f"failed, exit status {self.code}"
        if self.absent:
            end = f"not run: {', '.join(self.absent)} not installed"
        return f"{self.name:8} {self.seconds:6.1f} s  {end}"


def parts(out: Path, commit: str | None = None) -> list[Part]:
    """What is run. The tables end by themselves a little before they would be cut short, so that they say what is left."""
    python = [sys.executable, "-u", "-m"]
    given = [f"--commit={commit}"] if commit else []
    return [
        Part("tests", 3.0, lambda _: [*python, "benchmarks.gpu", "--only-tests"], needs=("pytest", "hypothesis")),
        Part("kernels", 4.0, lambda seconds: [*python, "benchmarks.kernels", f"--seconds={0.8 * seconds:.0f}", f"--csv={out / 'kernels.csv'}",
                                              f"--svg={out / 'roofline.svg'}", *given]),
        Part("step", 3.0, lambda seconds: [*python, "benchmarks.step", f"--seconds={0.8 * seconds:.0f}", f"--csv={out / 'step.csv'}", *given]),
    ]  # fmt: skip


WORKERS = 8
"""Most test files at once: each is a process with a CUDA context, and a few fill several GB."""


def test_files() -> list[Path]:
    """The tests that ask something of a GPU, the longest files first. native.py is the CPU's."""
    files = [path for path in (ROOT / "tests/kernels").glob("test_*.py") if not path.name.startswith("test_native")]
    return sorted([*files, ROOT / "tests/test_graphs.py"], key=lambda path: -path.stat().st_size)


def run_tests(files: Sequence[Path]) -> int:
    """Run each file in a pytest of its own, side by side: kernels' compilation, which takes most of the time, is the processors' work.

    Lines come as they are said, each after its file's name. Returns 1 where a file failed.
    """
    cores = len(os.sched_getaffinity(0))
    workers = min(WORKERS, cores, len(files))
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // workers))}  # or each would start a thread for every core

    def one(path: Path) -> int:
        arguments = [sys.executable, "-u", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
        with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace", env=environment) as process:  # fmt: skip
            for line in process.stdout:
                sys.stdout.write(f"{path.stem}: {line}")
                sys.stdout.flush()
        return process.returncode

    with ThreadPoolExecutor(workers) as pool:
        codes = list(pool.map(one, files))
    failed = [path.stem for path, code in zip(files, codes, strict=True) if code]
    print(f"{len(files)} files, failed: {', '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


def run(chosen: Sequence[Part], seconds: float, out: Path) -> list[Outcome]:
    """Run the parts one after another within so many seconds in all; their output goes to the console and to <out>/<name>.log."""
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + seconds
    outcomes = []
    for number, part in enumerate(chosen):
        absent = tuple(package for package in part.needs if importlib.util.find_spec(package) is None)
        if absent:
            outcomes.append(Outcome(part.name, 0.0, None, absent))
            print(f"gpu: {outcomes[-1]}", flush=True)
            continue
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
    """Returns 0, 1 where a part failed, was cut short or could not run, 2 without a GPU."""
    parser = command("gpu", __doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything [min], default %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: results/<gpu>")
    parser.add_argument("--only-tests", action="store_true", help="the tests alone, until they end")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu: needs an NVIDIA GPU, and this machine has none that torch can use", file=sys.stderr)
        return 2
    if not options.minutes > 0:
        print(f"gpu: --minutes {options.minutes:g}: must be positive", file=sys.stderr)
        return 2
    if options.only_tests:
        return run_tests(test_files())
    out = (options.out or RESULTS / machine()).resolve()
    outcomes = run(parts(out, options.commit), 60 * options.minutes, out)
    text = "\n".join(map(str, outcomes))
    (out / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\nwrote {out}")
    return 0 if all(outcome.code == 0 for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
