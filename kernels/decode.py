"""Attention of the newest tokens of each row to all that its cache holds, as generation needs it: one query a row, or a few.

    s_j = scale * q . k_j, then softcap: c * tanh(s / c), then ALiBi: s_j -= slope * (i - j)         i, j: positions of query and key
    out = sum_j visible softmax_j(s_j) v_j          a sink adds exp(sink) to the denominator only

Query t of the T newest tokens of row b stands at position i = lengths[b] - T + t and sees the keys at positions j <= i that the cache holds,
with a window w those with j > i - w. Where it sees none the result is 0.

Shapes: q (B, T, H, D), the newest tokens, whose keys and values are in the cache already; lengths (B,), the tokens of each row, those T
included; out (B, T, H, Dv). The cache is a ring for each row: of cells, k (rows, cells, K, D) and v (rows, cells, K, Dv), where the token at
position p lies in cell p % cells; or, with a page table (B, n), of n pages, k (pages, page size, K, D) and v (pages, page size, K, Dv), where
it lies in page table[b, p // page size % n] at p % page size. A row longer than its ring has lost its first tokens.

All queries that share a key head, T * H / K, are rows of one tile, so each key is read once: B * S * K * (D + Dv) * itemsize bytes for S keys
a row, and 2 * B * H * T * S * (D + Dv) FLOPs. The keys of a row are split among enough programs to fill the GPU; each writes its part of the
result in fp32 with its log-sum-exp, and a second kernel merges the parts, in order. One program a row writes the result itself. Scores,
softmax and sums in fp32; probabilities are rounded to v's dtype before they multiply v.
Sources: Flash-Decoding (Dao, Haziza, Massa and Sizov 2023, at pytorch.org/blog); pages: PagedAttention (arXiv 2309.06180).
"""

from __future__ import annotations

import math

import torch
from nanotrain.kernels.attention_tiles import LOG2E, add_product, inner, parts, scaled, tanh, zeros
from nanotrain.kernels.runtime import choose, compute_dtype, has_kernel, jit, launch, multiprocessors, tl, triton

EXAMPLES = ((2, 1, 40, 4, 2, 16), (1, 3, 100, 6, 1, 80))
"""Shapes (B, T, S, H, K, D), S tokens in each row, that tests and benchmarks share."""

_PROGRAMS, _KEYS = 4, 256
"""Programs of a multiprocessor that the keys are split for, and the fewest keys of a program: fewer would not repay what merging takes."""

_MERGED = 4096
"""Elements of parts that a program merges at once, 32 a thread."""

_CONFIGS = {2: {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)}, 4: {64: (16, 64, 8, 2), 128: (16, 32, 4, 2), 256: (16, 16, 8, 2)}}
"""By itemsize and by the widest head: queries of a tile at most, keys of a tile, warps and stages. More queries are tiles of their own, which
read the keys again."""


@torch.no_grad()
def decode_attention_reference(
    q_BTHD, k_cache, v_cache, lengths_B, *, page_table=None, window=None, softcap=None, scale=None, alibi_slopes=None, sinks=None
):  # fmt: skip
    """Attention to a cache in plain PyTorch: keys and values of all cells, of which those that a query does not see are masked."""
    B, T, H, D = q_BTHD.shape
    dtype = compute_dtype(q_BTHD)
    if page_table is None:
        k, v = k_cache[:B], v_cache[:B]
    else:  # entries of pages that hold nothing may be anything
        k, v = (x[page_table.long().clamp(0, max(0, len(x) - 1))].flatten(1, 2) for x in (k_cache, v_cache))
    cells, K = k.shape[1:3]
    if not cells or not q_BTHD.numel():
        return q_BTHD.new_zeros(B, T, H, v.shape[-1])
    last = lengths_B.long()[:, None] - 1
    j = last - (last - torch.arange(cells, device=q_BTHD.device)) % cells  # the position of the newest token that each cell can hold
    i = last + torch.arange(1 - T, 1, device=q_BTHD.device)
    distance = (i[:, :, None] - j[:, None, :])[:, None]
    visible = (distance >= 0) & (j >= 0)[:, None, None]
    if window is not None:
        visible = visible & (distance < window)
    k, v = (x.to(dtype).masked_fill((j < 0)[:, :, None, None], 0.0).transpose(1, 2).repeat_interleave(H // K, 1) for x in (k, v))
    scores = q_BTHD.to(dtype).transpose(1, 2) @ k.mT * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[..., None, None] * distance
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype).view(1, H, 1, 1).expand(B, H, T, 1)], -1)
    weights = torch.softmax(scores, -1)[..., :cells].masked_fill(~visible, 0.0)  # of a query that sees nothing they are no numbers
    return (weights @ v).transpose(1, 2).to(q_BTHD.dtype)


@jit
def _part(places, stride, inside, FIRST: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST.. of the rows that begin at `places` (N,), zeros beyond WIDTH and, where it is given, where not `inside` (N,)."""
    columns = FIRST + tl.arange(0, PART)
    pointers = places[:, None] + columns.to(tl.int64)[None, :] * stride
    if FIRST + PART > WIDTH:
        within = (columns < WIDTH)[None, :]
        return tl.load(pointers, within if inside is None else within & inside[:, None], 0.0)
    elif inside is not None:
        return tl.load(pointers, inside[:, None], 0.0)
    else:
        return tl.load(pointers)


@jit
def _rows(places, stride, inside, P0: tl.constexpr, P1: tl.constexpr, WIDTH: tl.constexpr):
    """The rows that begin at `places`, in parts."""
    if P1:
        return _part(places, stride, inside, 0, P0, WIDTH), _part(places, stride, inside, P0, P1, WIDTH)
    else:
        return (_part(places, stride, inside, 0, P0, WIDTH),)


@jit(do_not_specialize=("cells", "blocks"))
def _decode_kernel(
    q, k, v, out, lse, lengths, table, slopes, sinks, scale, softcap, window, T, K, cells, blocks,
    q_strides, k_strides, v_strides, length_stride, table_strides, slopes_strides,
    GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, W: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows are the queries of GROUP heads that share a key head; out is (B, T, H, splits, W), of which a program writes one split."""
    unit, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = unit % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    t, inside = row // GROUP, row < T * GROUP
    key_head, entry = unit // blocks % K, tl.cast(unit // blocks // K, tl.int64)
    head = key_head * GROUP + row % GROUP
    queries = _rows(
        q + entry * q_strides[0] + t.to(tl.int64) * q_strides[1] + head.to(tl.int64) * q_strides[2], q_strides[3], inside, D0, D1, D
    )  # fmt: skip
    length = tl.load(lengths + entry * length_stride).to(tl.int32)
    i = (length - T + t)[:, None]
    low = tl.maximum(0, length - cells)
    if window is not None:
        low = tl.maximum(low, length - T - window + 1)
    begin = low // BLOCK_N * BLOCK_N if PAGE else low  # tiles that end where pages do
    share = tl.cdiv(tl.cdiv(length - begin, splits), BLOCK_N) * BLOCK_N
    k += tl.cast(key_head, tl.int64) * k_strides[2]
    v += tl.cast(key_head, tl.int64) * v_strides[2]
    acc = zeros(BLOCK_M, W0, W1)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks is not None:  # a key of the first split, whose value is 0
        peak = tl.where(split == 0, tl.load(sinks + head, inside, 0.0) * LOG2E, peak)
        total += 1.0
    if slopes is not None:
        slope = tl.load(slopes + entry * slopes_strides[0] + head * slopes_strides[1], inside, 0.0)[:, None] * LOG2E
    begin += split * share
    page = tl.load(table + entry * table_strides[0] + begin % cells // PAGE * table_strides[1]).to(tl.int64) if PAGE else entry
    for at in range(begin, tl.minimum(begin + share, length), BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        # In place of keys past the last, that one is read: in cells that hold none may lie a NaN, and 0 times that is one.
        step, cell = tl.minimum(j, length - 1) - at, at % cells
        if PAGE:
            place = (cell % PAGE + step).to(tl.int64)
        else:
            place = cell + step
            place = tl.where(place < cells, place, place - cells).to(tl.int64)
        keys = _rows(k + page * k_strides[0] + place * k_strides[1], k_strides[3], None, D0, D1, D)
        y = inner(queries, keys, PRECISION)
        if softcap is not None:
            y = tanh(y * (scale / softcap)) * (softcap * LOG2E)
        else:
            y *= scale * LOG2E
        j = j[None, :]
        if slopes is not None:
            y -= slope * (i - j).to(tl.float32)
        visible = (j >= low) & (j <= i)
        if window is not None:
            visible &= j > i - window
        y = tl.where(visible, y, float("-inf"))
        above = tl.maximum(peak, tl.max(y, 1))
        base = tl.where(above == float("-inf"), 0.0, above)  # a query may have seen no key yet
        p = tl.exp2(y - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        values = _rows(v + page * v_strides[0] + place * v_strides[1], v_strides[3], None, W0, W1, W)
        acc = add_product(scaled(acc, shrink[:, None]), p, values, PRECISION)
        peak = above
        if PAGE:  # the next tile's, a tile ahead of the keys that wait for it
            page = tl.load(table + entry * table_strides[0] + (at + BLOCK_N) % cells // PAGE * table_strides[1]).to(tl.int64)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = scaled(acc, (1.0 / total)[:, None])
    part = ((entry * T + t) * (K * GROUP) + head) * splits + split
    for number in tl.static_range(len(acc)):
        columns = number * W0 + tl.arange(0, acc[number].shape[1])
        places = out + part[:, None] * W + columns[None, :]
        tl.store(places, acc[number].to(out.dtype.element_ty), inside[:, None] & (columns < W)[None, :])
    if lse is not None:  # in units of log 2
        tl.store(lse + part, tl.where(empty, float("-inf"), peak + tl.log2(total)), inside)


@jit(do_not_specialize=("splits",))
def _decode_merge_kernel(parts, lse, out, splits, W: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr):
    """The parts (splits, W) of one query's result, weighted by their sums of exponentials."""
    row = tl.cast(tl.program_id(0), tl.int64)
    column = tl.arange(0, COLUMNS)
    acc, total, peak = tl.zeros((COLUMNS,), tl.float32), 0.0, float("-inf")
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        given = tl.load(lse + row * splits + split, split < splits, float("-inf"))
        values = tl.load(parts + (row * splits + split)[:, None] * W + column[None, :], (split < splits)[:, None] & (column < W)[None, :], 0.0)
        above = tl.maximum(peak, tl.max(given, 0))
        base = tl.where(above == float("-inf"), 0.0, above)
        weight, shrink = tl.exp2(given - base), tl.exp2(peak - base)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(values * weight[:, None], 0)
        peak = above
    tl.store(out + row * W + column, (acc / tl.where(total == 0.0, 1.0, total)).to(out.dtype.element_ty), column < W)


def _splits(units: int, longest: int, device: torch.device) -> int:
    """Programs that share the keys of a row: as many as run at once for all of `units`, each with _KEYS keys at least."""
    return max(1, min(_PROGRAMS * multiprocessors(device) // units, longest // _KEYS))


def _decode(q, k_cache, v_cache, lengths, page_table, window, softcap, scale, alibi_slopes, sinks, longest):
    (B, T, H, D), (K, W), page = q.shape, v_cache.shape[2:], 0 if page_table is None else k_cache.shape[1]
    cells = k_cache.shape[1] if page_table is None else page * page_table.shape[1]
    out = torch.empty(B, T, H, W, dtype=q.dtype, device=q.device)
    if not out.numel() or not cells:
        return out.zero_()
    window = None if window is None or window >= cells else window  # which hides none of the cells
    (D0, D1), (W0, W1), rows = parts(D), parts(W), T * (H // K)
    most, block_n, warps, stages = next(c for width, c in _CONFIGS[q.element_size()].items() if max(D0 + D1, W0 + W1) <= width)
    block_m = min(most, max(16, triton.next_power_of_2(rows)))
    blocks = triton.cdiv(rows, block_m)
    seen = min(cells if longest is None else min(cells, longest), cells if window is None else window + T - 1)
    splits = _splits(B * K * blocks, seen, q.device)
    made, lse = out, None
    if splits > 1:
        made, lse = (torch.empty(B, T, H, splits, *width, dtype=torch.float32, device=q.device) for width in ((W,), ()))
    launch(
        _decode_kernel, (B * K * blocks, splits), q, k_cache, v_cache, made, lse, lengths, page_table, alibi_slopes, sinks, scale, softcap, window,
        T, K, cells, blocks, q.stride(), k_cache.stride(), v_cache.stride(), lengths.stride(0), (0, 0) if page_table is None else page_table.stride(),
        (0, 0) if alibi_slopes is None else alibi_slopes.stride(), GROUP=H // K, D=D, D0=D0, D1=D1, W=W, W0=W0, W1=W1, PAGE=page, BLOCK_M=block_m,
        BLOCK_N=min(block_n, page & -page) if page else block_n, PRECISION="ieee", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        columns = triton.next_power_of_2(W)
        launch(
            _decode_merge_kernel, (B * T * H,), made, lse, out, splits, W=W, COLUMNS=columns, SPLITS=max(1, _MERGED // columns), num_warps=4
        )  # fmt: skip
    return out


@torch.no_grad()
def decode_attention(
    q_BTHD, k_cache, v_cache, lengths_B, *, page_table=None, window=None, softcap=None, scale=None, alibi_slopes=None, sinks=None,
    longest=None, impl="auto",
):  # fmt: skip
    """Attention of q (B, T, H, D), the newest tokens of B rows, to the cache that holds their keys and values; returns out (B, T, H, Dv).

    k_cache, v_cache   (rows, cells, K, D) and (rows, cells, K, Dv) of at least B rows, or with a page table (pages, page size, K, D | Dv);
                       what lies in cells that hold no token is not read
    lengths_B          (B,) int32 or int64: tokens of each row, those of q included
    page_table         (B, n) int32 or int64: the pages of each row; entries of pages that hold no token are not followed
    window             w: a query sees its w last keys, itself among them
    softcap            c: scores become c * tanh(score / c)
    scale              of the scores, default D ** -0.5
    alibi_slopes       (H,) or (B, H); the score of a pair falls by slope * distance
    sinks              (H,) logits that join each softmax's denominator
    longest            no less than the largest length, where the host knows it: how far keys are split depends on it, and nothing else

    Without gradients. Raises ValueError naming the argument for shapes, dtypes or combinations that make no sense.
    """
    _check(q_BTHD, k_cache, v_cache, lengths_B, page_table, window, softcap, alibi_slopes, sinks)
    tensors = [x for x in (q_BTHD, k_cache, v_cache, lengths_B, page_table, alibi_slopes, sinks) if x is not None]
    has = has_kernel(q_BTHD) and max(q_BTHD.shape[3], v_cache.shape[3]) <= 256
    options = dict(page_table=page_table, window=window, softcap=softcap, scale=scale, alibi_slopes=alibi_slopes, sinks=sinks)
    if choose("decode_attention", impl, *tensors, triton=has) != "triton":
        return decode_attention_reference(q_BTHD, k_cache, v_cache, lengths_B, **options)
    options["scale"] = q_BTHD.shape[3] ** -0.5 if scale is None else scale
    if alibi_slopes is not None:
        options["alibi_slopes"] = alibi_slopes.float().expand(q_BTHD.shape[0], q_BTHD.shape[2])
    if sinks is not None:
        options["sinks"] = sinks.float().contiguous()
    return _decode(q_BTHD, k_cache, v_cache, lengths_B, longest=longest, **options)


def _check(q, k, v, lengths, page_table, window, softcap, alibi_slopes, sinks):
    def refuse(what):
        raise ValueError(f"decode_attention: {what}")

    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        refuse(f"q, k_cache, v_cache must have 4 dimensions, got {q.dim()}, {k.dim()}, {v.dim()}")
    B, _, H, D = q.shape
    if k.shape[:3] != v.shape[:3] or k.shape[3] != D:
        refuse(f"q {tuple(q.shape)}, k_cache {tuple(k.shape)}, v_cache {tuple(v.shape)} do not fit")
    if not k.shape[2] or H % k.shape[2]:
        refuse(f"{H} query heads are no multiple of {k.shape[2]} key heads")
    if not q.dtype == k.dtype == v.dtype:
        refuse(f"dtypes differ: q {q.dtype}, k_cache {k.dtype}, v_cache {v.dtype}")
    if not q.is_floating_point():
        refuse(f"q, k_cache, v_cache must be floating point, got {q.dtype}")
    whole = (torch.int32, torch.int64)
    if lengths.shape != (B,) or lengths.dtype not in whole:
        refuse(f"lengths_B {tuple(lengths.shape)} {lengths.dtype} must be {(B,)} in int32 or int64")
    if page_table is None:
        if len(k) < B:
            refuse(f"k_cache has {len(k)} rows, q {B}")
    elif page_table.dim() != 2 or len(page_table) != B or page_table.dtype not in whole:
        refuse(f"page_table {tuple(page_table.shape)} {page_table.dtype} must be ({B}, pages of a row) in int32 or int64")
    elif not k.shape[1] or k.shape[1] % 16:
        refuse(f"k_cache has pages of {k.shape[1]} tokens; make it a multiple of 16")
    if window is not None and window < 1:
        refuse(f"window={window}; a query sees at least itself, use window >= 1")
    if softcap is not None and softcap <= 0:
        refuse(f"softcap={softcap} must be positive; None is no cap")
    for name, value, shapes in (("sinks", sinks, [(H,)]), ("alibi_slopes", alibi_slopes, [(H,), (B, H)])):
        if value is not None and tuple(value.shape) not in shapes:
            refuse(f"{name} {tuple(value.shape)} must be {' or '.join(map(str, shapes))}")


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) for shape (B, T, S, H, K, D), T new tokens of rows that hold S: keys, values, queries and results once."""
    B, T, S, H, K, D = shape
    pairs = sum(max(0, S - T + t + 1) for t in range(T))
    return B * (2 * S * K + 2 * T * H) * D * dtype.itemsize, 4 * B * H * pairs * D
