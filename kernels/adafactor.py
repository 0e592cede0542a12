"""Adafactor over lists of tensors, in place, in one call: a second moment kept as one number for each row and one for each column.

    R = b R + (1 - b) mean over columns of g^2      C = b C + (1 - b) mean over rows of g^2      1 - b = t^decay
    V = R C / max(mean R, eps1)                     u = g / sqrt(max(V, eps1^2))
    p = p (1 - lr wd) - min(lr, 1 / sqrt(t)) max(eps2, RMS(p)) u / max(1, RMS(u) / clip)

g is grad * grad_scale. A tensor that is no matrix keeps its whole second moment V. Computed in fp32 (float64 for float64) on the master copy
where there is one; an fp16 or bf16 parameter then gets its rounded copy, or without a master a bf16 parameter is rounded stochastically.

The kernels are launched six times, whatever the tensors, or six times for each combination of dtypes among them: sums of squares of tiles of
64 x 128 elements, along their rows, along their columns and of their weights; moments from these; totals of a tensor (mean R, RMS(p)); sums of
squares of u; totals of these (RMS(u)); the update. Always in the same order and without atomics. In fp32: reads p and g, g, p and g, writes p:
24 bytes for each element; moments and sums add some 0.25.
Source: Shazeer and Stern 2018 (arXiv 1804.04235), with the rate, the decay and the epsilons of torch.optim.Adafactor; eps1 is that of the dtype
computed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

import torch
from nanotrain.kernels.cpu import dense
from nanotrain.kernels.multi_tensor import (
    allowed,
    by_dtype,
    each,
    given,
    locate,
    number,
    on_device,
    read,
    tensor_table,
    tile_map,
    write,
    write_weight,
)
from nanotrain.kernels.random import stochastic_round
from nanotrain.kernels.runtime import choose, compute_dtype, jit, launch, tl

EXAMPLES = ((7,), (33, 5), (1,), (64, 64))
"""Shapes that tests and benchmarks share."""

_ROWS, _COLUMNS = 64, 128
"""A tile, of one program with 4 warps. A row of it is one access of 16 bytes of fp32 for each thread of a warp, and its columns are summed in
registers; 64 rows pay for the look-up of the tensor, and leave of a matrix 1/64 to be summed along columns and 1/128 along rows."""

_APART, _TOGETHER, _EDGE = 8, 4, 2
"""Rows of a tile in flight: where tensors are only summed; where they meet, and more than 4 elements a thread would have Triton turn the layout of
fp32 beside bf16 in shared memory; and in tiles that are cut off or start anywhere, each of whose elements has an address and a mask in registers,
so that with more of them fewer programs would share a multiprocessor."""

_CHUNK, _PARTS = 32, 64
"""Moments of a program, and those sums that make them that it adds at once: the longest, of 2,000 tiles above each other in an embedding of
128,000 rows, takes 32 turns."""

_TOTAL_BLOCK = 4096
"""Sums that the one program of a tensor's total adds at once, with 8 warps."""


def adafactor_reference(
    params, grads, row_vars, col_vars, variances, *, lr, step, beta2_decay=-0.8, eps=(None, 1e-3), clip_threshold=1.0, weight_decay=0.0,
    lr_scales=None, grad_scale=None, found_nonfinite=None, masters=None, seed=None, counter_starts=None,
):  # fmt: skip
    """Adafactor in plain PyTorch, tensor after tensor, without waiting for the device."""
    dtype, device = compute_dtype(*params), params[0].device
    lr, step = _number(lr, dtype, device), _number(step, dtype, device)
    found = torch.zeros((), dtype=torch.bool, device=device) if found_nonfinite is None else found_nonfinite.bool()
    finfo = torch.finfo(dtype)
    eps1 = finfo.eps if eps[0] is None else eps[0]
    mix = step**beta2_decay
    for index, p in enumerate(params):
        if not p.numel():
            continue
        weight = p if masters is None else masters[index]
        wide, g = weight.to(dtype), grads[index].to(dtype)
        g = g if grad_scale is None else g * grad_scale
        rate = lr if lr_scales is None else lr * lr_scales[index]
        decay = weight_decay if isinstance(weight_decay, (int, float)) else weight_decay[index]
        size = wide.square().mean().sqrt().clamp(min=eps[1]) * torch.minimum(rate, step.rsqrt())
        square = g.square()
        if row_vars[index] is None:
            moments = {variances[index]: square}
        else:
            moments = {row_vars[index]: square.mean(1), col_vars[index]: square.mean(0)}
        moved = [old.to(dtype).lerp(new.view(old.shape), mix) for old, new in moments.items()]
        kept = [new.to(old.dtype).to(dtype) for old, new in zip(moments, moved, strict=True)]
        if len(kept) == 1:
            variance = kept[0]
        else:
            row, col = (moment.flatten() for moment in kept)
            variance = (row / moved[0].mean().clamp(min=eps1))[:, None] * col
        # The square of a small epsilon may be 0, and so would be the root of a variance of 0.
        update = g * variance.clamp(min=max(eps1 * eps1, finfo.tiny)).rsqrt()
        size = size / (update.square().mean().sqrt() / clip_threshold).clamp(min=1.0)
        wide = torch.where(found, wide, wide * (1 - rate * decay) - size * update)
        for old, new in zip(moments, moved, strict=True):
            old.copy_(torch.where(found, old, new))
        if masters is None and p.dtype != dtype:  # of a value that bf16 can hold, as one refused is, rounding changes no bit
            wide = stochastic_round(wide, p.dtype, seed, counter_starts[index])
        weight.copy_(wide)
        if masters is not None:
            p.copy_(weight)


def _number(value, dtype, device):
    """A number or a 0-d tensor as a tensor of `dtype`; a number comes to the device without waiting for it."""
    return value.to(dtype) if isinstance(value, torch.Tensor) else torch.full((), value, dtype=dtype, device=device)


@jit
def _places(row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """(size, width, rows, factored, column tiles, where sums lie) of a row of the table; what is no matrix counts as rows of COLUMNS.

    Its sums lie in `scratch` in this order: of rows' squares in each column tile and of columns' in each row tile, of chunks of row moments,
    of tiles. `_plan` counts the same.
    """
    size, width, factored = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    rows = tl.cdiv(size, width)
    column_tiles = tl.cdiv(width, COLUMNS)
    by_row = tl.load(row + 9)
    by_column = by_row + factored * rows * column_tiles
    chunks = by_column + factored * tl.cdiv(rows, ROWS) * width
    tiles = chunks + factored * tl.cdiv(rows, CHUNK)
    return size, width, rows, factored, column_tiles, by_row, by_column, chunks, tiles


@jit
def _mix(step, beta2_decay):
    """step^beta2_decay, the weight of the new square."""
    return tl.exp2(tl.log2(tl.load(step).to(tl.float32)) * beta2_decay)


@jit
def _whole(addresses, top, left, limit, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether a tile lies within the tensor and each of its rows starts at a multiple of 16 bytes in memory, of bf16 too."""
    inside = ((top + ROWS) * width <= limit) & (left + COLUMNS <= width)
    return inside & (width % 8 == 0) & ((addresses & 15) == 0)


@jit
def _adafactor_sums_kernel(
    table, tiles, scratch, step, grad_scale, found, beta2_decay,
    DTYPES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Sums of squares of one tile: of g along rows and columns, of the weight in all; of what is no matrix the second moment itself.

    A row of the table, and DTYPES of the first five: addresses of weight (the master, or the parameter), grad, row moments, column moments (or of
    the whole second moment, twice) and parameter; size, width, whether a matrix, counter, first of its sums, lr scale and decay.
    """
    tensor, tile = locate(tiles)
    row = table + tensor * 12
    weight, grad, moment = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    size, width, rows, factored, column_tiles, by_row, by_column, _, sums = _places(row, ROWS, COLUMNS, CHUNK)
    limit, scale, mix = allowed(size, found), given(grad_scale, 1.0, tl.float32), _mix(step, beta2_decay)
    top, left = tile // column_tiles * ROWS, tile % column_tiles * COLUMNS
    by_row = scratch + by_row + tile % column_tiles * rows
    by_column = scratch + by_column + tile // column_tiles * width
    numbers = (top, left, limit, width, factored, scale, mix)
    sums = (by_row, by_column, scratch + sums + tile)
    if _whole(weight | grad | moment, top, left, limit, width, ROWS, COLUMNS):
        _sum_tile(weight, grad, moment, sums, numbers, DTYPES, ROWS, COLUMNS, BLOCK, True)
    else:
        _sum_tile(weight, grad, moment, sums, numbers, DTYPES, ROWS, COLUMNS, EDGE, False)


@jit
def _sum_tile(
    weight, grad, moment, sums, numbers,
    DTYPES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    WEIGHT: tl.constexpr = DTYPES[0]  # named, for Triton 3.6 takes a tuple's strings for no constants
    GRAD: tl.constexpr = DTYPES[1]
    MOMENT: tl.constexpr = DTYPES[2]
    top, left, limit, width, factored, scale, mix = numbers
    by_row, by_column, total = sums
    if WHOLE:
        width = width // 8 * 8  # shows Triton that rows start at a multiple
    column = left + tl.arange(0, COLUMNS)[None, :]
    weights = tl.zeros((BLOCK, COLUMNS), tl.float32)
    columns = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(0, tl.minimum(tl.cdiv(limit, width) - top, ROWS).to(tl.int32), BLOCK):
        line = top + start + tl.arange(0, BLOCK)[:, None]
        index = line * width + column
        mask = (column < width) & (index < limit)
        w = read(weight, index, mask, WEIGHT, WHOLE)
        g = read(grad, index, mask, GRAD, WHOLE) * scale
        weights += w * w
        square = g * g
        if factored != 0:
            columns += square
            tl.store(by_row + line, tl.sum(square, 1, keep_dims=True), line * width < limit)
        else:
            v = read(moment, index, mask, MOMENT, WHOLE)
            write(moment, index, (1.0 - mix) * v + mix * square, mask, MOMENT, WHOLE)
    if factored != 0:
        tl.store(by_column + column, tl.sum(columns, 0, keep_dims=True), column < width)
    tl.store(total, tl.sum(weights))


@jit
def _adafactor_moments_kernel(
    table, chunks, scratch, step, found, beta2_decay,
    MOMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """CHUNK row moments of a matrix, and their sum, or column moments: chunks of rows come first."""
    tensor, chunk = locate(chunks)
    row = table + tensor * 12
    size, width, rows, _, column_tiles, by_row, by_column, sums, _ = _places(row, ROWS, COLUMNS, CHUNK)
    along = chunk < tl.cdiv(rows, CHUNK)
    moment = tl.where(along, tl.load(row + 2), tl.load(row + 3))
    count = tl.where(along, rows, width)
    parts = tl.where(along, column_tiles, tl.cdiv(rows, ROWS)).to(tl.int32)
    length = tl.where(along, width, rows).to(tl.float32)
    first = scratch + tl.where(along, by_row, by_column)
    index = tl.where(along, chunk, chunk - tl.cdiv(rows, CHUNK)) * CHUNK + tl.arange(0, CHUNK)
    mask = index < tl.minimum(count, allowed(size, found))
    total = tl.zeros((PARTS, CHUNK), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        total += tl.load(first + part * count + index[None, :], (part < parts) & mask[None, :], 0.0)
    old = read(moment, index, mask, MOMENT, False)
    mix = _mix(step, beta2_decay)
    new = (1.0 - mix) * old + mix * (tl.sum(total, 0) / length)
    write(moment, index, new, mask, MOMENT, False)
    if along:
        tl.store(scratch + sums + chunk, tl.sum(tl.where(mask, new, 0.0), 0))


@jit
def _adafactor_totals_kernel(
    table, scratch, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Total 0 of a tensor, of its row moments, 1, of its weights' squares, or 2, of its update's; all totals lie at the head of scratch."""
    tensor, which = tl.program_id(0).to(tl.int64), tl.program_id(1) + FIRST
    row = table + tensor * 12
    _, _, rows, factored, column_tiles, _, _, chunks, tiles = _places(row, ROWS, COLUMNS, CHUNK)
    first = scratch + tl.where(which == 0, chunks, tiles)
    count = tl.where(which == 0, factored * tl.cdiv(rows, CHUNK), tl.cdiv(rows, ROWS) * column_tiles).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(first + index, index < count, 0.0)
    tl.store(scratch + tensor * 3 + which, tl.sum(total, 0))


@jit
def _adafactor_norms_kernel(
    table, tiles, scratch, grad_scale, found, eps1, least,
    DTYPES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The sum of squares of one tile of the update."""
    tensor, tile = locate(tiles)
    row = table + tensor * 12
    grad, first, second = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    size, width, rows, factored, column_tiles, _, _, _, sums = _places(row, ROWS, COLUMNS, CHUNK)
    limit = allowed(size, found)
    top, left = tile // column_tiles * ROWS, tile % column_tiles * COLUMNS
    mean = tl.maximum(tl.load(scratch + tensor * 3) / rows.to(tl.float32), eps1)
    numbers = (top, left, limit, width, factored, given(grad_scale, 1.0, tl.float32), mean, least)
    if _whole(grad | first, top, left, limit, width, ROWS, COLUMNS):
        total = _norm_tile(grad, first, second, numbers, DTYPES, ROWS, COLUMNS, BLOCK, True)
    else:
        total = _norm_tile(grad, first, second, numbers, DTYPES, ROWS, COLUMNS, EDGE, False)
    tl.store(scratch + sums + tile, total)


@jit
def _norm_tile(
    grad, first, second, numbers,
    DTYPES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    MOMENT: tl.constexpr = DTYPES[2]
    top, left, limit, width, factored, scale, mean, least = numbers
    if WHOLE:
        width = width // 8 * 8
    column = left + tl.arange(0, COLUMNS)[None, :]
    moments = (first, read(second, column, (column < width) & (factored != 0), MOMENT, False) / mean)
    squares = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(0, tl.minimum(tl.cdiv(limit, width) - top, ROWS).to(tl.int32), BLOCK):
        line = top + start + tl.arange(0, BLOCK)[:, None]
        _, _, update = _update(grad, moments, line, column, limit, width, factored, scale, least, DTYPES, WHOLE)
        squares += update * update
    return tl.sum(squares)


@jit
def _update(grad, moments, line, column, limit, width, factored, scale, least, DTYPES: tl.constexpr, WHOLE: tl.constexpr):
    """(index, mask, update before it is clipped) of some lines of a tile."""
    GRAD: tl.constexpr = DTYPES[1]
    MOMENT: tl.constexpr = DTYPES[2]
    first, columns = moments
    index = line * width + column
    mask = (column < width) & (index < limit)
    g = read(grad, index, mask, GRAD, WHOLE) * scale
    if factored != 0:
        v = read(first, line, line * width < limit, MOMENT, False) * columns
    else:
        v = read(first, index, mask, MOMENT, WHOLE)
    return index, mask, g * tl.rsqrt(tl.maximum(v, least, propagate_nan=tl.PropagateNan.ALL))


@jit
def _adafactor_apply_kernel(
    table, tiles, scratch, lr, step, grad_scale, found, seed, eps1, least, eps2, clip_threshold,
    DTYPES: tl.constexpr, HAS_MASTERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """The update of one tile."""
    tensor, tile = locate(tiles)
    row = table + tensor * 12
    weight, grad, first, second, param = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    size, width, rows, factored, column_tiles, _, _, _, _ = _places(row, ROWS, COLUMNS, CHUNK)
    limit = allowed(size, found)
    top, left = tile // column_tiles * ROWS, tile % column_tiles * COLUMNS
    total = scratch + tensor * 3
    mean = tl.maximum(tl.load(total) / rows.to(tl.float32), eps1)
    weights = tl.sqrt(tl.load(total + 1) / size.to(tl.float32))
    updates = tl.sqrt(tl.load(total + 2) / size.to(tl.float32))
    rate = tl.load(lr).to(tl.float32) * number(row + 10)
    decay = rate * number(row + 11)
    pace = tl.minimum(rate, tl.rsqrt(tl.load(step).to(tl.float32))) * tl.maximum(weights, eps2) / tl.maximum(updates / clip_threshold, 1.0)
    addresses = (weight, grad, first, second, param)
    scale, noise, counter = given(grad_scale, 1.0, tl.float32), given(seed, 0, tl.int64), tl.load(row + 8)
    numbers = (top, left, limit, width, factored, scale, mean, least, decay, pace, noise, counter)
    if _whole(weight | grad | first | param, top, left, limit, width, ROWS, COLUMNS):
        _apply_tile(addresses, numbers, DTYPES, HAS_MASTERS, ROWS, COLUMNS, BLOCK, True)
    else:
        _apply_tile(addresses, numbers, DTYPES, HAS_MASTERS, ROWS, COLUMNS, EDGE, False)


@jit
def _apply_tile(
    addresses, numbers,
    DTYPES: tl.constexpr, HAS_MASTERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    WEIGHT: tl.constexpr = DTYPES[0]
    MOMENT: tl.constexpr = DTYPES[2]
    PARAM: tl.constexpr = DTYPES[4]
    weight, grad, first, second, param = addresses
    top, left, limit, width, factored, scale, mean, least, decay, pace, noise, counter = numbers
    if WHOLE:
        width = width // 8 * 8
    column = left + tl.arange(0, COLUMNS)[None, :]
    moments = (first, read(second, column, (column < width) & (factored != 0), MOMENT, False) / mean)
    for start in range(0, tl.minimum(tl.cdiv(limit, width) - top, ROWS).to(tl.int32), BLOCK):
        line = top + start + tl.arange(0, BLOCK)[:, None]
        index, mask, update = _update(grad, moments, line, column, limit, width, factored, scale, least, DTYPES, WHOLE)
        w = read(weight, index, mask, WEIGHT, WHOLE)
        w -= decay * w + pace * update
        write_weight(weight, param, index, w, mask, noise, counter, WEIGHT, PARAM, HAS_MASTERS, WHOLE)


@lru_cache(maxsize=32)
def _plan(shapes: tuple[tuple[int, int, bool], ...]) -> tuple[list[int], list[int], list[int], int]:
    """(first sum of each tensor, its tiles, its chunks of moments, numbers in scratch) for tensors of (size, width, whether a matrix)."""
    starts, tiles, chunks, end = [], [], [], 3 * len(shapes)
    for size, width, factored in shapes:
        rows = -(-size // width)
        down, across = -(-rows // _ROWS), -(-width // _COLUMNS)
        starts.append(end)
        tiles.append(down * across)
        chunks.append(-(-rows // _CHUNK) - (-width // _CHUNK) if factored else 0)
        end += tiles[-1] + (rows * across + down * width - (-rows // _CHUNK) if factored else 0)
    return starts, tiles, chunks, end


def _triton(
    params, grads, row_vars, col_vars, variances, *, lr, step, beta2_decay, eps, clip_threshold, weight_decay, lr_scales, grad_scale,
    found_nonfinite, masters, seed, counter_starts,
):  # fmt: skip
    device, count = params[0].device, len(params)
    lr, step, scale, found = (on_device(value, device) for value in (lr, step, grad_scale, found_nonfinite))
    seed = on_device(seed if masters is None else None, device, torch.int64)
    eps1 = float(torch.finfo(torch.float32).eps if eps[0] is None else eps[0])
    least = max(eps1 * eps1, torch.finfo(torch.float32).tiny)
    firsts, seconds = ([v if m is None else m for m, v in zip(moments, variances, strict=True)] for moments in (row_vars, col_vars))
    columns = (params if masters is None else masters, [dense(g) for g in grads], firsts, seconds, params)
    counters, scales, decays = counter_starts or [0] * count, each(lr_scales, count), each(weight_decay, count)
    switches = dict(ROWS=_ROWS, COLUMNS=_COLUMNS, CHUNK=_CHUNK)
    for dtypes, indices in by_dtype(columns).items():
        indices = [i for i in indices if params[i].numel()]
        shapes = tuple((params[i].numel(), _COLUMNS if row_vars[i] is None else params[i].shape[1], row_vars[i] is not None) for i in indices)
        if not shapes:
            continue
        starts, tiles, chunks, end = _plan(shapes)
        table = tensor_table(
            [[column[i] for i in indices] for column in columns],
            [*map(list, zip(*shapes, strict=True)), [counters[i] for i in indices], starts],
            [[scales[i] for i in indices], [decays[i] for i in indices]],
        )
        scratch, tile, chunk = torch.empty(end, dtype=torch.float32, device=device), tile_map(tiles, device), tile_map(chunks, device)
        types = dict(DTYPES=dtypes, EDGE=_EDGE, **switches, num_warps=4)
        launch(_adafactor_sums_kernel, (len(tile),), table, tile, scratch, step, scale, found, float(beta2_decay), BLOCK=_APART, **types)
        if len(chunk):
            launch(_adafactor_moments_kernel, (len(chunk),), table, chunk, scratch, step, found, float(beta2_decay), MOMENT=dtypes[2], PARTS=_PARTS,
                   **switches, num_warps=4)  # fmt: skip
        launch(_adafactor_totals_kernel, (len(indices), 2), table, scratch, FIRST=0, BLOCK=_TOTAL_BLOCK, **switches, num_warps=8)
        launch(_adafactor_norms_kernel, (len(tile),), table, tile, scratch, scale, found, eps1, least, BLOCK=_APART, **types)
        launch(_adafactor_totals_kernel, (len(indices), 1), table, scratch, FIRST=2, BLOCK=_TOTAL_BLOCK, **switches, num_warps=8)
        launch(_adafactor_apply_kernel, (len(tile),), table, tile, scratch, lr, step, scale, found, seed, eps1, least, float(eps[1]),
               float(clip_threshold), HAS_MASTERS=masters is not None, BLOCK=_TOGETHER, **types)  # fmt: skip


def _check(params, grads, row_vars, col_vars, variances, masters, seed, counter_starts, weight_decay, lr_scales) -> list[torch.Tensor]:
    """All moments of a call whose arguments fit each other; else ValueError."""
    lists = dict(grads=grads, row_vars=row_vars, col_vars=col_vars, variances=variances, masters=masters)
    numbers = dict(lr_scales=lr_scales, weight_decay=weight_decay, counter_starts=counter_starts)
    for name, values in (lists | numbers).items():
        if isinstance(values, Sequence) and len(values) != len(params):
            raise ValueError(f"adafactor_: {len(values)} {name} for {len(params)} params")
    for name in ("grads", "masters"):
        if lists[name] is not None and any(t.shape != p.shape for t, p in zip(lists[name], params, strict=True)):
            raise ValueError(f"adafactor_: the shapes of {name} differ from those of params")
    moments = []
    for p, row, col, variance in zip(params, row_vars, col_vars, variances, strict=True):
        whole = variance is not None and row is None and col is None and variance.shape == p.shape
        matrix = variance is None and row is not None and col is not None and p.dim() == 2 and (row.numel(), col.numel()) == tuple(p.shape)
        if not whole and not matrix:
            raise ValueError(f"adafactor_: of shape {tuple(p.shape)} needs a variance of its shape, or a matrix both its row_vars and its col_vars")
        moments += [variance] if whole else [row, col]
        if matrix and row.dtype != col.dtype:
            raise ValueError(f"adafactor_: row_vars in {row.dtype} and col_vars in {col.dtype} of one matrix must be of one dtype")
    wide = {compute_dtype(*params)} if params else set()
    if other := {t.dtype for t in masters or ()} - wide or {t.dtype for t in moments} - wide - {torch.bfloat16}:
        raise ValueError(f"adafactor_: moments and masters must be {wide.pop()}, or moments bfloat16, not {other.pop()}")
    low = {p.dtype for p in params} & {torch.bfloat16, torch.float16}
    if masters is None and low and (seed is None or counter_starts is None or torch.float16 in low):
        raise ValueError("adafactor_: low-precision params need masters, or (bf16 only) seed and counter_starts")
    return moments


def _has_triton(impl, params, grads, moments, masters) -> bool:
    """Whether the kernels serve the dtypes, and all that is written lies in memory in order; asked for by name it says what does not."""
    if not all(map(torch.Tensor.is_contiguous, chain(params, moments, masters or ()))):
        if impl == "triton":
            raise ValueError("adafactor_: params, moments and masters must be contiguous for impl='triton'; use impl='auto'")
        return False
    return {t.dtype for t in (*params, *grads)} <= {torch.float32, torch.float16, torch.bfloat16}


def adafactor_(
    params, grads, row_vars, col_vars, variances, *, lr, step, beta2_decay=-0.8, eps=(None, 1e-3), clip_threshold=1.0, weight_decay=0.0,
    lr_scales=None, grad_scale=None, found_nonfinite=None, masters=None, seed=None, counter_starts=None, impl="auto",
):  # fmt: skip
    """One Adafactor step over lists of tensors, in place.

    row_vars, col_vars    of each matrix (rows, columns): rows and columns numbers, as (rows,) or (rows, 1) and (columns,) or (1, columns);
                          None where the tensor has a `variance`
    variances             second moments in the tensor's own shape; None of the matrices above
    lr, step, grad_scale  numbers or 0-d device tensors; `step` is this update's number from 1; gradients are multiplied by grad_scale
    beta2_decay           the new square has the weight step^beta2_decay in the second moment
    eps                   (least root of the second moment, or None for the epsilon of fp32; least RMS of a parameter that its step is sized by)
    clip_threshold        largest RMS of an update
    weight_decay          a number or one per tensor
    lr_scales             factors of lr, one per tensor
    found_nonfinite       0-d device tensor: where it is true nothing at all is written
    masters               fp32 copies of lower-precision params, updated; the params become their rounded copies
    seed, counter_starts  without masters, bf16 params are rounded stochastically, element i of tensor n keyed on (seed, counter_starts[n] + i)

    Moments are fp32 (float64 for float64) or bf16, rounded to the nearest. Raises ValueError for lists that do not match in length, shape or
    device, for moments of another dtype, or for bf16 params without masters, seed and counter_starts.
    """
    moments = _check(params, grads, row_vars, col_vars, variances, masters, seed, counter_starts, weight_decay, lr_scales)
    if not params:
        return
    served = _has_triton(impl, params, grads, moments, masters)
    options = dict(
        lr=lr, step=step, beta2_decay=beta2_decay, eps=eps, clip_threshold=clip_threshold, weight_decay=weight_decay, lr_scales=lr_scales,
        grad_scale=grad_scale, found_nonfinite=found_nonfinite, masters=masters, seed=seed, counter_starts=counter_starts,
    )  # fmt: skip
    chosen = choose("adafactor_", impl, *params, *grads, *moments, *(masters or ()), triton=served)
    (_triton if chosen == "triton" else adafactor_reference)(params, grads, row_vars, col_vars, variances, **options)


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one step over a matrix of `shape` and its gradient in `dtype`, without sums and moments."""
    elements = torch.Size(shape).numel()
    return 6 * elements * dtype.itemsize, 16 * elements
