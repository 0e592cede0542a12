"""The backward of flash attention, from the log-sum-exp of the forward: nothing is kept of the scores, which are computed again.

    p_ij = exp(s_ij - lse_i)    ds_ij = p_ij (grad_i . v_j - delta_i)    delta_i = grad_i . out_i - grad_lse_i
    grad_v_j = sum_i p_ij grad_i    grad_k_j = scale sum_i ds_ij q_i    grad_q_i = scale sum_j ds_ij k_j    grad_bias = ds

One kernel owns keys and adds up over the queries that see them, of every head of their group; one owns queries and adds up over the keys they
see. So each gradient is a sum in one program, in one order: its bits repeat. That costs 7 products of tiles; 5 where the first adds to the queries'
gradients by atomics, in fp32 and in whatever order programs come. A bias has a third kernel, which owns elements of it and adds up over all
that share them.

p and ds are rounded to the inputs' dtype before they multiply; scores, softmax and sums are in fp32.
Source: Dao 2023 (FlashAttention-2, arXiv 2307.08691).
"""

from __future__ import annotations

import torch
from nanotrain.kernels.attention_configs import FUSED, config
from nanotrain.kernels.attention_order import order_of, owned, together
from nanotrain.kernels.attention_tiles import (
    COUNTS,
    LOG2E,
    Features,
    add_product,
    add_rows,
    extent,
    hidden,
    inner,
    kept,
    keys_seen,
    origin,
    queries_seen,
    rows_of,
    scaled,
    scores,
    source,
    split,
    store_rows,
    zeros,
)  # fmt: skip
from nanotrain.kernels.runtime import jit, launch, tl, triton


@jit(do_not_specialize=COUNTS)
def _attention_delta_kernel(
    grad, out, grad_lse, delta, grad_strides, out_strides, lse_strides, T, heads, blocks, W: tl.constexpr, PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """grad . out - grad_lse of BLOCK_M queries of a head."""
    unit, i = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head, entry = unit % heads, (unit // heads).to(tl.int64)
    column, inside = tl.arange(0, PART), i < T
    mask = inside[:, None] & (column < W)[None, :]
    row = i.to(tl.int64)
    grad += entry * grad_strides[0] + head.to(tl.int64) * grad_strides[2]
    out += entry * out_strides[0] + head.to(tl.int64) * out_strides[2]
    a = tl.load(grad + row[:, None] * grad_strides[1] + column.to(tl.int64)[None, :] * grad_strides[3], mask, 0.0).to(tl.float32)
    b = tl.load(out + row[:, None] * out_strides[1] + column.to(tl.int64)[None, :] * out_strides[3], mask, 0.0).to(tl.float32)
    value = tl.sum(a * b, 1)
    if grad_lse is not None:
        value -= tl.load(grad_lse + entry * lse_strides[0] + head.to(tl.int64) * lse_strides[1] + row * lse_strides[2], inside, 0.0)
    tl.store(delta + unit.to(tl.int64) * T + row, value, inside)


@jit
def _tile(
    queries, keys, values, grads, sums, deltas, i, j, rows, first_column, head, document, shift, t, s, prefix, seed, f,
    MASKED: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(probabilities that met v, gradient of scale * q . k, gradient of the score) of a tile of queries (M) and keys (N).

    All are (M, N), or (N, M) where i is (1, M) and j (N, 1); `sums` and `deltas` have the shape of i.
    """
    if i.shape[0] == 1:
        x, dp = inner(keys, queries, PRECISION), inner(values, grads, PRECISION)
    else:
        x, dp = inner(queries, keys, PRECISION), inner(grads, values, PRECISION)
    y, slope = scores(x, i, j, shift, t, s, head, document, f, TAIL or i.shape[0] == 1)
    p = tl.exp2((y - sums) * LOG2E)
    if MASKED:
        p = hidden(p, i, j, shift, prefix, f, 0.0)
    if TAIL:
        p = tl.where(j < s, p, 0.0)
    met = p
    if f.seeds is not None:
        N: tl.constexpr = j.shape[0] * j.shape[1]
        keep = kept(rows, first_column, head, seed, f, N)
        if i.shape[0] == 1:
            keep = tl.trans(keep)
        met = tl.where(keep, p * f.kept, 0.0)
        dp = tl.where(keep, dp * f.kept, 0.0)
    ds = p * (dp - deltas)
    return met, ds * slope, ds


@jit
def _sums(lse, delta, i, inside):
    """The queries' log-sum-exp, +inf where no key is seen, so that every probability is 0, and their delta."""
    sums, deltas = tl.load(lse + i, inside, float("-inf")), tl.load(delta + i, inside, 0.0)
    empty = sums == float("-inf")
    return tl.where(empty, float("inf"), sums), tl.where(empty, 0.0, deltas)


@jit(do_not_specialize=COUNTS)
def _attention_keys_backward_kernel(
    q, k, v, grad, lse, delta, grad_k, grad_v, grad_q, order, f, T, S, heads, q_strides, k_strides, v_strides, grad_strides, grad_k_strides,
    grad_v_strides, grad_q_strides, units, blocks, together, GROUP: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, W: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of a key head and the queries of its GROUP heads; scores lie transposed, (keys, queries). grad_q (fp32) may be None."""
    key_heads = heads // GROUP
    unit, key_head, document, block = owned(tl.program_id(0), order, f, key_heads, units, blocks, together, True)
    t, s, first_q, first_k, shift, prefix, start = extent(document, T, S, f)
    first = block * BLOCK_N
    j = first + tl.arange(0, BLOCK_N)
    inside = j < s
    head_k = source(origin(k, k_strides, document, first_k, key_head, f), k_strides, s, 1, D, BLOCK_N, SPECIALIZED)
    head_v = source(origin(v, v_strides, document, first_k, key_head, f), v_strides, s, 1, W, BLOCK_N, SPECIALIZED)
    keys = rows_of(head_k, 0, first, s, k_strides, BLOCK_N, D0, D1, D, True, SPECIALIZED)
    values = rows_of(head_v, 0, first, s, v_strides, BLOCK_N, W0, W1, W, True, SPECIALIZED)
    seed = tl.load(f.seeds + document * f.seeds_stride) if f.seeds is not None else 0
    low, high = queries_seen(first, tl.minimum(first + BLOCK_N, s) - 1, t, shift, prefix, f, BLOCK_M)
    total_k, total_v = zeros(BLOCK_N, D0, D1), zeros(BLOCK_N, W0, W1)
    # One loop over the queries of every head of the group.
    first_head = key_head * GROUP
    heads_q = source(origin(q, q_strides, document, first_q, first_head, f), q_strides, t, GROUP, D, BLOCK_M, SPECIALIZED)
    heads_grad = source(origin(grad, grad_strides, document, first_q, first_head, f), grad_strides, t, GROUP, W, BLOCK_M, SPECIALIZED)
    row = tl.cast(unit // key_heads * heads + first_head, tl.int64) * T + first_q
    turns = tl.cdiv(tl.maximum(0, high - low), BLOCK_M)
    for step in tl.range(0, turns * GROUP, warp_specialize=SPECIALIZED):
        member, at = step // turns, low + step % turns * BLOCK_M
        i = at + tl.arange(0, BLOCK_M)
        queries = rows_of(heads_q, member, at, t, q_strides, BLOCK_M, D0, D1, D, True, SPECIALIZED)
        grads = rows_of(heads_grad, member, at, t, grad_strides, BLOCK_M, W0, W1, W, True, SPECIALIZED)
        of_head = row + tl.cast(member, tl.int64) * T
        sums, deltas = _sums(lse + of_head, delta + of_head, i, i < t)
        met, dx, _ds = _tile(
            queries, keys, values, grads, sums[None, :], deltas[None, :], i[None, :], j[:, None], start + i, f.k_start + first,
            first_head + member, document, shift, t, s, prefix, seed, f, True, grad_q is not None, PRECISION,
        )  # fmt: skip
        total_v = add_product(total_v, met, grads, PRECISION)
        total_k = add_product(total_k, dx, queries, PRECISION)
        if grad_q is not None:
            head_grad_q = origin(grad_q, grad_q_strides, document, first_q, first_head + member, f)
            part_q = add_product(zeros(BLOCK_M, D0, D1), tl.trans(dx), keys, PRECISION)
            add_rows(head_grad_q, i, grad_q_strides, i < t, scaled(part_q, f.scale), D0, D)
    store_rows(origin(grad_k, grad_k_strides, document, first_k, key_head, f), j, grad_k_strides, inside, scaled(total_k, f.scale), D0, D)
    store_rows(origin(grad_v, grad_v_strides, document, first_k, key_head, f), j, grad_v_strides, inside, total_v, W0, W)


@jit(do_not_specialize=COUNTS)
def _attention_queries_backward_kernel(
    q, k, v, grad, lse, delta, grad_q, order, f, T, S, heads, q_strides, k_strides, v_strides, grad_strides, grad_q_strides, units, blocks, together,
    GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, W: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of a head and the keys they see."""
    unit, head, document, block = owned(tl.program_id(0), order, f, heads, units, blocks, together, False)
    t, s, first_q, first_k, shift, prefix, start = extent(document, T, S, f)
    first = block * BLOCK_M
    i = first + tl.arange(0, BLOCK_M)
    inside = i < t
    head_q = origin(q, q_strides, document, first_q, head, f)
    head_grad = origin(grad, grad_strides, document, first_q, head, f)
    queries = rows_of(head_q, 0, first, t, q_strides, BLOCK_M, D0, D1, D, True, False)
    grads = rows_of(head_grad, 0, first, t, grad_strides, BLOCK_M, W0, W1, W, True, False)
    row = unit.to(tl.int64) * T + first_q
    sums, deltas = _sums(lse + row, delta + row, i, inside)
    head_k = origin(k, k_strides, document, first_k, head // GROUP, f)
    head_v = origin(v, v_strides, document, first_k, head // GROUP, f)
    seed = tl.load(f.seeds + document * f.seeds_stride) if f.seeds is not None else 0
    low, low_full, high_full, high, gap_at, gap = keys_seen(first, tl.minimum(first + BLOCK_M, t) - 1, s, shift, prefix, f, BLOCK_N)
    total = zeros(BLOCK_M, D0, D1)
    # Keys at the lower edge, those that all queries see, keys at the upper edge.
    for phase in tl.static_range(1 if f.window is None else 0, 3):
        if phase == 0:
            begin, end = low, low_full - gap
        elif phase == 1:
            begin, end = low_full, high_full
        else:
            begin, end = high_full, high
        for at in range(begin, end, BLOCK_N):
            if f.window is not None and f.prefix is not None:
                at += tl.where(at >= gap_at, gap, 0)
            j = at + tl.arange(0, BLOCK_N)
            keys = rows_of(head_k, 0, at, s, k_strides, BLOCK_N, D0, D1, D, phase != 1, False)
            values = rows_of(head_v, 0, at, s, v_strides, BLOCK_N, W0, W1, W, phase != 1, False)
            _met, dx, _ds = _tile(
                queries, keys, values, grads, sums[:, None], deltas[:, None], i[:, None], j[None, :], start + i, f.k_start + at, head, document,
                shift, t, s, prefix, seed, f, phase != 1, phase != 1, PRECISION,
            )  # fmt: skip
            total = add_product(total, dx, keys, PRECISION)
    store_rows(origin(grad_q, grad_q_strides, document, first_q, head, f), i, grad_q_strides, inside, scaled(total, f.scale), D0, D)


@jit(do_not_specialize=COUNTS)
def _attention_bias_backward_kernel(
    q, k, v, grad, lse, delta, grad_bias, f, T, S, heads, documents, q_strides, k_strides, v_strides, grad_strides, bias_shape, row_blocks,
    column_blocks, GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, W: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr,
):  # fmt: skip
    """A tile of the bias, (1 | BLOCK_M, 1 | BLOCK_N), and every batch entry, head, query and key that takes an element of it."""
    program = tl.program_id(0)
    column_block, program = program % column_blocks, program // column_blocks
    row_block, program = program % row_blocks, program // row_blocks
    head_of, document_at = program % bias_shape[1], program // bias_shape[1]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    document_end = documents if bias_shape[0] == 1 else document_at + 1
    head_end = heads if bias_shape[1] == 1 else head_of + 1
    for document in range(document_at, document_end):
        t, s, first_q, first_k, shift, prefix, start = extent(document, T, S, f)
        seed = tl.load(f.seeds + document * f.seeds_stride) if f.seeds is not None else 0
        row_end = t if ONE_ROW else tl.minimum(t, (row_block + 1) * BLOCK_M)
        column_end = s if ONE_COLUMN else tl.minimum(s, (column_block + 1) * BLOCK_N)
        for head in range(head_of, head_end):
            head_q = origin(q, q_strides, document, first_q, head, f)
            head_k = origin(k, k_strides, document, first_k, head // GROUP, f)
            head_v = origin(v, v_strides, document, first_k, head // GROUP, f)
            head_grad = origin(grad, grad_strides, document, first_q, head, f)
            row = head * tl.cast(T, tl.int64) + first_q
            if f.cu_q is None:
                row += document * tl.cast(T, tl.int64) * heads
            for at_row in range(row_block * BLOCK_M, row_end, BLOCK_M):
                i = at_row + tl.arange(0, BLOCK_M)
                queries = rows_of(head_q, 0, at_row, t, q_strides, BLOCK_M, D0, D1, D, True, False)
                grads = rows_of(head_grad, 0, at_row, t, grad_strides, BLOCK_M, W0, W1, W, True, False)
                sums, deltas = _sums(lse + row, delta + row, i, i < t)
                low, _low_full, _high_full, high, _gap_at, _gap = keys_seen(
                    at_row, tl.minimum(at_row + BLOCK_M, t) - 1, s, shift, prefix, f, BLOCK_N
                )
                for at in range(column_block * BLOCK_N, column_end, BLOCK_N):
                    if (at < high) & (at + BLOCK_N > low):
                        j = at + tl.arange(0, BLOCK_N)
                        keys = rows_of(head_k, 0, at, s, k_strides, BLOCK_N, D0, D1, D, True, False)
                        values = rows_of(head_v, 0, at, s, v_strides, BLOCK_N, W0, W1, W, True, False)
                        _met, _dx, ds = _tile(
                            queries, keys, values, grads, sums[:, None], deltas[:, None], i[:, None], j[None, :], start + i, f.k_start + at,
                            head, document, shift, t, s, prefix, seed, f, True, True, PRECISION,
                        )  # fmt: skip
                        total += ds
    i, j = row_block * BLOCK_M + tl.arange(0, BLOCK_M), column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    place = (tl.cast(document_at, tl.int64) * bias_shape[1] + head_of) * bias_shape[2] * bias_shape[3]
    if ONE_ROW:
        total = tl.where(i[:, None] == 0, tl.sum(total, 0)[None, :], 0.0)
    if ONE_COLUMN:
        total = tl.where(j[None, :] == 0, tl.sum(total, 1)[:, None], 0.0)
    pointers = grad_bias + place + i.to(tl.int64)[:, None] * bias_shape[3] + j[None, :]
    tl.store(pointers, total.to(grad_bias.dtype.element_ty), (i < bias_shape[2])[:, None] & (j < bias_shape[3])[None, :])


def delta_of(grad, out, grad_lse) -> torch.Tensor:
    """grad . out - grad_lse (B, H, T) in fp32 of grad and out (B, T, H, Dv); grad_lse (B, H, T) or None."""
    B, T, H, W = out.shape
    delta = torch.empty(B, H, T, dtype=torch.float32, device=out.device)
    if delta.numel():
        part = max(16, triton.next_power_of_2(W))
        block = 4096 // part  # 16 elements a thread
        blocks = triton.cdiv(T, block)
        launch(
            _attention_delta_kernel, (B * H * blocks,), grad, out, grad_lse, delta, grad.stride(), out.stride(),
            None if grad_lse is None else grad_lse.stride(), T, H, blocks, W=W, PART=part, BLOCK_M=block, num_warps=8,
        )  # fmt: skip
    return delta


def backward(
    grad, q, k, v, lse, delta, f: Features, longest: tuple[int, int], deterministic: bool, *, queries=True, keys=True, bias_shape=None, dtype=None
):
    """(grad_q, grad_k, grad_v, grad_bias) of what is asked for, else None; in `dtype`, or that of what each is the gradient of.

    grad (B, T, H, Dv), lse and delta (B, H, T) contiguous fp32; `longest` is the most queries and keys of a document.
    """
    (B, T, H, D), (S, K, W) = q.shape, v.shape[1:]
    documents = B if f.cu_q is None else len(f.cu_q) - 1
    group = H // K
    inputs = (q, k, v, grad, lse, delta)
    strides = q.stride(), k.stride(), v.stride(), grad.stride()
    widths = split(D, W) | dict(GROUP=group, PRECISION="ieee")
    bytes_each = (D + W) * q.element_size()
    grad_q = grad_k = grad_v = grad_bias = None
    # A bias, dropout and wide heads leave no registers for a third gradient.
    fused = queries and keys and not deterministic and f.bias is None and f.seeds is None and max(D, W) <= FUSED
    if fused:
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    if keys:
        grad_k, grad_v = (torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device) for x in (k, v))
        if S:
            c = config("fused" if fused else "keys", (q, k, v, grad), f, longest[1])
            blocks, order = order_of((T, S), c.block_n, c.block_m, f, keys=True)
            to = grad_k, grad_v, grad_q
            launch(
                _attention_keys_backward_kernel, (B * K * blocks,), *inputs, *to, order, f, T, S, H, *strides,
                *(None if x is None else x.stride() for x in to), B * K, blocks, together(B * K, 1, group * T * bytes_each), **widths,
                SPECIALIZED=c.specialized, **c.options(),
            )  # fmt: skip
    if fused:
        grad_q = grad_q.to(dtype or q.dtype)
    elif queries:
        grad_q = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
        if T:
            c = config("queries", (q, k, v, grad), f, longest[0])
            blocks, order = order_of((T, S), c.block_m, c.block_n, f)
            launch(
                _attention_queries_backward_kernel, (B * H * blocks,), *inputs, grad_q, order, f, T, S, H, *strides, grad_q.stride(), B * H, blocks,
                together(B * H, group, S * bytes_each), **widths, **c.options(),
            )  # fmt: skip
    if bias_shape is not None:
        grad_bias = torch.empty(bias_shape, dtype=dtype or f.bias.dtype, device=q.device)
        if grad_bias.numel():
            c = config("bias", (q, k, v, grad), f, longest[0])
            row_blocks, column_blocks = triton.cdiv(bias_shape[2], c.block_m), triton.cdiv(bias_shape[3], c.block_n)
            launch(
                _attention_bias_backward_kernel, (bias_shape[0] * bias_shape[1] * row_blocks * column_blocks,), *inputs, grad_bias, f, T, S, H,
                documents, *strides, tuple(bias_shape), row_blocks, column_blocks, **widths, ONE_ROW=bias_shape[2] == 1,
                ONE_COLUMN=bias_shape[3] == 1, **c.options(),
            )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_bias
