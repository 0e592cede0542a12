"""What a run computes on: versions, machine, and the state of the source tree."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Versions, machine and the state of the source tree, for env.json. Holds no environment variables."""
    packages = {}
    for name in ("torch", "triton", "numpy", "sentencepiece", "safetensors", "nanotrain"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    facts: dict[str, Any] = dict(
        python=sys.version.split()[0], system=platform.platform(), processor=processor_name(), cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(), memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), packages=packages,
        gpu=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    )  # fmt: skip
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        for key, command in (("git_commit", ["rev-parse", "HEAD"]), ("git_diff", ["diff", "HEAD"])):
            try:
                done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10, errors="replace")
                facts[key] = done.stdout.strip()[:200_000] if done.returncode == 0 else None
            except (OSError, subprocess.TimeoutExpired):
                facts[key] = None
    return facts


def processor_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the GPU by its name; None where unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
    return next((flops for key, flops in known.items() if key in name), None)
