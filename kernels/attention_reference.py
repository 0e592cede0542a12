"""Attention in plain PyTorch: what the kernels of attention.py are held to, and the CPU's path.

Long inputs are worked off in blocks of queries, or by torch's fused operator, so that scores (T, S) are never held whole; packed documents of
equal length share a batch. Plain self-attention, causal or full, rounds probabilities and scores' gradients to the inputs' dtype before they
multiply v, k and q, as every flash attention does; those products accumulate in fp32 and round their results. Any other call computes in
fp32 throughout (float64 for float64) and rounds its results only.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from nanotrain.kernels.cpu import call
from nanotrain.kernels.random import philox
from nanotrain.kernels.runtime import choose, compute_dtype, sent
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

_SCORES = 1 << 23
"""Scores held at once by the reference: long inputs are worked off in blocks of queries, or by torch's fused operator."""

_QUERIES = 128
"""Queries of a block of the causal path: keys after a block's last query are not multiplied at all."""

_GRAIN = 64
"""Packed documents are padded to multiples of this many tokens where a mask hides the padding."""


class _Causal(torch.autograd.Function):
    """Causal self-attention (or, not `causal`, full attention) of q, k, v (H, B, T | S, D) that keeps its probabilities.

    For short rows on a CPU, where the backward of torch's fused operator spends most of its time on tiny tiles. Both products
    whose results meet an exponential or a difference, q k^T and grad v^T, run in fp32: rounded scores would be wrong by far more than
    rounded probabilities, and large fp16 scores overflow. The other products run in the inputs' dtype with fp32 accumulation; the
    gradients of keys and values are then summed over blocks in fp32. Results lie in memory as (B, T, H, D), in which projections take them.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale, causal, native):
        H, B, T, D = q.shape
        wide = compute_dtype(q)
        q, k, v = (x.reshape(H * B, *x.shape[2:]) for x in (q, k, v))
        q_wide, k_wide = q.to(wide), k.to(wide)
        out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device).permute(2, 0, 1, 3)
        parts = []
        for first, last, seen in _Causal.blocks(T, k.shape[1], causal):
            p = _softmax(torch.bmm(q_wide[:, first:last], k_wide[:, :seen].mT), scale, first if causal else None, q.dtype, native)
            out[:, :, first:last] = torch.bmm(p, v[:, :seen]).view(H, B, last - first, D)
            parts.append(p)
        ctx.save_for_backward(q, k, v, *parts)
        ctx.scale, ctx.causal, ctx.native = scale, causal, native
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, *parts = ctx.saved_tensors
        (H, B, T, D), S, wide = grad.shape, k.shape[1], compute_dtype(q)
        grad = grad.reshape(q.shape)
        grad_wide, v_wide = grad.to(wide), v.to(wide)
        grad_q, grad_k, grad_v = torch.empty_like(q), None, None
        # From the last block, which sees every key, so that its products begin the sums.
        for (first, last, seen), p in reversed(list(zip(_Causal.blocks(T, S, ctx.causal), parts, strict=True))):
            grad_v = _add_product(grad_v, p.mT, grad[:, first:last])
            grad_p = torch.bmm(grad_wide[:, first:last], v_wide[:, :seen].mT)
            grad_s = _softmax_backward(grad_p, p, ctx.scale, ctx.native)
            grad_q[:, first:last] = torch.bmm(grad_s, k[:, :seen])
            grad_k = _add_product(grad_k, grad_s.mT, q[:, first:last])
        # The projection of values takes its gradient as (B, S, H, D) in memory; the rotation of queries and keys takes any.
        laid = torch.empty(B, S, H, D, dtype=q.dtype, device=q.device).permute(2, 0, 1, 3).copy_(grad_v.view(H, B, S, D))
        return grad_q.view(H, B, T, D), grad_k.to(q.dtype).view(H, B, S, D), laid, None, None, None

    @staticmethod
    def blocks(T, S, causal):
        """(first query, last query, keys seen) of each block."""
        return [(i, min(T, i + _QUERIES), min(T, i + _QUERIES)) for i in range(0, T, _QUERIES)] if causal else [(0, T, S)]


def _softmax(scores, scale, first, dtype, native):
    """Probabilities (G, t, s) in `dtype` of scores, which are overwritten. Query i sees keys up to first + i, every key where first is None."""
    if native:
        p = scores if scores.dtype == dtype else torch.empty(scores.shape, dtype=dtype, device=scores.device)
        call("softmax", dtype, scores, p, *scores.shape, -1 if first is None else first, scale)
        return p
    scores.mul_(scale)
    if first is not None:
        t = scores.shape[1]
        scores[:, :, first:].masked_fill_(torch.ones(t, t, dtype=torch.bool, device=scores.device).triu_(1), -math.inf)
    return torch.softmax(scores, -1).to(dtype)


def _softmax_backward(grad_p, p, scale, native):
    """Gradient of the scores, in p's dtype; grad_p is overwritten."""
    if native:
        grad_s = grad_p if p.dtype == grad_p.dtype else torch.empty_like(p)
        call("softmax_back", p.dtype, grad_p, p, grad_s, p.shape[0] * p.shape[1], p.shape[2], scale)
        return grad_s
    return torch._softmax_backward_data(grad_p, p.to(grad_p.dtype), -1, grad_p.dtype).mul_(scale).to(p.dtype)


def _add_product(total, a, b):
    """total, in fp32 at least, with a b added to its first rows; None is the start of a sum."""
    product = torch.bmm(a, b)
    if total is None:
        return product.to(compute_dtype(product))
    total[:, : product.shape[1]] += product
    return total


def _scores(q, k, bias, q_first, k_first, causal, window, softcap, scale, slopes, prefix):
    """Scores (B, H, t, s) of a block of queries (B, H, t, D) with keys (B, H, s, D); -inf where a query does not see a key."""
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(q_first, q_first + q.shape[2], device=q.device)[:, None]
    columns = torch.arange(k_first, k_first + k.shape[2], device=q.device)[None, :]
    if bias is not None:
        scores = scores + bias
    if slopes is not None:
        scores = scores - slopes[..., None, None] * (rows - columns).abs()
    if causal:
        visible = columns <= rows
        if window is not None:
            visible = visible & (columns > rows - window)
        if prefix is not None:
            visible = visible | (columns < prefix.view(-1, 1, 1, 1))
        scores = scores.masked_fill(~visible, -math.inf)
    return scores


def _dropped(probabilities, q_first, k_first, head_start, dropout_p, seed):
    """Probabilities (B, H, t, s), or what else has that shape, after dropout."""
    if dropout_p == 0.0:
        return probabilities
    _, H, t, s = probabilities.shape
    device = probabilities.device
    rows, columns = torch.arange(q_first, q_first + t, device=device)[:, None], torch.arange(k_first, k_first + s, device=device)[None, :]
    heads = torch.arange(head_start, head_start + H, device=device)[:, None, None]
    seeds = torch.as_tensor(seed, dtype=torch.int64, device=device).view(-1, 1, 1, 1)
    words = torch.stack(philox(seeds, columns >> 2, rows, heads, 1), -1)
    word = words.gather(-1, (columns & 3).expand(words.shape[:-1])[..., None]).squeeze(-1)
    return probabilities * (word >= int(dropout_p * 2**32)) / (1.0 - dropout_p)


def _block(q, k, v, sinks, bias, q_first, k_first, head_start, causal, window, softcap, scale, slopes, prefix, dropout_p, seed):
    """Attention of a block of queries (B, H, t, D) over keys (B, H, s, D); returns (out, log-sum-exp)."""
    (B, H, t, _), s = q.shape, k.shape[2]
    scores = _scores(q, k, bias, q_first, k_first, causal, window, softcap, scale, slopes, prefix)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, H, 1, 1).expand(B, H, t, 1)], -1)
    peak = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((B, H, t, 1), -math.inf)
    weights = torch.exp(scores - peak.masked_fill(peak == -math.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (torch.log(total) + peak.masked_fill(empty, 0.0)).masked_fill(empty, -math.inf).squeeze(-1)
    return _dropped((weights / total)[..., :s], q_first, k_first, head_start, dropout_p, seed) @ v, lse


def _blocks(T, S, causal, window, prefix, shift, step):
    """(first, last, low, high) of blocks of queries first..last and the keys low..high that some of them see; query i stands at key i + shift."""
    for first in range(0, T, step):
        last = min(T, first + step)
        low, high = 0, S
        if causal and prefix is None:
            high = min(S, max(0, shift + last))
            low = 0 if window is None else min(high, max(0, shift + first - window + 1))
        yield first, last, low, high


def _bias_part(bias, rows, columns):
    """The bias of these rows and columns; a dimension of one stays as it is, for it is broadcast."""
    bias = bias if bias.shape[-2] == 1 else bias[..., rows, :]
    return bias if bias.shape[-1] == 1 else bias[..., columns]


def _dense(
    q, k, v, *, causal, window, softcap, scale, sinks, alibi_slopes, bias, prefix_len, q_start, k_start, head_start, dropout_p, seed, return_lse, impl
):
    """Attention over a rectangular batch: `_Causal` or torch's fused kernel where they can say it, else blocks of queries."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    q_start = k_start + S - T if q_start is None else q_start
    if window is not None and k_start > q_start + T - 1 - window:
        window = None  # it hides nothing here
    extras = (window, softcap, sinks, alibi_slopes, bias, prefix_len)
    sees_all = not causal or (T == 1 and q_start - k_start >= S - 1)
    plain = all(e is None for e in extras) and not dropout_p and not return_lse and v.shape[-1] == D and T and S
    plain = plain and (sees_all or (q_start == k_start and T == S))
    short = plain and q.device.type == "cpu" and B * H * T * S <= _SCORES
    native = choose("flash_attention", impl, q, k, v, native=short and scale > 0) == "native"
    if plain:
        order = (2, 0, 1, 3) if short else (0, 2, 1, 3)
        heads = [x.permute(order) for x in (q, k, v)]
        if H != K:
            heads[1:] = [x.repeat_interleave(H // K, order.index(2)) for x in heads[1:]]
        if short:
            return _Causal.apply(*heads, scale, not sees_all, native).permute(1, 2, 0, 3), None
        return F.scaled_dot_product_attention(*heads, is_causal=not sees_all, scale=scale).transpose(1, 2), None
    dtype = compute_dtype(q)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(H // K, 1) if H != K else x for x in (k, v))
    slopes = None if alibi_slopes is None else alibi_slopes.to(dtype)
    if prefix_len is not None:
        prefix_len = torch.as_tensor(prefix_len, device=q.device).expand(B)
    outs, lses = [], []
    step = max(16, _SCORES // max(1, B * H * S))
    for first, last, low, high in _blocks(T, S, causal, window, prefix_len, q_start - k_start, step):
        block_bias = None if bias is None else _bias_part(bias, slice(first, last), slice(low, high)).to(dtype)
        arguments = (q[:, :, first:last], k[:, :, low:high], v[:, :, low:high], None if sinks is None else sinks.to(dtype), block_bias,
                     q_start + first, k_start + low, head_start, causal, window, softcap, scale, slopes, prefix_len, dropout_p, seed)  # fmt: skip
        if torch.is_grad_enabled() and step < T:
            out, lse = checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            out, lse = _block(*arguments)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return v.new_zeros(B, 0, H, v.shape[-1]), q.new_zeros(B, H, 0)
    return torch.cat(outs, 2).transpose(1, 2), torch.cat(lses, 2)


class _Lay(torch.autograd.Function):
    """Rows laid into padded slots; padding repeats a row of its document, and its gradient is dropped."""

    @staticmethod
    def forward(ctx, x, source, slot):
        ctx.save_for_backward(slot)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Take(torch.autograd.Function):
    """Rows taken out of their slots again; padding gets no gradient."""

    @staticmethod
    def forward(ctx, x, source, slot):
        ctx.save_for_backward(slot)
        ctx.slots = len(source)
        return x.index_select(0, slot)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.slots, *grad.shape[1:]).index_copy_(0, *ctx.saved_tensors, grad), None, None


def _places(lengths, order, padded, device):
    """(source, slot) for documents of `lengths` laid out in `order`, each padded to its entry of `padded`: the row that fills each slot,
    and the slot that holds each row."""
    lengths, padded = torch.tensor(lengths), torch.tensor(padded)
    starts = (lengths.cumsum(0) - lengths)[order]
    document = torch.arange(len(padded)).repeat_interleave(padded)
    inside = torch.arange(len(document)) - (padded.cumsum(0) - padded)[document]
    source = starts[document] + inside.minimum(lengths[order][document] - 1)
    real = (inside < lengths[order][document]).nonzero()[:, 0]
    slot = torch.empty_like(real).index_copy_(0, source[real], real)
    return tuple(sent(places, device) for places in (source, slot))


def _lengths(name, offsets, total, known=None):
    """Lengths of the documents between offsets, which must run from 0 to total; where they are `known` nothing waits for the offsets."""
    if known is not None:
        if len(known) != len(offsets) - 1 or sum(known) != total:
            fits = f"{name} of {len(offsets) - 1} documents, {total} tokens"
            raise ValueError(f"flash_attention: {len(known)} lengths of {sum(known)} tokens do not fit {fits}")
        return list(known)
    ends = offsets.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[:1] != [0] or ends[-1:] != [total] or min(lengths, default=-1) < 0:
        raise ValueError(f"flash_attention: {name} must rise from 0 to the {total} tokens held, got {str(ends)[:80]}")
    return lengths


def document_lengths(q, k, cu_seqlens, cu_seqlens_k, lengths, bias):
    """Lengths of the packed documents of q and of k; ValueError for offsets that do not fit these or the bias."""
    lengths_q = _lengths("cu_seqlens", cu_seqlens, q.shape[1], lengths)
    S = k.shape[1]
    lengths_k = _lengths("cu_seqlens", cu_seqlens, S, lengths) if cu_seqlens_k is None else _lengths("cu_seqlens_k", cu_seqlens_k, S)
    longest = (max(lengths_q, default=0), max(lengths_k, default=0))
    if bias is not None and any(1 != n < length for n, length in zip(bias.shape[-2:], longest[2 - min(2, bias.dim()) :], strict=True)):
        raise ValueError(f"flash_attention: bias {tuple(bias.shape)} does not reach the longest document, {longest[0]} x {longest[1]}")
    return lengths_q, lengths_k


def flash_attention_reference(
    q_BTHD, k_BSKD, v_BSKD, *, causal=True, window=None, softcap=None, scale=None, sinks=None, alibi_slopes=None, bias=None, prefix_len=None,
    cu_seqlens=None, lengths=None, cu_seqlens_k=None, q_start=None, k_start=0, head_start=0, dropout_p=0.0, seed=None, return_lse=False,
    impl="reference",
):  # fmt: skip
    """Attention in plain PyTorch; packed documents of equal length share a batch. Another `impl` has C++ make the softmax where it can."""
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
    common = dict(causal=causal, window=window, softcap=softcap, scale=scale, sinks=sinks, q_start=q_start, k_start=k_start,
                  head_start=head_start, dropout_p=dropout_p, return_lse=return_lse, impl=impl)  # fmt: skip
    if cu_seqlens is None:
        out, lse = _dense(q_BTHD, k_BSKD, v_BSKD, alibi_slopes=alibi_slopes, bias=bias, prefix_len=prefix_len, seed=seed, **common)
    else:
        lengths_q, lengths_k = document_lengths(q_BTHD, k_BSKD, cu_seqlens, cu_seqlens_k, lengths, bias)
        longest = (max(lengths_q), max(lengths_k))
        if len({*zip(lengths_q, lengths_k, strict=True)}) == 1 and all(longest):  # they lie as a batch does
            n, (t, s) = len(lengths_q), longest
            own_bias = None if bias is None else _bias_part(bias, slice(t), slice(s))
            own = (x.reshape(n, -1, *x.shape[2:]) for x in (q_BTHD, k_BSKD, v_BSKD))
            out, lse = _dense(*own, alibi_slopes=alibi_slopes, bias=own_bias, prefix_len=prefix_len, seed=seed, **common)
            out = out.reshape(1, n * t, *out.shape[2:]).to(q_BTHD.dtype)
            return (out, lse.transpose(0, 1).reshape(1, -1, n * t)) if return_lse else out
        # Under a causal mask a document may be padded at its end: no query of its own sees that. Few lengths make few, full batches.
        grain = _GRAIN if causal and cu_seqlens_k is None and q_start is None and prefix_len is None and bias is None else 1
        groups: dict[tuple[int, int], list[int]] = {}
        for document, (t, s) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            groups.setdefault((-(-t // grain) * grain, -(-s // grain) * grain), []).append(document)
        order = [document for documents in groups.values() for document in documents]
        padded = [group for group, documents in groups.items() for _ in documents]
        places_q = _places(lengths_q, order, [t for t, _ in padded], q_BTHD.device)
        places_k = places_q if cu_seqlens_k is None else _places(lengths_k, order, [s for _, s in padded], q_BTHD.device)
        q, k, v = _Lay.apply(q_BTHD[0], *places_q), _Lay.apply(k_BSKD[0], *places_k), _Lay.apply(v_BSKD[0], *places_k)
        outs, lses, first_q, first_k = [], [], 0, 0

        def pick(value, documents, shared=0):  # the documents' own values, unless value has only dimensions that they share
            if not isinstance(value, torch.Tensor) or value.dim() <= shared:
                return value
            return value[sent(torch.tensor(documents), value.device)]

        for (t, s), documents in groups.items():
            n = len(documents)
            last_q, last_k = first_q + n * t, first_k + n * s
            cuts = ((q, first_q, last_q), (k, first_k, last_k), (v, first_k, last_k))
            own = (x[first:last].view(n, (last - first) // n, *x.shape[1:]) for x, first, last in cuts)
            own_bias = None if bias is None else _bias_part(bias if len(bias) == 1 else bias[documents], slice(t), slice(s))
            out, lse = _dense(*own, alibi_slopes=pick(alibi_slopes, documents, 1), bias=own_bias, prefix_len=pick(prefix_len, documents),
                              seed=pick(seed, documents), **common)  # fmt: skip
            outs.append(out.flatten(0, 1))
            lses.append(None if lse is None else lse.mT.flatten(0, 1))
            first_q, first_k = last_q, last_k
        out = _Take.apply(torch.cat(outs), *places_q)[None]
        lse = _Take.apply(torch.cat(lses), *places_q).mT[None] if return_lse else None
    out = out.to(q_BTHD.dtype)
    return (out, lse) if return_lse else out


def attention_delta_reference(grad_BTHD, out_BTHD, grad_lse_BHT=None):
    """grad . out - grad_lse (B, H, T) in the dtype of the computation."""
    dtype = compute_dtype(out_BTHD)
    delta = (grad_BTHD.to(dtype) * out_BTHD.to(dtype)).sum(-1).transpose(1, 2)
    return delta if grad_lse_BHT is None else delta - grad_lse_BHT


def _dense_backward(
    grad, q, k, v, lse, delta, *, causal, window, softcap, scale, alibi_slopes, bias, prefix_len, q_start, k_start, head_start, dropout_p, seed
):
    """Gradients of q, k, v (B, H | K, T | S, D | Dv) and the bias, or None, by their formula: scores are the only thing that autograd sees."""
    dtype = compute_dtype(q)
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    q_start = k_start + S - T if q_start is None else q_start
    q, k, v, grad = (x.to(dtype).transpose(1, 2) for x in (q, k, v, grad))
    k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    slopes = None if alibi_slopes is None else alibi_slopes.to(dtype)
    if prefix_len is not None:
        prefix_len = torch.as_tensor(prefix_len, device=q.device).expand(B)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=dtype)
    step = max(16, _SCORES // max(1, B * H * S))
    for first, last, low, high in _blocks(T, S, causal, window, prefix_len, q_start - k_start, step):
        rows, columns = slice(first, last), slice(low, high)
        at = (q_start + first, k_start + low)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q[:, :, rows], k[:, :, columns])]
            leaves += [] if bias is None else [_bias_part(bias, rows, columns).to(dtype).detach().requires_grad_()]
            scores = _scores(*leaves[:2], *(leaves[2:] or [None]), *at, causal, window, softcap, scale, slopes, prefix_len)
        seen = lse[:, :, rows, None].to(dtype)
        empty = seen == -math.inf
        p = torch.exp(scores.detach() - seen.masked_fill(empty, 0.0)).masked_fill(empty, 0.0)
        grad_p = _dropped(grad[:, :, rows] @ v[:, :, columns].mT, *at, head_start, dropout_p, seed)
        grad_s = p * (grad_p - delta[:, :, rows, None].to(dtype).masked_fill(empty, 0.0))
        of_q, of_k, *of_bias = torch.autograd.grad(scores, leaves, grad_s)
        grads[0][:, :, rows] += of_q
        grads[1][:, :, columns] += of_k
        grads[2][:, :, columns] += _dropped(p, *at, head_start, dropout_p, seed).mT @ grad[:, :, rows]
        for part in of_bias:
            _bias_part(grad_bias, rows, columns).add_(part)
    grad_k, grad_v = (x.unflatten(1, (K, H // K)).sum(2).transpose(1, 2) for x in grads[1:])
    return grads[0].transpose(1, 2), grad_k, grad_v, grad_bias


def flash_attention_backward_reference(
    grad_BTHD, q_BTHD, k_BSKD, v_BSKD, lse_BHT, delta_BHT, *, causal=True, window=None, softcap=None, scale=None, alibi_slopes=None, bias=None,
    prefix_len=None, cu_seqlens=None, lengths=None, cu_seqlens_k=None, q_start=None, k_start=0, head_start=0, dropout_p=0.0, seed=None,
):  # fmt: skip
    """Gradients of q, k, v and the bias, in the dtype of the computation; packed documents one after another."""
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    shape, bias = None if bias is None else bias.shape, None if bias is None else bias[(None,) * (4 - bias.dim())]
    common = dict(causal=causal, window=window, softcap=softcap, scale=scale, q_start=q_start, k_start=k_start, head_start=head_start,
                  dropout_p=dropout_p)  # fmt: skip
    if cu_seqlens is None:
        *grads, grad_bias = _dense_backward(grad_BTHD, q_BTHD, k_BSKD, v_BSKD, lse_BHT, delta_BHT, alibi_slopes=alibi_slopes, bias=bias,
                                            prefix_len=prefix_len, seed=seed, **common)  # fmt: skip
        return *grads, None if bias is None else grad_bias.view(shape)
    lengths_q, lengths_k = document_lengths(q_BTHD, k_BSKD, cu_seqlens, cu_seqlens_k, lengths, bias)
    cuts_q = zip(*(x.split(lengths_q, d) for x, d in ((grad_BTHD, 1), (q_BTHD, 1), (lse_BHT, 2), (delta_BHT, 2))), strict=True)
    cuts_k = zip(*(x.split(lengths_k, 1) for x in (k_BSKD, v_BSKD)), strict=True)
    parts, grad_bias = [], None if bias is None else torch.zeros_like(bias, dtype=compute_dtype(q_BTHD))

    def own(value, document, shared=0):
        return value[document : document + 1] if isinstance(value, torch.Tensor) and value.dim() > shared else value

    for document, ((grad, q, lse, delta), (k, v)) in enumerate(zip(cuts_q, cuts_k, strict=True)):
        rows, columns = slice(q.shape[1]), slice(k.shape[1])
        own_bias = None if bias is None else _bias_part(bias if len(bias) == 1 else own(bias, document), rows, columns)
        *grads, of_bias = _dense_backward(grad, q, k, v, lse, delta, alibi_slopes=own(alibi_slopes, document, 1), bias=own_bias,
                                          prefix_len=own(prefix_len, document), seed=own(seed, document), **common)  # fmt: skip
        parts.append(grads)
        if of_bias is not None:
            _bias_part(grad_bias if len(bias) == 1 else own(grad_bias, document), rows, columns).add_(of_bias)
    return *(torch.cat(x, 1) for x in zip(*parts, strict=True)), None if bias is None else grad_bias.view(shape)
