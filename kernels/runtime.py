"""Which implementation serves a call: is Triton here, is the tensor on a device it can serve, and which path ran."""

from __future__ import annotations

import importlib.util
from collections import Counter
from functools import cache

import torch

IMPLEMENTATIONS = ("auto", "triton", "reference")

launches: Counter[str] = Counter()
"""Triton launches by kernel name, so that a test can see which path a call took."""


@cache
def has_triton() -> bool:
    """True where the triton package can be imported."""
    return importlib.util.find_spec("triton") is not None


def choose(op: str, impl: str, *tensors: torch.Tensor, triton: bool = False) -> str:
    """Return "triton" or "reference" for a call of `op` on `tensors`.

    `triton` says whether the op has a Triton kernel. "auto" takes it for tensors on a GPU; "triton" takes it or raises,
    never falling back in silence; "reference" always works.

    Raises ValueError for an unknown `impl` or for tensors on different devices, RuntimeError where `impl="triton"`
    cannot be served.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl={impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"{op}: tensors on different devices ({', '.join(sorted(map(str, devices)))}); move them to one")
    if impl == "reference":
        return "reference"
    on_gpu = all(device.type == "cuda" for device in devices)
    if impl == "auto":
        return "triton" if triton and on_gpu and has_triton() else "reference"
    if not triton:
        raise RuntimeError(f"{op}: impl='triton' asked for, but {op} has no Triton kernel; use impl='auto'")
    if not has_triton():
        raise RuntimeError(f"{op}: impl='triton' asked for, but triton is not installed; pip install triton")
    return "triton"


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype a reference computes in: the widest of the inputs and fp32, so float64 stays float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
