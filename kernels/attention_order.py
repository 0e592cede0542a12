"""In which order attention's programs take blocks of rows: those that read the most come first, and heads in turns that the L2 cache serves.

A launch lasts until its last program ends: one with much to read that began late would keep the others waiting. In a batch of equal rows the
order follows from the mask. Packed documents have blocks of any length in no order at all, so a kernel ranks them, on the device, where
their offsets are.
"""

from __future__ import annotations

import torch
from nanotrain.kernels.attention_tiles import COUNTS, Features, extent, keys_seen, queries_seen
from nanotrain.kernels.runtime import jit, launch, tl, triton

_TOGETHER = 32 << 20
"""Bytes of keys and values that programs running at one time should share: they stay in an H100's L2 cache, which has 50 MB."""

_RANKED, _COMPARED = 16, 128
"""Blocks that a program ranks, and those it compares them with at a time: more would not fit an AMD processor's scalar registers."""


def together(units: int, group: int, bytes_each: int) -> int:
    """How many of the units, each with so many bytes of keys and values for a group of heads, take turns so that the L2 cache serves them."""
    groups = max(1, _TOGETHER // max(1, bytes_each))
    return min(units, groups * group)


@jit
def _place(place, f, T, S, documents, steps, BLOCK: tl.constexpr, OTHER: tl.constexpr, KEYS: tl.constexpr):
    """(document, block inside of it, rows of the other side that it reads) of places, where blocks of documents follow each other.

    Those of document d begin at cu[d] // BLOCK + d. So each has room for its own, though some for one more than it has, and no sum over
    documents is needed; `steps` bits hold their number.
    """
    cu = f.cu_k if KEYS else f.cu_q
    document = place * 0
    for step in range(steps):  # a binary search for the last that begins here or before
        further = document + (1 << (steps - 1 - step))
        begins = tl.load(cu + further, further < documents, 0).to(tl.int32) // BLOCK + further
        document = tl.where((further < documents) & (begins <= place), further, document)
    block = place - (tl.load(cu + document).to(tl.int32) // BLOCK + document)
    t, s, _first_q, _first_k, shift, prefix, _start = extent(document, T, S, f)
    first = block * BLOCK
    if KEYS:
        low, high = queries_seen(first, tl.minimum(first + BLOCK, s) - 1, t, shift, prefix, f, OTHER)
        return document, block, high - low
    else:
        low, _low_full, _high_full, high, _gap_at, gap = keys_seen(first, tl.minimum(first + BLOCK, t) - 1, s, shift, prefix, f, OTHER)
        return document, block, high - low - gap


@jit(do_not_specialize=(*COUNTS, "steps"))
def _attention_order_kernel(
    order, f, T, S, documents, blocks, steps, BLOCK: tl.constexpr, OTHER: tl.constexpr, KEYS: tl.constexpr, RANKED: tl.constexpr,
    COMPARED: tl.constexpr,
):  # fmt: skip
    """Write (document, block) of RANKED places where their ranks are: after places that read more, or as much and come before."""
    place = tl.program_id(0) * RANKED + tl.arange(0, RANKED)
    document, block, reads = _place(place, f, T, S, documents, steps, BLOCK, OTHER, KEYS)
    rank = tl.zeros((RANKED,), tl.int32)
    for at in range(0, blocks, COMPARED):
        other = at + tl.arange(0, COMPARED)
        _document, _block, others = _place(other, f, T, S, documents, steps, BLOCK, OTHER, KEYS)
        ahead = (others[None, :] > reads[:, None]) | ((others[None, :] == reads[:, None]) & (other[None, :] < place[:, None]))
        rank += tl.sum((ahead & (other < blocks)[None, :]).to(tl.int32), 1)
    tl.store(order + 2 * rank, document, place < blocks)
    tl.store(order + 2 * rank + 1, block, place < blocks)


def order_of(rows: tuple[int, int], block: int, other: int, f: Features, *, keys: bool = False) -> tuple[int, torch.Tensor | None]:
    """(blocks of a batch entry, None), or of packed documents all blocks and (document, block inside of it) of each in their order, int32.

    `rows` are all queries and keys, of which programs own `block` queries, or `keys`, and read the rest by `other` a time. A document may have
    an entry for one block more than it has, which reads nothing.
    """
    T, S = rows
    if f.cu_q is None:
        return triton.cdiv(S if keys else T, block), None
    documents = len(f.cu_q) - 1
    blocks = (S if keys else T) // block + documents
    order = torch.empty(blocks, 2, dtype=torch.int32, device=f.cu_q.device)
    mask = f._replace(**dict.fromkeys(("softcap", "sinks", "slopes", "bias", "seeds")), bias_strides=())
    launch(
        _attention_order_kernel, (triton.cdiv(blocks, _RANKED),), order, mask, T, S, documents, blocks, documents.bit_length(), BLOCK=block,
        OTHER=other, KEYS=keys, RANKED=_RANKED, COMPARED=_COMPARED,
    )  # fmt: skip
    return blocks, order


@jit
def owned(program, order, f, heads, units, blocks, together, KEYS: tl.constexpr):
    """(unit, head, document, block) of a program: `together` units take turns, so that what they read in common is read from the cache.

    A unit is one of the `heads`, those of keys where programs own KEYS, in a batch entry or in all packed documents, of which `order` is that
    of `order_of`.
    """
    group = program // (together * blocks)
    inside = program % (together * blocks)
    members = tl.minimum(together, units - group * together)
    unit, place = group * together + inside % members, inside // members
    if f.cu_q is not None:
        return unit, unit, tl.load(order + 2 * place), tl.load(order + 2 * place + 1)
    elif KEYS:  # the first are seen by the most queries
        return unit, unit % heads, unit // heads, place
    else:  # the last see the most keys
        return unit, unit % heads, unit // heads, blocks - 1 - place
