"""Gated activations of a feed-forward layer: swiglu = silu(gate) * up, geglu = gelu_tanh(gate) * up.

Shapes: gate, up and the result (..., F). Computed in fp32 (float64 for float64), rounded once at the end.
Reads gate and up, writes the product: 3 * N * F * itemsize bytes forward.
Source: Shazeer 2020 (arXiv 2002.05202); gelu in its tanh form, as GPT-2 and Gemma use it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from nanotrain.kernels.cpu import call, dense
from nanotrain.kernels.runtime import choose, compute_dtype
from torch.autograd.function import once_differentiable

EXAMPLES = ((8, 64), (3, 80), (1, 1), (5, 257))
"""Shapes (rows, F) that tests and benchmarks share."""


class _Gated(torch.autograd.Function):
    """act(gate) * up that keeps its two inputs alone: autograd would keep wide copies of them and of act(gate)."""

    @staticmethod
    def forward(ctx, gate, up, act, act_backward):
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.act_backward = act, act_backward
        dtype = compute_dtype(gate)
        return (act(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)

    @staticmethod
    def backward(ctx, grad):
        narrow, dtype = grad.dtype, compute_dtype(grad)
        gate, up = (x.to(dtype) for x in ctx.saved_tensors)
        grad = grad.to(dtype)
        return ctx.act_backward(grad * up, gate).to(narrow), ctx.act(gate).mul_(grad).to(narrow), None, None


def swiglu_reference(gate, up):
    """silu(gate) * up in plain PyTorch."""
    return _Gated.apply(gate, up, F.silu, torch.ops.aten.silu_backward)


def geglu_reference(gate, up):
    """gelu(gate, tanh form) * up in plain PyTorch."""
    return _Gated.apply(gate, up, partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh"))


class _Native(torch.autograd.Function):
    """`op`, "swiglu" or "geglu", in one pass over memory each way."""

    @staticmethod
    def forward(ctx, gate, up, op):
        gate, up = dense(gate), dense(up)
        ctx.save_for_backward(gate, up)
        ctx.op = op
        out = torch.empty_like(gate)
        call(op, gate.dtype, gate, up, out, out.numel())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        call(f"{ctx.op}_back", gate.dtype, dense(grad), gate, up, grad_gate, grad_up, grad_gate.numel())
        return grad_gate, grad_up, None


def _check(op, gate, up):
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"{op}: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} differ")


def swiglu(gate, up, *, impl="auto"):
    """silu(gate) * up for gate and up (..., F) of one dtype. Differentiable in both. ValueError where they differ."""
    _check("swiglu", gate, up)
    if choose("swiglu", impl, gate, up, native=gate.is_floating_point()) == "native":
        return _Native.apply(gate, up, "swiglu")
    return swiglu_reference(gate, up)


def geglu(gate, up, *, impl="auto"):
    """gelu(gate) * up for gate and up (..., F) of one dtype. Differentiable in both. ValueError where they differ."""
    _check("geglu", gate, up)
    if choose("geglu", impl, gate, up, native=gate.is_floating_point()) == "native":
        return _Native.apply(gate, up, "geglu")
    return geglu_reference(gate, up)


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one forward for inputs of `shape`."""
    elements = torch.Size(shape).numel()
    return 3 * elements * dtype.itemsize, 6 * elements
