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

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, Any]:
    """Versions, machine and the state of the source tree, for env.json. Holds no environment variables."""
    packages = {}
    for name in ("torch", "triton", "numpy", "sentencepiece", "safetensors", "nanotrain"):
        packages[name] = version(name)
    facts: dict[str, Any] = dict(
        python=sys.version.split()[0], system=platform.platform(), processor=processor_name(), cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(), memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), packages=packages,
        gpu=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    )  # fmt: skip
    if (ROOT / ".git").exists():
        facts["git_commit"], diff = git("rev-parse", "HEAD"), git("diff", "HEAD")
        facts["git_diff"] = None if diff is None else diff[:200_000]
    return facts


def version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """What git says of the source tree; None where it is no repository, or git fails."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


GPUS = (
    # NVIDIA's data sheets, tensor figures without sparsity. The first whose words all stand in the GPU's name is taken.
    (("H100", "PCIe"), 2.0e12, 756e12),  # H100 Tensor Core GPU, PCIe column
    (("H100", "NVL"), 3.938e12, 835e12),  # H100 NVL product brief
    (("H100",), 3.35e12, 989e12),  # H100 Tensor Core GPU, SXM column
    (("H200",), 4.8e12, 989e12),  # H200 Tensor Core GPU, SXM column
    (("GH200",), 4.0e12, 989e12),  # GH200 Grace Hopper Superchip, 96 GB of HBM3
    (("B200",), 8.0e12, 2250e12),  # DGX B200, an eighth
    (("A100", "80GB", "PCIe"), 1.935e12, 312e12),  # A100 Tensor Core GPU, 80 GB PCIe column
    (("A100", "80GB"), 2.039e12, 312e12),  # A100 Tensor Core GPU, 80 GB SXM column
    (("A100",), 1.555e12, 312e12),  # A100 Tensor Core GPU, 40 GB
    (("L40S",), 0.864e12, 362e12),  # L40S
    (("4090",), 1.008e12, 165e12),  # Ada GPU architecture, appendix A, fp32 sums
)
"""(words of the name, bytes/s of its memory, dense bf16 FLOP/s with fp32 sums)."""


def stated_peaks(name: str) -> tuple[float, float] | None:
    """(bytes/s of its memory, dense bf16 FLOP/s) of a GPU by torch's name of it; None for one that the table lacks, or a slice of one."""
    words = name.lower().replace("-", " ").split()
    if "mig" in words or "laptop" in words:  # whose peaks are lower than those of the GPU that it is named after
        return None
    return next(((bandwidth, flops) for needed, bandwidth, flops in GPUS if all(need.lower() in words for need in needed)), None)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the GPU by its name; None where unknown."""
    peaks = stated_peaks(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return peaks[1] if peaks else None
