"""Gated activations of a feed-forward layer: swiglu = silu(gate) * up, geglu = gelu_tanh(gate) * up.

Shapes: gate, up and the result (..., F). Computed in fp32 (float64 for float64), rounded once at the end.
Reads gate and up, writes the product: 3 * N * F * itemsize bytes forward; the backward reads gate, up and the gradient and writes two
gradients: 5 * N * F * itemsize. 6 and 12 FLOPs an element: memory decides.
gate and up may be two halves of one projection's output: rows that lie apart are read where they are.
Source: Shazeer 2020 (arXiv 2002.05202); gelu in its tanh form, as GPT-2 and Gemma use it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from nanotrain.kernels.cpu import call, dense
from nanotrain.kernels.runtime import choose, compute_dtype, has_kernel, jit, launch, tl
from torch.autograd.function import once_differentiable

EXAMPLES = ((8, 64), (3, 80), (1, 1), (5, 257))
"""Shapes (rows, F) that tests, the compile gate and benchmarks share."""

_TILE = 2048
"""Elements of a program: with 4 warps each thread has two 16-byte reads of every bf16 tensor under way."""


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


@jit
def _gated_forward_kernel(
    gate_ptr, up_ptr, out_ptr, rows, width, column_blocks, stride_gate, stride_up,
    GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = _tile_of(tl.program_id(0), column_blocks, ROWS, COLUMNS)
    mask = (row < rows) & (column < width)
    gate = tl.load(gate_ptr + row * stride_gate + column, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + column, mask, 0.0).to(tl.float32)
    out = gate * tl.sigmoid(_sigmoid_argument(gate, GELU)) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask)


@jit
def _gated_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, rows, width, column_blocks, stride_grad, stride_gate, stride_up,
    GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = _tile_of(tl.program_id(0), column_blocks, ROWS, COLUMNS)
    mask = (row < rows) & (column < width)
    grad = tl.load(grad_ptr + row * stride_grad + column, mask, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + column, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + column, mask, 0.0).to(tl.float32)
    share = tl.sigmoid(_sigmoid_argument(gate, GELU))
    slope = share + gate * share * (1.0 - share) * _sigmoid_slope(gate, GELU)
    place = row * width + column
    tl.store(grad_gate_ptr + place, (grad * up * slope).to(grad_gate_ptr.dtype.element_ty), mask)
    tl.store(grad_up_ptr + place, (grad * gate * share).to(grad_up_ptr.dtype.element_ty), mask)


@jit
def _tile_of(program, column_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (ROWS, 1) and columns (1, COLUMNS) of a program, in 64 bits: tensors laid flat are one row."""
    row = (program // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % column_blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column


@jit
def _sigmoid_argument(gate, GELU: tl.constexpr):
    """z where act(gate) = gate * sigmoid(z): both are such, for (1 + tanh(z / 2)) / 2 = sigmoid(z)."""
    return 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate) if GELU else gate  # 2 sqrt(2 / pi)


@jit
def _sigmoid_slope(gate, GELU: tl.constexpr):
    """dz / dgate."""
    return 1.5957691216057308 * (1.0 + 0.134145 * gate * gate) if GELU else 1.0


def _tile(rows: int, width: int) -> tuple[int, int]:
    """(rows, columns) of a program's tile of (rows, width).

    Of several rows the columns are a power of two that divides the width, if one of at least 256 does, so that no lane is idle and no mask
    cuts a read; 256 are 512 bytes of bf16, a whole read of a warp.
    """
    if rows == 1:
        return 1, _TILE
    columns = max(256, min(_TILE, width & -width)) if width >= 256 else 1 << (width - 1).bit_length()
    return _TILE // columns, columns


def _rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors as (rows, width): in one row where all lie without gaps, else rows of the last dimension, whose elements lie side by side."""
    tensors = [tensor.resolve_neg() for tensor in tensors]
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    tensors = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    return [tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in tensors]


def _launch(kernel, tensors, outs, op):
    """Run `kernel` on tensors of one shape; `outs` are contiguous."""
    if not outs[0].numel():
        return
    tensors = _rows(*tensors)
    count, width = tensors[0].shape
    rows, columns = _tile(count, width)
    blocks = -(-width // columns)
    launch(
        kernel, (-(-count // rows) * blocks,), *tensors, *outs, count, width, blocks, *(tensor.stride(0) for tensor in tensors),
        GELU=op == "geglu", ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip


class _Triton(torch.autograd.Function):
    """`op`, "swiglu" or "geglu"; it keeps gate and up as they lie, the activation is computed again."""

    @staticmethod
    def forward(ctx, gate, up, op):
        ctx.save_for_backward(gate, up)
        ctx.op = op
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _launch(_gated_forward_kernel, (gate, up), (out,), op)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grads = [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2)]
        _launch(_gated_backward_kernel, (grad, gate, up), grads, ctx.op)
        return *grads, None


def _check(op, gate, up):
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"{op}: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} differ")


def _gated(op, reference, gate, up, impl):
    _check(op, gate, up)
    chosen = choose(op, impl, gate, up, triton=has_kernel(gate, up), native=gate.is_floating_point())
    if chosen == "triton":
        return _Triton.apply(gate, up, op)
    return _Native.apply(gate, up, op) if chosen == "native" else reference(gate, up)


def swiglu(gate, up, *, impl="auto"):
    """silu(gate) * up for gate and up (..., F) of one dtype. Differentiable in both. ValueError where they differ."""
    return _gated("swiglu", swiglu_reference, gate, up, impl)


def geglu(gate, up, *, impl="auto"):
    """gelu(gate) * up for gate and up (..., F) of one dtype. Differentiable in both. ValueError where they differ."""
    return _gated("geglu", geglu_reference, gate, up, impl)


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one forward for inputs of `shape`."""
    elements = torch.Size(shape).numel()
    return 3 * elements * dtype.itemsize, 6 * elements
