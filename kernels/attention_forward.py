"""The forward of flash attention: a program owns BLOCK_M queries of a head and reads the keys they see, BLOCK_N at a time.

    m' = max(m, max_j s_ij)    p_ij = exp(s_ij - m')    l' = l exp(m - m') + sum_j p_ij    acc' = acc exp(m - m') + p v    out = acc / l

Scores, softmax and sums in fp32; probabilities are rounded to v's dtype before they multiply v. Of the keys before, between and after the
reach of a program's queries whole tiles are never read; only those at its edges are masked.
Sources: Milakov and Gimelshein 2018 (online softmax, arXiv 1805.02867); Dao 2023 (FlashAttention-2, arXiv 2307.08691).
"""

from __future__ import annotations

import torch
from nanotrain.kernels.attention_configs import config
from nanotrain.kernels.attention_order import order_of, owned, together
from nanotrain.kernels.attention_tiles import (
    COUNTS,
    LOG2E,
    Features,
    add_product,
    extent,
    hidden,
    inner,
    kept,
    keys_seen,
    origin,
    rows_of,
    scaled,
    scores,
    source,
    split,
    store_rows,
    zeros,
)  # fmt: skip
from nanotrain.kernels.runtime import jit, launch, tl


@jit(do_not_specialize=COUNTS)
def _attention_forward_kernel(
    q, k, v, out, lse, order, f, T, S, heads, q_strides, k_strides, v_strides, out_strides, units, blocks, together,
    GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, W: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """GROUP query heads share a key head; D and W are the widths of q and k, and of v."""
    unit, head, document, block = owned(tl.program_id(0), order, f, heads, units, blocks, together, False)
    t, s, first_q, first_k, shift, prefix, start = extent(document, T, S, f)
    first = block * BLOCK_M
    i = first + tl.arange(0, BLOCK_M)
    inside = i < t
    q = source(origin(q, q_strides, document, first_q, head, f), q_strides, t, 1, D, BLOCK_M, SPECIALIZED)
    k = source(origin(k, k_strides, document, first_k, head // GROUP, f), k_strides, s, 1, D, BLOCK_N, SPECIALIZED)
    v = source(origin(v, v_strides, document, first_k, head // GROUP, f), v_strides, s, 1, W, BLOCK_N, SPECIALIZED)
    out = origin(out, out_strides, document, first_q, head, f)
    lse += unit.to(tl.int64) * T + first_q
    low, low_full, high_full, high, gap_at, gap = keys_seen(first, tl.minimum(first + BLOCK_M, t) - 1, s, shift, prefix, f, BLOCK_N)
    seed = tl.load(f.seeds + document * f.seeds_stride) if f.seeds is not None else 0
    queries = rows_of(q, 0, first, t, q_strides, BLOCK_M, D0, D1, D, True, SPECIALIZED)
    acc = zeros(BLOCK_M, W0, W1)
    if f.sinks is not None:
        peak = tl.full((BLOCK_M,), 1.0, tl.float32) * tl.load(f.sinks + head)
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
    # Keys at the lower edge, those that all queries see, keys at the upper edge; specialized warps have one loop, and mask it all.
    for phase in tl.static_range(2 if SPECIALIZED else 1 if f.window is None else 0, 3):
        if phase == 0:
            begin, end = low, low_full - gap
        elif phase == 1:
            begin, end = low_full, high_full
        elif SPECIALIZED:
            begin, end = low, high - gap
        else:
            begin, end = high_full, high
        for at in tl.range(begin, end, BLOCK_N, warp_specialize=SPECIALIZED):
            if f.window is not None and f.prefix is not None:
                at += tl.where(at >= gap_at, gap, 0)
            j = at + tl.arange(0, BLOCK_N)
            keys = rows_of(k, 0, at, s, k_strides, BLOCK_N, D0, D1, D, phase != 1, SPECIALIZED)
            y, _ = scores(inner(queries, keys, PRECISION), i[:, None], j[None, :], shift, t, s, head, document, f, phase != 1)
            if phase != 1:
                y = tl.where((j < s)[None, :], hidden(y, i[:, None], j[None, :], shift, prefix, f, float("-inf")), float("-inf"))
            above = tl.maximum(peak, tl.max(y, 1))
            # A query may have seen no key yet, or only some whose bias hides them.
            base = above if phase == 1 and f.bias is None else tl.where(above == float("-inf"), 0.0, above)
            if f.bias is None:
                p = tl.exp2(y * LOG2E - (base * LOG2E)[:, None])
            else:  # which may be as low as numbers go
                p = tl.exp2((y - base[:, None]) * LOG2E)
            shrink = tl.exp2((peak - base) * LOG2E)
            total = total * shrink + tl.sum(p, 1)
            acc = scaled(acc, shrink[:, None])
            if f.seeds is not None:
                p = tl.where(kept(start + i, f.k_start + at, head, seed, f, BLOCK_N), p, 0.0)
            values = rows_of(v, 0, at, s, v_strides, BLOCK_N, W0, W1, W, phase != 1, SPECIALIZED)
            acc = add_product(acc, p, values, PRECISION)
            peak = above
    empty = total == 0.0
    factor = 1.0 / tl.where(empty, 1.0, total)
    if f.seeds is not None:
        factor *= f.kept
    store_rows(out, i, out_strides, inside, scaled(acc, factor[:, None]), W0, W)
    tl.store(lse + i, tl.where(empty, float("-inf"), peak + tl.log(tl.where(empty, 1.0, total))), inside)


def forward(q, k, v, f: Features, longest: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (B, T, H, Dv) in q's dtype, log-sum-exp (B, H, T) in fp32) of attention with these features; `longest` is the most queries and keys
    of a document."""
    (B, T, H, D), (S, K, W) = q.shape, v.shape[1:]
    out, lse = q.new_empty(B, T, H, W), torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    c = config("forward", (q, k, v), f, longest[0])
    blocks, order = order_of((T, S), c.block_m, c.block_n, f)
    launch(
        _attention_forward_kernel, (B * H * blocks,), q, k, v, out, lse, order, f, T, S, H, q.stride(), k.stride(), v.stride(),
        out.stride(), B * H, blocks, together(B * H, H // K, S * (D + W) * q.element_size()), **split(D, W), GROUP=H // K, PRECISION="ieee",
        SPECIALIZED=c.specialized, **c.options(),
    )  # fmt: skip
    return out, lse
