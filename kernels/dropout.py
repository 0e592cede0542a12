"""Dropout of a residual branch fused with the addition after it; which elements fall is counted, not drawn, so nothing is kept for the backward.

    y = residual + where(keep, x / (1 - p), 0),  keep[r, c] = word >= int(p * 2^32)
    word = philox(seed, c // 4, counters[r], counters[r] >> 32, 0)[c % 4]

Shapes: x, residual and y (..., C), counters (...) the global index of each row. Computed in fp32 (float64 for float64) and rounded once, at the
end, where dropout and an addition as two operations of PyTorch would round a half-precision branch twice.
Reads x and the residual, writes y: 3 * N * C * itemsize bytes; the backward reads the gradient and writes that of x: 2 * N * C * itemsize. One
call of philox (10 rounds, about 60 integer operations) serves four neighbouring columns.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (see random.py).
"""

from __future__ import annotations

import torch
from nanotrain.kernels.random import dropout_reference
from nanotrain.kernels.runtime import choose, compute_dtype, has_kernel, jit, launch, tl, triton
from torch.autograd.function import once_differentiable

EXAMPLES = ((8, 64), (3, 80), (1, 1), (5, 257))
"""Shapes (rows, C) that tests, the compile gate and benchmarks share."""

_TILE, _COLUMNS = 2048, 1024
"""Elements of a program, and its most columns: with 4 warps each thread has two 16-byte reads of a bf16 x under way, and needs some 40
registers, philox's included, so that ten or more programs share a multiprocessor. The words of philox change places within a thread alone."""


def dropout_add_reference(x, residual, p, seed, counters):
    """residual + dropout(x) in plain PyTorch, rounded once; dropout(x) where the residual is None."""
    dtype = compute_dtype(x)
    dropped = dropout_reference(x.to(dtype), p, seed, counters)
    return (dropped if residual is None else residual + dropped).to(x.dtype)


@jit(do_not_specialize=("seed", "threshold"))
def _dropout_kernel(
    x, residual, y, counters, seed, threshold, scale, rows, width, column_blocks,
    x_stride, x_column_stride, residual_stride, residual_column_stride, counter_stride,
    HAS_RESIDUAL: tl.constexpr, SEED_IN_MEMORY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of COLUMNS columns; blocks of a row's columns are neighbours in the grid, as they are in memory."""
    program = tl.program_id(0)
    row = (program // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first = program % column_blocks * COLUMNS
    column = (first + tl.arange(0, COLUMNS)[None, :]).to(tl.int64)
    mask = (row < rows) & (column < width)
    values = tl.load(x + row * x_stride + column * x_column_stride, mask, 0.0).to(tl.float32)
    counter = tl.load(counters + row * counter_stride, row < rows, 0)
    if SEED_IN_MEMORY:
        seed = tl.load(seed)
    group = (first // 4 + tl.arange(0, COLUMNS // 4)[None, :]).to(tl.uint32)
    a, b, c, d = tl.philox(seed, group, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), 0)
    word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))  # a, b, c, d of the first group, then of the next
    values = tl.where(word >= threshold.to(tl.uint32), values * scale, 0.0)
    if HAS_RESIDUAL:
        values += tl.load(residual + row * residual_stride + column * residual_column_stride, mask, 0.0).to(tl.float32)
    tl.store(y + row * width + column, values.to(y.dtype.element_ty), mask)


def _dropout(x, residual, p, seed, counters):
    """residual + dropout(x), or dropout(x) where the residual is None: the forward, and the backward with x the gradient."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    width = x.shape[-1]
    # Rows in order: views where the layout allows.
    counters = counters.expand(x.shape[:-1]).reshape(-1)
    x = x.reshape(-1, width)
    columns = min(_COLUMNS, max(16, triton.next_power_of_2(width)))
    rows = _TILE // columns
    column_blocks = triton.cdiv(width, columns)
    residual_strides = (0, 0)
    if residual is not None:
        residual = residual.reshape(-1, width)
        residual_strides = residual.stride()
    launch(
        _dropout_kernel, (triton.cdiv(len(x), rows) * column_blocks,),
        x, residual, out, counters, seed, int(p * 2**32), 1.0 / (1.0 - p), len(x), width, column_blocks,
        *x.stride(), *residual_strides, *counters.stride(),
        HAS_RESIDUAL=residual is not None, SEED_IN_MEMORY=isinstance(seed, torch.Tensor), ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out


class _DropoutAdd(torch.autograd.Function):
    """The backward counts the same words again; the gradient of the residual is the upstream one itself."""

    @staticmethod
    def forward(ctx, x, residual, p, seed, counters):
        in_memory = isinstance(seed, torch.Tensor)
        ctx.save_for_backward(counters, seed if in_memory else None)
        ctx.p, ctx.seed = p, None if in_memory else seed
        return _dropout(x, residual, p, seed, counters)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        counters, seed = ctx.saved_tensors
        grad_x = _dropout(grad, None, ctx.p, ctx.seed if seed is None else seed, counters) if ctx.needs_input_grad[0] else None
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None


def _check(x, residual, p, seed, counters):
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"dropout_add: residual {tuple(residual.shape)} {residual.dtype} does not match x {tuple(x.shape)} {x.dtype}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_add: p {p} must lie in [0, 1)")
    if isinstance(seed, torch.Tensor) and (seed.dtype != torch.int64 or seed.dim()):
        raise ValueError(f"dropout_add: seed {tuple(seed.shape)} {seed.dtype} must be an int or an int64 tensor without dimensions")
    # Broadcast by hand: torch.broadcast_shapes costs more than the launch.
    given, wanted = counters.shape, x.shape[:-1]
    aligned = zip(reversed(given), reversed(wanted), strict=False)
    if x.dim() < 1 or counters.dtype != torch.int64 or len(given) > len(wanted) or any(g not in (1, w) for g, w in aligned):
        raise ValueError(f"dropout_add: counters {tuple(given)} {counters.dtype} must be int64 and broadcast to the rows {tuple(wanted)} of x")


def dropout_add(x, residual, p, seed, counters, *, impl="auto"):
    """residual + dropout(x), or dropout(x) where `residual` is None: each element of x falls with probability `p`, the rest grow by 1 / (1 - p).

    x (..., C), residual of its shape and dtype; `seed` an int or an int64 tensor without dimensions, on x's device; counters (...) int64, or
    what broadcasts to it: the global index of each row (a token, for a residual stream). The same elements fall as in
    `random.dropout_reference`. Differentiable in x and residual. Raises ValueError for shapes or dtypes that do not match and for p outside
    of [0, 1).
    """
    _check(x, residual, p, seed, counters)
    tensors = [x, counters, *(t for t in (residual, seed) if isinstance(t, torch.Tensor))]
    if choose("dropout_add", impl, *tensors, triton=has_kernel(x)) == "triton":
        return _DropoutAdd.apply(x, residual, p, seed, counters)
    return dropout_add_reference(x, residual, p, seed, counters)


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one forward on x and a residual of `shape`; the integer operations of philox are not counted."""
    elements = torch.Size(shape).numel()
    return 3 * elements * dtype.itemsize + 8 * elements // max(1, shape[-1]), 2 * elements
