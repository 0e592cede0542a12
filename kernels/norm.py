"""RMSNorm and LayerNorm over the last dimension, optionally fused with the residual addition before them.

    rms_norm:   y = x / sqrt(mean(x^2) + eps) * (weight + offset)
    layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Shapes: x (..., C), weight and bias (C,). Accumulation in fp32 (float64 for float64). Reads x (and the residual) once and
writes y (and the sum) once: 2 (4) * N * C * itemsize bytes forward.
Sources: Zhang and Sennrich 2019 (arXiv 1910.07467); Ba et al. 2016 (arXiv 1607.06450).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nanotrain.kernels.cpu import call, dense
from nanotrain.kernels.runtime import choose, compute_dtype
from torch.autograd.function import once_differentiable

EXAMPLES = ((8, 64), (3, 80), (1, 16), (5, 257))
"""Shapes (rows, C) that tests and benchmarks share."""


class _RMSNorm(torch.autograd.Function):
    """With its backward written out: autograd through the formula costs a CPU twice the time."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        wide = x.to(compute_dtype(x))
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return (wide * inverse).mul_(weight.to(wide.dtype) + offset).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        unit = x.to(inverse.dtype) * inverse
        grad = grad.to(inverse.dtype)
        grad_weight = (grad * unit).sum_to_size(weight.shape)
        grad = grad * (weight.to(inverse.dtype) + ctx.offset)
        mean = torch.linalg.vecdot(grad, unit).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = grad.sub_(unit.mul_(mean)).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None


def rms_norm_reference(x, weight, eps=1e-6, *, residual=None, offset=0.0):
    """RMSNorm in plain PyTorch; with `residual`, (normed, x + residual) where the sum is rounded to x's dtype first."""
    if residual is not None:
        x = x + residual
    normed = _RMSNorm.apply(x, weight, eps, offset)
    return normed if residual is None else (normed, x)


def layer_norm_reference(x, weight, bias=None, eps=1e-5, *, residual=None):
    """LayerNorm in plain PyTorch; with `residual`, (normed, x + residual) where the sum is rounded to x's dtype first."""
    if residual is not None:
        x = x + residual
    dtype = compute_dtype(x)
    shift = None if bias is None else bias.to(dtype)
    normed = F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), shift, eps).to(x.dtype)
    return normed if residual is None else (normed, x)


class _Native(torch.autograd.Function):
    """RMSNorm, the residual added first, in one pass over memory each way; returns (normed, sum), or normed where there is no residual."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, residual):
        x, weight, residual = dense(x), dense(weight), dense(residual)
        rows, width = x.shape[:-1].numel(), x.shape[-1]
        total = None if residual is None else torch.empty_like(x)
        normed, inverse = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        call("norm", x.dtype, x, residual, weight, total, normed, inverse, rows, width, eps, offset)
        ctx.save_for_backward(x if total is None else total, weight, inverse)
        ctx.offset = offset
        return normed if total is None else (normed, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_total=None):
        x, weight, inverse = ctx.saved_tensors
        rows, width = len(inverse), x.shape[-1]
        parts = min(64, 1 + rows // 16)  # of the sum for the weight: of the rows alone, so that threads do not change its bits
        grad_x, grad_weight, sums = torch.empty_like(x), torch.empty_like(weight), torch.empty(parts, width, dtype=torch.float32, device=x.device)
        call("norm_back", x.dtype, dense(grad), dense(grad_total), x, weight, inverse, grad_x, grad_weight, sums, parts, rows, width, ctx.offset)
        return grad_x, grad_weight, None, None, None if grad_total is None else grad_x


def _check(op, x, weight, bias, residual):
    if weight.dim() != 1 or x.dim() < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"{op}: weight {tuple(weight.shape)} does not match the last dimension of x {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"{op}: bias {tuple(bias.shape)} does not match weight {tuple(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"{op}: residual {tuple(residual.shape)} {residual.dtype} does not match x {tuple(x.shape)} {x.dtype}")


def rms_norm(x, weight, eps=1e-6, *, residual=None, offset=0.0, impl="auto"):
    """RMSNorm of x (..., C) with weight (C,); `offset` is added to the weight (1.0 for Gemma).

    With `residual` (same shape and dtype as x) returns (normed, x + residual), else normed. Differentiable in all
    tensors. Raises ValueError for shapes that do not match.
    """
    _check("rms_norm", x, weight, None, residual)
    tensors = (x, weight) if residual is None else (x, weight, residual)
    if choose("rms_norm", impl, *tensors, native=x.dtype == weight.dtype and x.is_floating_point()) == "native":
        return _Native.apply(x, weight, eps, offset, residual)
    return rms_norm_reference(x, weight, eps, residual=residual, offset=offset)


def layer_norm(x, weight, bias=None, eps=1e-5, *, residual=None, impl="auto"):
    """LayerNorm of x (..., C) with weight and optional bias (C,).

    With `residual` (same shape and dtype as x) returns (normed, x + residual), else normed. Differentiable in all
    tensors. Raises ValueError for shapes that do not match.
    """
    _check("layer_norm", x, weight, bias, residual)
    choose("layer_norm", impl, x, weight)
    return layer_norm_reference(x, weight, bias, eps, residual=residual)


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one forward of rms_norm on x of `shape`: x in, y out, the weight once."""
    rows, width = torch.Size(shape[:-1]).numel(), shape[-1]
    return (2 * rows * width + width) * dtype.itemsize, 4 * rows * width
