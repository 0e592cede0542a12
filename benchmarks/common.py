"""What the benchmarks share: timing, interleaving, and where results go."""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import torch

from nanotrain.environment import environment

RESULTS = Path(__file__).parent / "results"


def interleaved(candidates: dict[Hashable, Callable[[], object]], rounds: int, warm_up: int = 3) -> dict[Hashable, list[float]]:
    """Seconds of each call, the candidates taking turns, so that a slow moment of the machine hits all of them.

    Each round begins with the next candidate: none always finds what the same other one left (warm pages, a busy disk).
    """
    for _ in range(warm_up):
        for call in candidates.values():
            call()
    times: dict[Hashable, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - started)
    return times


def ratios(times: dict[Hashable, list[float]], ours: Hashable, theirs: Hashable) -> list[float]:
    """How many times faster ours is in each round: theirs / ours."""
    return [t / o for o, t in zip(times[ours], times[theirs], strict=True)]


def ratio(times: dict[Hashable, list[float]], ours: Hashable, theirs: Hashable) -> float:
    """How many times faster ours is: the median over rounds."""
    return statistics.median(ratios(times, ours, theirs))


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def write_rows(name: str, rows: list[dict]) -> Path:
    """Write rows to results/<machine>/<name>.csv, each with the machine, versions and commit."""
    facts = environment()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    machine = facts["gpu"][0].replace(" ", "-") if facts["gpu"] else "cpu"
    stamp = dict(machine=facts["gpu"][0] if facts["gpu"] else facts["processor"], cores=facts["cores"], threads=torch.get_num_threads(),
                 python=sys.version.split()[0], torch=torch.__version__, commit=commit)  # fmt: skip
    path = RESULTS / machine / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *stamp])
        writer.writeheader()
        writer.writerows(row | stamp for row in rows)
    return path
