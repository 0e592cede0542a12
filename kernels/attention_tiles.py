"""What the attention kernels share: tiles of q, k and v, scores, and who sees whom.

Inside a kernel, query i and key j are counted from the start of their document or batch entry; `shift` turns one into the other's count:
query i stands where key i + shift stands.

A tile of a matrix W wide is a tuple of one or two parts, W split into powers of two (80 = 64 + 16, 96 = 64 + 32): the matrix units take only
these, and one of 128 would waste a third of its work on zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from nanotrain.kernels.runtime import jit, tl, triton

LOG2E = tl.constexpr(1.4426950408889634) if tl is not None else 1.4426950408889634
"""Turns an exponential into exp2, which is what the hardware has."""


class Features(NamedTuple):
    """Options of a call as its kernels take them. What is None is switched off, and costs nothing."""

    scale: float
    softcap: float | None
    window: int | None
    sinks: torch.Tensor | None
    """(H,) fp32."""
    slopes: torch.Tensor | None
    """(H,) or (B, H) fp32, with the stride of B in `slopes_stride`."""
    slopes_stride: int
    bias: torch.Tensor | None
    bias_strides: tuple[int, ...]
    """Of (B, H, T, S); 0 where it is broadcast."""
    prefix: torch.Tensor | None
    """(B,), or one for all with a stride of 0, in global positions as k_start counts."""
    prefix_stride: int
    seeds: torch.Tensor | None
    """(B,) int64, or one for all; None is no dropout."""
    seeds_stride: int
    threshold: int
    """Words of philox below it drop their probability."""
    kept: float
    """What a kept probability is multiplied by, 1 / (1 - p)."""
    cu_q: torch.Tensor | None
    """(documents + 1,) offsets of packed documents along T."""
    cu_k: torch.Tensor | None
    q_start: int | None
    """Global position of query 0; None aligns the last query with the last key."""
    k_start: int
    head_start: int
    causal: object
    """constexpr bool."""
    aligned: object
    """constexpr bool: whether 4 divides k_start, so that philox's words, four to a call, fall on whole tiles."""


COUNTS = ("T", "S", "heads", "documents", "units", "blocks", "together")
"""Arguments for which kernels are not compiled apart: lengths and the number of documents are other ones in every batch."""


def parts(width: int) -> tuple[int, int]:
    """The two powers of two, of at least 16 or none, that hold a row of this width with the least left over."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = 0 if width <= first else max(16, triton.next_power_of_2(width - first))
    return (2 * first, 0) if rest == first else (first, rest)


def split(D: int, W: int) -> dict[str, int]:
    """Constants of the kernels: the widths of q and k, and of v, with their parts."""
    (D0, D1), (W0, W1) = parts(D), parts(W)
    return dict(D=D, D0=D0, D1=D1, W=W, W0=W0, W1=W1)


@jit
def part(base, rows, stride, column_stride, inside, FIRST: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Columns FIRST.. of the rows (N,) of a matrix, zeros beyond its WIDTH and, if MASKED, where not `inside` (N,)."""
    columns = FIRST + tl.arange(0, PART)
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns.to(tl.int64)[None, :] * column_stride
    if MASKED and FIRST + PART > WIDTH:
        values = tl.load(pointers, inside[:, None] & (columns < WIDTH)[None, :], 0.0)
    elif MASKED:
        values = tl.load(pointers, inside[:, None], 0.0)
    elif FIRST + PART > WIDTH:
        values = tl.load(pointers, (columns < WIDTH)[None, :], 0.0)
    else:
        values = tl.load(pointers)
    return values


@jit
def rows_of(
    source, member, at, end, strides, BLOCK: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The tile of rows at..at + BLOCK of a member of the source's heads, in parts; where MASKED, rows from `end` on are zeros."""
    if DESCRIBED:
        return (source.load([at, member * WIDTH]),)
    else:
        rows, base = at + tl.arange(0, BLOCK), source + tl.cast(member, tl.int64) * strides[2]
        first = part(base, rows, strides[1], strides[3], rows < end, 0, P0, WIDTH, MASKED)
        if P1:
            return first, part(base, rows, strides[1], strides[3], rows < end, P0, P1, WIDTH, MASKED)
        else:
            return (first,)


@jit
def store_rows(base, rows, strides, inside, tile, P0: tl.constexpr, WIDTH: tl.constexpr):
    """Write a tile in parts, in the dtype of `base`."""
    for i in tl.static_range(len(tile)):
        columns = i * P0 + tl.arange(0, tile[i].shape[1])
        pointers = base + rows.to(tl.int64)[:, None] * strides[1] + columns[None, :] * strides[3]
        tl.store(pointers, tile[i].to(base.dtype.element_ty), inside[:, None] & (columns < WIDTH)[None, :])


@jit
def add_rows(base, rows, strides, inside, tile, P0: tl.constexpr, WIDTH: tl.constexpr):
    """Add a tile in parts to what lies there in fp32, by atomics."""
    for i in tl.static_range(len(tile)):
        columns = i * P0 + tl.arange(0, tile[i].shape[1])
        pointers = base + rows.to(tl.int64)[:, None] * strides[1] + columns[None, :] * strides[3]
        tl.atomic_add(pointers, tile[i], inside[:, None] & (columns < WIDTH)[None, :], sem="relaxed")


@jit
def zeros(N: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """A tile of N rows in fp32."""
    if P1:
        return tl.zeros((N, P0), tl.float32), tl.zeros((N, P1), tl.float32)
    else:
        return (tl.zeros((N, P0), tl.float32),)


@jit
def scaled(tile, factor):
    """The tile times a number, or times a column of one a row."""
    if len(tile) == 2:
        return tile[0] * factor, tile[1] * factor
    else:
        return (tile[0] * factor,)


@jit
def inner(a, b, PRECISION: tl.constexpr):
    """a b^T (M, N) in fp32 of tiles (M, W) and (N, W)."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) == 2:
        total = tl.dot(a[1], tl.trans(b[1]), total, input_precision=PRECISION)
    return total


@jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a b of a (M, N) and tiles (N, W), (M, W)."""
    a = a.to(b[0].dtype)
    if len(b) == 2:
        return tl.dot(a, b[0], total[0], input_precision=PRECISION), tl.dot(a, b[1], total[1], input_precision=PRECISION)
    else:
        return (tl.dot(a, b[0], total[0], input_precision=PRECISION),)


@jit
def tanh(x):
    """To fp32's precision, of small numbers too: the quotient of exponentials would cancel there, so a series serves."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0)))))
    return tl.where(y < 0.0625, near, tl.where(x < 0.0, -far, far))


@jit
def scores(x, i, j, shift, t, s, head, document, f, EDGE: tl.constexpr):
    """(scores, their derivative by scale * x) of products x of queries i with keys j, of which only those of an EDGE may lie beyond the last.

    i and j are broadcast against each other to x's shape: (M, 1) and (1, N), or (1, M) and (N, 1) where x is transposed.
    """
    if f.softcap is not None:
        capped = tanh(x * (f.scale / f.softcap))
        y, slope = capped * f.softcap, 1.0 - capped * capped
    else:
        y, slope = x * f.scale, 1.0
    if f.bias is not None:
        base = f.bias + tl.cast(document, tl.int64) * f.bias_strides[0] + tl.cast(head, tl.int64) * f.bias_strides[1]
        pointers = base + i.to(tl.int64) * f.bias_strides[2] + j.to(tl.int64) * f.bias_strides[3]
        # Without a mask that cuts through rows, one load takes several elements of them.
        y += tl.load(pointers, (i < t) & (j < s) if EDGE else i < t, 0.0).to(tl.float32)
    if f.slopes is not None:
        by = tl.load(f.slopes + tl.cast(document, tl.int64) * f.slopes_stride + head)
        y -= by * tl.abs(i + shift - j).to(tl.float32)
    return y, slope


@jit
def hidden(y, i, j, shift, prefix, f, instead):
    """y, with `instead` where query i does not see key j."""
    if f.causal:
        reached = j <= i + shift
        if f.window is not None:
            reached &= j > i + shift - f.window
        if f.prefix is not None:
            reached |= j < prefix
        return tl.where(reached, y, instead)
    else:
        return y


@jit
def kept(rows, first_column, head, seed, f, COLUMNS: tl.constexpr):
    """Whether dropout keeps the probabilities (M, COLUMNS) of queries at global positions `rows` and keys from `first_column` on."""
    row, head = rows.to(tl.uint32)[:, None], tl.cast(f.head_start + head, tl.int64).to(tl.uint32)
    if f.aligned:
        group = (first_column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :]
        a, b, c, d = tl.philox(seed, group, row, head, 1)
        word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        column = (first_column + tl.arange(0, COLUMNS))[None, :]
        a, b, c, d = tl.philox(seed, (column >> 2).to(tl.uint32), row, head, 1)
        which = column & 3
        word = tl.where(which == 0, a, tl.where(which == 1, b, tl.where(which == 2, c, d)))
    return word >= tl.cast(f.threshold, tl.int64).to(tl.uint32)


@jit
def extent(document, T, S, f):
    """(queries t, keys s, row of the first query, row of the first key, shift, prefix, global position of query 0) of a document, or of many."""
    if f.cu_q is not None:
        first_q, first_k = tl.load(f.cu_q + document).to(tl.int64), tl.load(f.cu_k + document).to(tl.int64)
        t = (tl.load(f.cu_q + document + 1) - first_q).to(tl.int32)
        s = (tl.load(f.cu_k + document + 1) - first_k).to(tl.int32)
        # A document of no rows has no place of its own at the end; descriptors, which have one row at least, take the last.
        first_q, first_k = tl.minimum(first_q, T - 1), tl.minimum(first_k, S - 1)
    else:
        first_q, first_k = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
        t, s = T, S
    start = f.k_start + s - t if f.q_start is None else f.q_start
    prefix = 0
    if f.prefix is not None:
        prefix = tl.load(f.prefix + document * f.prefix_stride).to(tl.int32) - f.k_start
    return t, s, first_q, first_k, start - f.k_start, prefix, start


@jit
def origin(base, strides, document, first_row, head, f):
    """Where a head's rows of a document begin."""
    place = base + first_row * strides[1] + tl.cast(head, tl.int64) * strides[2]
    return place + tl.cast(document, tl.int64) * strides[0] if f.cu_q is None else place


@jit
def keys_seen(first, last, s, shift, prefix, f, BLOCK: tl.constexpr):
    """(low, low_full, high_full, high, gap_at, gap): which keys the queries first..last see.

    Keys low.. to high.. are seen by some of them, keys low_full.. to high_full.. by each; all but `high` are multiples of BLOCK. With a prefix
    and a window there are two reaches, both of which count as edge: from `gap_at` on, `gap` keys are to be stepped over. gap is 0 otherwise.
    """
    if f.cu_q is not None:
        s = tl.where(first <= last, s, 0)  # a place for a block that its document does not have
    low, low_full, high, high_full, gap_at, gap = 0, 0, s, s, s, 0
    if f.causal:
        high, high_full = last + shift + 1, first + shift + 1
        if f.window is not None:
            low = tl.maximum(0, first + shift - f.window + 1) // BLOCK * BLOCK
            low_full = tl.cdiv(tl.maximum(0, last + shift - f.window + 1), BLOCK) * BLOCK
        if f.prefix is not None:
            if f.window is not None:
                gap_at = tl.cdiv(tl.maximum(0, prefix), BLOCK) * BLOCK
                gap = tl.maximum(0, low - gap_at)
                low, low_full = 0, s
            high, high_full = tl.maximum(high, prefix), tl.maximum(high_full, prefix)
        high, high_full = tl.maximum(0, tl.minimum(s, high)), tl.maximum(0, tl.minimum(s, high_full))
    low_full = tl.minimum(low_full, high)
    return low, low_full, tl.maximum(high_full // BLOCK * BLOCK, low_full), high, gap_at, gap


@jit
def queries_seen(first, last, t, shift, prefix, f, BLOCK: tl.constexpr):
    """(low, high): queries low.. to high.. see some of the keys first..last; low is a multiple of BLOCK."""
    if f.cu_q is not None:
        t = tl.where(first <= last, t, 0)  # a place for a block that its document does not have
    low, high = 0, t
    if f.causal:
        low = first - shift
        if f.window is not None:
            high = tl.minimum(t, last - shift + f.window)
        if f.prefix is not None:  # every query sees keys of the prefix
            low, high = tl.where(first < prefix, 0, low), tl.where(first < prefix, t, high)
        low, high = tl.maximum(0, low) // BLOCK * BLOCK, tl.maximum(0, high)
    return low, high


@jit
def source(base, strides, rows, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DESCRIBED: tl.constexpr):
    """What `rows_of` reads rows of HEADS neighbouring heads from: their address, or a descriptor for the copy engine, which reads zeros beyond."""
    return tl.make_tensor_descriptor(base, [tl.maximum(rows, 1), HEADS * WIDTH], [strides[1], 1], [BLOCK, WIDTH]) if DESCRIBED else base
