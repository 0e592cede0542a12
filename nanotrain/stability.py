"""What a run watches its own losses and updates for, and what reproducible bits cost on a GPU."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch

WINDOW = 128
"""Losses that a spike is judged against."""
SAMPLED = 1 << 16
"""Elements of a tensor that its update is judged by."""


def spiked(recent: list[float], loss: float, sigma: float) -> bool:
    """Whether `loss` stands more than `sigma` standard deviations over the mean of the last 128, once there are so many; 0 never."""
    return sigma > 0 and len(recent) >= WINDOW and loss > statistics.fmean(recent) + sigma * max(statistics.pstdev(recent), 1e-3)


def plateau(losses: list[float], steps: int, least: float = 0.005) -> tuple[float, float] | None:
    """(mean before, mean after) where the last `steps` losses lie less than a share `least` below the `steps` before them."""
    if not steps or len(losses) < 2 * steps:
        return None
    before, after = statistics.fmean(losses[-2 * steps : -steps]), statistics.fmean(losses[-steps:])
    return (before, after) if after > before * (1 - least) else None


def sampled(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Copies of at most 65,536 evenly spaced elements of each tensor, on its device."""
    # An odd spacing meets every column of a matrix whose width is a power of two.
    return [weight.detach().reshape(-1)[:: -(-weight.numel() // SAMPLED) | 1].clone() for weight in weights.values()]


def update_ratios(before: list[torch.Tensor], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """|update| / |weight| of each tensor since `before` was `sampled`, in their order and on their device.

    0 where nothing changed; not finite where the weight was 0.
    """
    changes = torch.stack(torch._foreach_norm(torch._foreach_sub(sampled(weights), before)))
    return torch.where(changes == 0, changes, changes / torch.stack(torch._foreach_norm(before)))


def reserve_workspace() -> None:
    """Tell cuBLAS of a workspace of its own, without which its bits need not repeat: before its first product, or it is not heard."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # it takes this by no other way


def make_deterministic(forward_backward: Callable[[], object], repeats: int = 5) -> float:
    """Let a GPU use only kernels whose bits repeat; returns how many times longer `forward_backward` takes with them.

    `reserve_workspace` must have been called before anything was computed.
    """

    def seconds() -> float:
        forward_backward()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            forward_backward()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    free = seconds()
    torch.use_deterministic_algorithms(True)
    return seconds() / free
