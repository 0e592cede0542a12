"""Which implementation serves a call: is Triton here, is a C++ library, is the tensor one that they can serve, and which path ran."""

from __future__ import annotations

import importlib.util
from collections import Counter
from functools import cache

import torch
from nanotrain.kernels.native import library

IMPLEMENTATIONS = ("auto", "triton", "native", "reference")

launches: Counter[str] = Counter()
"""Launches of Triton kernels and calls of C++ functions by name, so that a test can see which path a call took."""


@cache
def has_triton() -> bool:
    """True where the triton package can be imported."""
    return importlib.util.find_spec("triton") is not None


def has_native(dtype: torch.dtype, device: torch.device) -> bool:
    """True where C++ serves tensors of this dtype and device. The first to ask has it compiled; where that fails, it is said once."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and library("train") is not None


def choose(op: str, impl: str, *tensors: torch.Tensor, triton: bool = False, native: bool = False) -> str:
    """Return "triton", "native" or "reference" for a call of `op` on `tensors`.

    `triton` and `native` say whether the op has a Triton kernel or a C++ function for arguments like these. "auto" takes the first for
    tensors on a GPU and the second for plain tensors in fp32 or bf16 on a CPU; "triton" and "native" take theirs or raise, never falling
    back in silence; "reference" always works.

    Raises ValueError for an unknown `impl` or for tensors on different devices, RuntimeError where `impl="triton"` or `impl="native"`
    cannot be served.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl={impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"{op}: tensors on different devices ({', '.join(sorted(map(str, devices)))}); move them to one")
    if impl == "reference":
        return "reference"
    if impl == "native":
        if (hindrance := _hindrance(tensors, native)) is not None:
            raise RuntimeError(f"{op}: impl='native' asked for, but {hindrance}; use impl='auto'")
        return "native"
    on_gpu = all(device.type == "cuda" for device in devices)
    if impl == "auto":
        if triton and on_gpu and has_triton():
            return "triton"
        return "native" if native and _hindrance(tensors, native) is None else "reference"
    if not triton:
        raise RuntimeError(f"{op}: impl='triton' asked for, but {op} has no Triton kernel; use impl='auto'")
    if not has_triton():
        raise RuntimeError(f"{op}: impl='triton' asked for, but triton is not installed; pip install triton")
    return "triton"


def _hindrance(tensors: tuple[torch.Tensor, ...], native: bool) -> str | None:
    """What keeps C++, which reads the memory of tensors, from serving them; None where nothing does."""
    if not native:
        return "there is no C++ for these arguments"
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            return f"a tensor is a {type(tensor).__name__} of layout {tensor.layout}, no plain memory"
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.int64):
            return f"a tensor is in {tensor.dtype}, neither float32 nor bfloat16"
    # What watches or transforms PyTorch's operators (a memory plan's tensors without storage, a tracer, torch.func) would not see C++.
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return "torch traces or transforms this call"
    return None if library("train") is not None else "its library cannot be had"


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype a reference computes in: the widest of the inputs and fp32, so float64 stays float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
