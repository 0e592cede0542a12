"""RMSNorm and LayerNorm over the last dimension, optionally fused with the residual addition before them.

    rms_norm:   y = x / sqrt(mean(x^2) + eps) * (weight + offset)
    layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Shapes: x (..., C), weight and bias (C,). Accumulation in fp32 (float64 for float64). Reads x (and the residual) once and
writes y (and the sum) once: 2 (4) * N * C * itemsize bytes forward, 3 (4) backward.
The weight's gradient needs no atomics: each program sums its own rows in fp32, a second pass adds the programs' sums in order.
Sources: Zhang and Sennrich 2019 (arXiv 1910.07467); Ba et al. 2016 (arXiv 1607.06450).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nanotrain.kernels.cpu import call, dense
from nanotrain.kernels.runtime import choose, compute_dtype, has_kernel, jit, launch, multiprocessors, tl
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


@jit
def _norm_forward_kernel(
    x, residual, weight, bias, y, total, means, inverses, x_stride, residual_stride, rows, width, eps, offset,
    CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows: their statistics, then y. A row of more than one block is read twice, the second time from the cache."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    x += row * x_stride
    residual += row * residual_stride
    y += row * width
    total += row * width
    column = tl.arange(0, BLOCK)[None, :]
    if ONE_BLOCK:
        mask = (row < rows) & (column < width)
        values = _load_sum(x + column, residual + column, mask, HAS_RESIDUAL)
        mean = tl.sum(values, 1, keep_dims=True) / width if CENTRED else tl.zeros((ROWS, 1), tl.float32)
        centred = tl.where(mask, values - mean, 0.0)
        square = tl.sum(centred * centred, 1, keep_dims=True)
    else:
        # Blocks' means and squares are merged as Chan et al. do, which loses nothing where the mean is large beside the variance.
        mean = tl.zeros((ROWS, 1), tl.float32)
        square = tl.zeros((ROWS, 1), tl.float32)
        for start in range(0, width, BLOCK):
            mask = (row < rows) & (start + column < width)
            values = _load_sum(x + start + column, residual + start + column, mask, HAS_RESIDUAL)
            if CENTRED:
                count = tl.minimum(BLOCK, width - start).to(tl.float32)
                middle = tl.sum(values, 1, keep_dims=True) / count
                shift = middle - mean
                values = tl.where(mask, values - middle, 0.0)
                mean += shift * (count / (start + count))
                square += shift * shift * (start * count / (start + count))
            square += tl.sum(values * values, 1, keep_dims=True)
    inverse = tl.rsqrt(square / width + eps)
    tl.store(inverses + row, inverse, row < rows)
    if CENTRED:
        tl.store(means + row, mean, row < rows)
    if ONE_BLOCK:
        normed = (values - mean) * inverse
        _store_normed(normed, values, column, width, weight, bias, y, total, mask, offset, HAS_BIAS, HAS_RESIDUAL)
    else:
        for start in range(0, width, BLOCK):
            place = start + column
            mask = (row < rows) & (place < width)
            values = _load_sum(x + place, residual + place, mask, HAS_RESIDUAL)
            normed = (values - mean) * inverse
            _store_normed(normed, values, place, width, weight, bias, y, total, mask, offset, HAS_BIAS, HAS_RESIDUAL)


@jit
def _load_sum(x, residual, mask, HAS_RESIDUAL: tl.constexpr):
    """x in fp32, the residual added and the sum rounded to the dtype that it is stored in."""
    values = tl.load(x, mask, 0.0)
    if HAS_RESIDUAL:
        wide = values.to(tl.float32) + tl.load(residual, mask, 0.0).to(tl.float32)
        values = wide.to(values.dtype)
    return values.to(tl.float32)


@jit
def _store_normed(normed, values, column, width, weight, bias, y, total, mask, offset, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    normed *= tl.load(weight + column, column < width, 0.0).to(tl.float32) + offset
    if HAS_BIAS:
        normed += tl.load(bias + column, column < width, 0.0).to(tl.float32)
    tl.store(y + column, normed.to(y.dtype.element_ty), mask)
    if HAS_RESIDUAL:
        tl.store(total + column, values.to(total.dtype.element_ty), mask)


@jit
def _norm_backward_kernel(
    grad, grad_total, x, weight, means, inverses, grad_x, sums, bias_sums, grad_stride, grad_total_stride, x_stride, rows, width, offset,
    CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TOTAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every so many rows: grad_x, and this program's part of the weight's and the bias's gradient, held in registers."""
    column = tl.arange(0, BLOCK)[None, :]
    scale = tl.load(weight + column, column < width, 0.0).to(tl.float32) + offset
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row, mask, inverse, up, unit = _load_tile(grad, x, means, inverses, grad_stride, x_stride, first, rows, column, width, CENTRED, ROWS)
        weight_sum += up * unit
        if HAS_BIAS:
            bias_sum += up
        up *= scale
        change = up - unit * (tl.sum(up * unit, 1, keep_dims=True) / width)
        if CENTRED:
            change -= tl.sum(up, 1, keep_dims=True) / width
        change *= inverse
        if HAS_TOTAL:
            change += tl.load(grad_total + row * grad_total_stride + column, mask, 0.0).to(tl.float32)
        tl.store(grad_x + row * width + column, change.to(grad_x.dtype.element_ty), mask)
    _store_sums(sums, bias_sums, weight_sum, bias_sum, tl.arange(0, BLOCK), width, HAS_BIAS)


@jit
def _load_tile(
    grad, x, means, inverses, grad_stride, x_stride, first, rows, column, width, CENTRED: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """(row, mask, inverse, upstream gradient, normalised x) of ROWS rows.

    Their statistics are loaded by rows alone: in the tile's layout each thread would load them several times.
    """
    row = first + tl.arange(0, ROWS).to(tl.int64)
    inverse = tl.load(inverses + row, row < rows, 0.0)[:, None]
    mean = tl.load(means + row, row < rows, 0.0)[:, None] if CENTRED else tl.zeros((ROWS, 1), tl.float32)
    row = row[:, None]
    mask = (row < rows) & (column < width)
    up = tl.load(grad + row * grad_stride + column, mask, 0.0).to(tl.float32)
    unit = (tl.load(x + row * x_stride + column, mask, 0.0).to(tl.float32) - mean) * inverse
    return row, mask, inverse, up, unit


@jit
def _store_sums(sums, bias_sums, weight_sum, bias_sum, column, width, HAS_BIAS: tl.constexpr):
    """This program's part of the gradients of weight and bias, at columns (BLOCK,)."""
    place = tl.program_id(0).to(tl.int64) * width + column
    tl.store(sums + place, tl.sum(weight_sum, 0), column < width)
    if HAS_BIAS:
        tl.store(bias_sums + place, tl.sum(bias_sum, 0), column < width)


@jit
def _norm_backward_wide_kernel(
    grad, grad_total, x, weight, means, inverses, grad_x, grad_stride, grad_total_stride, x_stride, width, offset,
    CENTRED: tl.constexpr, HAS_TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x of one row too wide for registers, in two passes over it."""
    row = tl.program_id(0).to(tl.int64)
    grad += row * grad_stride
    x += row * x_stride
    inverse = tl.load(inverses + row)
    mean = tl.load(means + row) if CENTRED else 0.0
    column = tl.arange(0, BLOCK)
    along = tl.zeros((BLOCK,), tl.float32)
    level = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        place = start + column
        up, unit = _load_scaled(grad + place, x + place, weight + place, mean, inverse, offset, place < width)
        along += up * unit
        if CENTRED:
            level += up
    along_mean = tl.sum(along, 0) / width
    level_mean = tl.sum(level, 0) / width
    for start in range(0, width, BLOCK):
        place = start + column
        up, unit = _load_scaled(grad + place, x + place, weight + place, mean, inverse, offset, place < width)
        change = (up - unit * along_mean - level_mean) * inverse
        if HAS_TOTAL:
            change += tl.load(grad_total + row * grad_total_stride + place, place < width, 0.0).to(tl.float32)
        tl.store(grad_x + row * width + place, change.to(grad_x.dtype.element_ty), place < width)


@jit
def _load_scaled(grad, x, weight, mean, inverse, offset, mask):
    """The upstream gradient times the weight, and the normalised x."""
    scale = tl.load(weight, mask, 0.0).to(tl.float32) + offset
    return tl.load(grad, mask, 0.0).to(tl.float32) * scale, (tl.load(x, mask, 0.0).to(tl.float32) - mean) * inverse


@jit
def _norm_weight_kernel(
    grad, x, means, inverses, sums, bias_sums, grad_stride, x_stride, rows, width,
    CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one program's part of the weight's and the bias's gradient, for rows too wide for registers."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        _, _, _, up, unit = _load_tile(grad, x, means, inverses, grad_stride, x_stride, first, rows, column, width, CENTRED, ROWS)
        weight_sum += up * unit
        if HAS_BIAS:
            bias_sum += up
    _store_sums(sums, bias_sums, weight_sum, bias_sum, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), width, HAS_BIAS)


WIDEST = 8192
"""Columns up to which a row is held in registers, beside as many sums for the weight."""

_TILE = 2048
"""Elements of a tile of narrow rows: bytes enough in flight, and few enough programs."""


def _tile(width: int, per_thread: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile for rows of `width`, with so many elements a thread."""
    block = min(WIDEST, 1 << max(0, width - 1).bit_length())
    rows = max(1, _TILE // block)
    return rows, block, min(16, max(4, rows * block // (32 * per_thread)))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as (rows, width) with a row's elements side by side, copied only where it lies in another way."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _forward(x, weight, bias, eps, offset, residual, centred):
    """(y, sum or x, means or None, inverses) of a norm, y and the sum as (rows, width)."""
    x, weight = _rows(x), weight.contiguous()
    residual = None if residual is None else _rows(residual)
    bias = None if bias is None else bias.contiguous()
    (count, width), y = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    inverses = torch.empty(count, dtype=torch.float32, device=x.device)
    means = torch.empty_like(inverses) if centred else None
    rows, block, warps = _tile(width, 16)
    launch(
        _norm_forward_kernel, (-(-count // rows),), x, x if residual is None else residual, weight, weight if bias is None else bias, y, total,
        inverses if means is None else means, inverses, x.stride(0), 0 if residual is None else residual.stride(0), count, width, eps, offset,
        CENTRED=centred, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ROWS=rows, BLOCK=block, ONE_BLOCK=width <= WIDEST,
        num_warps=warps,
    )  # fmt: skip
    return y, total, means, inverses


def _backward(grad, grad_total, x, weight, means, inverses, offset, has_bias):
    """Gradients of x (rows, width), of the weight, and of the bias or None."""
    grad, weight = _rows(grad), weight.contiguous()
    grad_total = None if grad_total is None else _rows(grad_total)
    (count, width), grad_x = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, block, warps = _tile(width, 8)  # with more, what a thread holds (x, the gradient, weight and sums) spills
    programs = min(2 * multiprocessors(x.device), max(1, -(-count // rows)))
    sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    bias_sums = torch.empty_like(sums) if has_bias else sums
    tensors = (grad, grad if grad_total is None else grad_total, x, weight, inverses if means is None else means, inverses, grad_x)
    strides = (grad.stride(0), 0 if grad_total is None else grad_total.stride(0), x.stride(0))
    switches = dict(CENTRED=means is not None, HAS_TOTAL=grad_total is not None)
    if width <= WIDEST:
        launch(
            _norm_backward_kernel, (programs,), *tensors, sums, bias_sums, *strides, count, width, offset, **switches, HAS_BIAS=has_bias, ROWS=rows,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    else:
        launch(_norm_backward_wide_kernel, (count,), *tensors, *strides, width, offset, **switches, BLOCK=4096, num_warps=8)
        launch(
            _norm_weight_kernel, (programs, -(-width // 512)), grad, x, *tensors[4:6], sums, bias_sums, strides[0], strides[2], count, width,
            CENTRED=means is not None, HAS_BIAS=has_bias, ROWS=4, BLOCK=512, num_warps=4,
        )  # fmt: skip
    grads = [part.sum(0).to(weight.dtype) for part in ((sums, bias_sums) if has_bias else (sums,))]
    return grad_x, grads[0], grads[1] if has_bias else None


class _Triton(torch.autograd.Function):
    """Either norm; returns (normed, sum), or normed where there is no residual. What it keeps is the sum, which the model keeps anyway."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, offset, residual, centred):
        y, total, means, inverses = _forward(x, weight, bias, eps, offset, residual, centred)
        ctx.save_for_backward(total, weight, means, inverses)
        ctx.offset, ctx.has_bias, ctx.has_residual = offset, bias is not None, residual is not None
        ctx.set_materialize_grads(False)  # a sum that nothing uses, as after a norm at a block's end, needs no zeros to be read
        return y.view(x.shape) if residual is None else (y.view(x.shape), total.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_total=None):
        x, weight, means, inverses = ctx.saved_tensors
        grad = torch.zeros_like(grad_total) if grad is None else grad
        grad_x, grad_weight, grad_bias = _backward(grad, grad_total, x, weight, means, inverses, ctx.offset, ctx.has_bias)
        grad_x = grad_x.view(grad.shape)
        return grad_x, grad_weight, grad_bias, None, None, grad_x if ctx.has_residual else None, None


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
    chosen = choose("rms_norm", impl, *tensors, triton=has_kernel(x, weight), native=x.dtype == weight.dtype and x.is_floating_point())
    if chosen == "triton":
        return _Triton.apply(x, weight, None, eps, offset, residual, False)
    if chosen == "native":
        return _Native.apply(x, weight, eps, offset, residual)
    return rms_norm_reference(x, weight, eps, residual=residual, offset=offset)


def layer_norm(x, weight, bias=None, eps=1e-5, *, residual=None, impl="auto"):
    """LayerNorm of x (..., C) with weight and optional bias (C,).

    With `residual` (same shape and dtype as x) returns (normed, x + residual), else normed. Differentiable in all
    tensors. Raises ValueError for shapes that do not match.
    """
    _check("layer_norm", x, weight, bias, residual)
    tensors = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    if choose("layer_norm", impl, *tensors, triton=has_kernel(*tensors)) == "triton":
        return _Triton.apply(x, weight, bias, eps, 0.0, residual, True)
    return layer_norm_reference(x, weight, bias, eps, residual=residual)


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one forward of rms_norm on x of `shape`: x in, y out, the weight once."""
    rows, width = torch.Size(shape[:-1]).numel(), shape[-1]
    return (2 * rows * width + width) * dtype.itemsize, 4 * rows * width
