"""Scaled dot-product attention, computed a tile at a time: outputs, and the log-sum-exp on request.

    s_ij = scale * q_i . k_j            then softcap: c * tanh(s / c)
    s_ij += bias_ij - slope * |p_i - p_j|      p_i = q_start + i, p_j = k_start + j (global positions)
    out_i = sum_j visible softmax_j(s_ij) v_j          sinks add exp(sink_h) to the denominator only

Visible: every key, or with `causal` those with p_j <= p_i, or with `window` = w also p_j > p_i - w; keys with p_j < prefix_len are
always visible. A query that sees no key gives zeros, log-sum-exp -inf (its sink, where there is one) and zero gradients.

Shapes: q (B, T, H, D), k (B, S, K, D), v (B, S, K, Dv), H a multiple of K; out (B, T, H, Dv); log-sum-exp (B, H, T) in fp32.
Scores, softmax and their gradients in fp32 (float64 for float64); probabilities and scores' gradients are rounded to the inputs' dtype before they
multiply v, k and q, in products that accumulate in fp32. The backward keeps the log-sum-exp alone and computes the scores again; its bits repeat
unless the caller has no need of that. The reference (attention_reference.py) rounds less where a call is more than plain causal or full
self-attention.
FLOPs forward: 2 * B * H * T * S * (D + Dv), half of it when causal; backward 3.5 times that, 2.5 times where its bits need not repeat. Bytes: q, k,
v and out once, as long as the keys and values of the heads under way stay in the L2 cache.
Sources: Vaswani et al. 2017; Dao et al. 2022 (arXiv 2205.14135), 2023 (arXiv 2307.08691); ALiBi: arXiv 2108.12409; sinks: arXiv 2309.17453.
"""

from __future__ import annotations

import torch
from nanotrain.kernels.attention_backward import backward, delta_of
from nanotrain.kernels.attention_forward import forward
from nanotrain.kernels.attention_reference import (
    attention_delta_reference,
    document_lengths,
    flash_attention_backward_reference,
    flash_attention_reference,
)
from nanotrain.kernels.attention_tiles import Features
from nanotrain.kernels.runtime import choose, has_kernel, tl
from torch.autograd.function import once_differentiable

EXAMPLES = ((2, 7, 7, 4, 2, 16), (1, 33, 33, 6, 6, 80), (1, 5, 12, 4, 1, 32))
"""Shapes (B, T, S, H, K, D) that tests and benchmarks share."""

_WIDEST = 256
"""Head dims that the kernels hold in registers."""


def _features(
    q, k, *, causal=True, window=None, softcap=None, scale=None, sinks=None, alibi_slopes=None, bias=None, prefix_len=None,
    cu_seqlens=None, cu_seqlens_k=None, q_start=None, k_start=0, head_start=0, dropout_p=0.0, seed=None,
) -> Features:  # fmt: skip
    """The options of a call as its kernels take them."""

    def vector(value):  # one number for all documents or one for each, and the stride between them
        value = value.to(torch.int64) if isinstance(value, torch.Tensor) else torch.full((), value, dtype=torch.int64, device=q.device)
        return (value.contiguous(), 1) if value.dim() else (value, 0)

    if window is not None:
        last = (k.shape[1] if q_start is None else q_start - k_start + q.shape[1]) - 1  # the key where the last query stands
        window = window if window <= last else None  # which hides nothing
    slopes = None if alibi_slopes is None else alibi_slopes.detach().float().contiguous()
    prefix, prefix_stride = (None, 0) if prefix_len is None else vector(prefix_len)
    seeds, seeds_stride = vector(seed) if dropout_p else (None, 0)
    bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    return Features(
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale), softcap=None if softcap is None else float(softcap), window=window,
        sinks=None if sinks is None else sinks.detach().float().contiguous(),
        slopes=slopes, slopes_stride=slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        bias=bias, bias_strides=() if bias is None else tuple(0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True)),
        prefix=prefix, prefix_stride=prefix_stride, seeds=seeds, seeds_stride=seeds_stride,
        threshold=int(dropout_p * 2**32), kept=1.0 / (1.0 - dropout_p),
        cu_q=None if cu_seqlens is None else cu_seqlens.contiguous(), cu_k=None if cu_k is None else cu_k.contiguous(),
        q_start=q_start, k_start=k_start, head_start=head_start, causal=tl.constexpr(bool(causal)), aligned=tl.constexpr(k_start % 4 == 0),
    )  # fmt: skip


class _FlashAttention(torch.autograd.Function):
    """Forward and backward of the kernels; `longest` is the most queries and keys of a document, as far as the host knows."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, bias, f, longest, deterministic):
        out, lse = forward(q, k, v, f, longest)
        held = [name for name, value in f._asdict().items() if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(q, k, v, out, lse, *(getattr(f, name) for name in held))
        ctx.f, ctx.held, ctx.longest = f._replace(**dict.fromkeys(held)), held, longest
        ctx.deterministic = deterministic
        ctx.bias_shape, ctx.sinks_dtype = None if bias is None else bias.shape, None if sinks is None else sinks.dtype
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        f = ctx.f._replace(**dict(zip(ctx.held, tensors, strict=True)))
        need_q, need_k, need_v, need_sinks, need_bias = ctx.needs_input_grad[:5]
        grad = torch.zeros_like(out) if grad is None else grad
        delta = delta_of(grad, out, grad_lse)
        bias_shape = f.bias.shape if need_bias else None
        grad_q, grad_k, grad_v, grad_bias = backward(
            grad, q, k, v, lse, delta, f, ctx.longest, ctx.deterministic, queries=need_q, keys=need_k or need_v, bias_shape=bias_shape
        )  # fmt: skip
        grad_sinks = None
        if need_sinks:  # exp(sink - lse) is the share of each softmax that the sink takes
            share = torch.exp(f.sinks[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
            grad_sinks = -(share * delta).sum((0, 2)).to(ctx.sinks_dtype)
        return grad_q, grad_k, grad_v, grad_sinks, None if grad_bias is None else grad_bias.view(ctx.bias_shape), None, None, None


def _check(
    op, q, k, v, *, causal=True, window=None, softcap=None, scale=None, sinks=None, alibi_slopes=None, bias=None, prefix_len=None, cu_seqlens=None,
    lengths=None, cu_seqlens_k=None, q_start=None, k_start=0, head_start=0, dropout_p=0.0, seed=None,
):  # fmt: skip
    """Raise ValueError naming what makes no sense."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"{op}: q, k, v must have 4 dimensions, got {q.dim()}, {k.dim()}, {v.dim()}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{op}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"{op}: {q.shape[2]} query heads are no multiple of {k.shape[2]} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{op}: dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if not q.is_floating_point():
        raise ValueError(f"{op}: q, k, v must be floating point, got {q.dtype}")
    if not causal and (window is not None or prefix_len is not None):
        raise ValueError(f"{op}: window and prefix_len need causal=True")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window={window}; a query sees at least itself, use window >= 1")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{op}: softcap={softcap} must be positive; None is no cap")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p={dropout_p} is not in [0, 1)")
    if dropout_p and seed is None:
        raise ValueError(f"{op}: dropout_p > 0 needs a seed")
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"{op}: cu_seqlens packs documents along T, so B must be 1, not {q.shape[0]}")
    if cu_seqlens is None and cu_seqlens_k is not None:
        raise ValueError(f"{op}: cu_seqlens_k without cu_seqlens")
    for name, cut in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if cut is not None and (cut.dim() != 1 or cut.dtype not in (torch.int32, torch.int64) or len(cut) != len(cu_seqlens) or not len(cut)):
            raise ValueError(f"{op}: {name} {tuple(cut.shape)} {cut.dtype} must be (documents + 1,) in int32 or int64, as many as in cu_seqlens")
    if cu_seqlens is not None and cu_seqlens_k is None and q.shape[1] != k.shape[1]:
        raise ValueError(f"{op}: cu_seqlens cuts {q.shape[1]} queries and {k.shape[1]} keys alike; give cu_seqlens_k where they differ")
    (B, T, H, _), S = q.shape, k.shape[1]
    B = B if cu_seqlens is None else len(cu_seqlens) - 1
    for name, value, shapes in (("sinks", sinks, [(H,)]), ("alibi_slopes", alibi_slopes, [(H,), (B, H)]), ("prefix_len", prefix_len, [(), (B,)]),
                                ("seed", seed, [(), (B,)])):  # fmt: skip
        if isinstance(value, torch.Tensor) and tuple(value.shape) not in shapes:
            raise ValueError(f"{op}: {name} {tuple(value.shape)} must be {' or '.join(map(str, shapes))}")
    # Inside documents T and S are each one's own, known where cu_seqlens is read.
    limits = (S, T, H, B) if cu_seqlens is None else (None, None, H, B)
    if bias is not None and (bias.dim() > 4 or any(n not in (1, limit or n) for n, limit in zip(bias.shape[::-1], limits, strict=False))):
        raise ValueError(f"{op}: bias {tuple(bias.shape)} does not broadcast to {(B, H, T, S)}")


def _longest(q, k, cu_seqlens, cu_seqlens_k, lengths, bias) -> tuple[int, int]:
    """The most queries and keys of a batch entry or document, as far as the host knows without waiting for a device; checks what it knows."""
    if cu_seqlens is None or (lengths is None and q.device.type != "cpu"):
        return q.shape[1], k.shape[1]
    return tuple(max(known, default=0) for known in document_lengths(q, k, cu_seqlens, cu_seqlens_k, lengths, bias))


def _has_kernel(q, v, alibi_slopes) -> bool:
    """Whether the kernels serve: they know no gradient of slopes."""
    return has_kernel(q) and max(q.shape[3], v.shape[3]) <= _WIDEST and not (
        alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled()
    )


def flash_attention(
    q_BTHD, k_BSKD, v_BSKD, *, causal=True, window=None, softcap=None, scale=None, sinks=None, alibi_slopes=None, bias=None, prefix_len=None,
    cu_seqlens=None, lengths=None, cu_seqlens_k=None, q_start=None, k_start=0, head_start=0, dropout_p=0.0, seed=None, return_lse=False,
    deterministic=True, impl="auto",
):  # fmt: skip
    """Attention of q (B, T, H, D) over k (B, S, K, D) and v (B, S, K, Dv); returns out (B, T, H, Dv) in q's dtype.

    causal        aligned bottom-right unless q_start says otherwise: key k_start + j is visible to query q_start + i when it is not later
    window        w: a query sees its w last keys, itself among them (needs causal)
    softcap       c: scores become c * tanh(score / c)
    scale         of the scores, default D ** -0.5
    sinks         (H,) logits that join each softmax's denominator; differentiable
    alibi_slopes  (H,) or (B, H); the score of a pair falls by slope * distance
    bias          broadcastable to (B, H, T, S), added to the scores; differentiable; with cu_seqlens to (documents, H, t, s) where t and s
                  are at least the longest document's: each document takes the first rows and columns of its own;
                  -inf hides a key
    prefix_len    int or (B,): the first keys are visible to every query (prefix LM; needs causal)
    cu_seqlens    (documents + 1,) int32 offsets of packed documents along T; B is 1; documents never see each other; `cu_seqlens_k` where
                  keys are cut elsewhere; B-shaped arguments then have one entry per document
    lengths       of those documents, where the host knows them: then the reference does not wait for the device to read cu_seqlens. On a GPU
                  the numbers in cu_seqlens are not checked: what does not rise from 0 to T reads beyond q, k, v and bias, or leaves rows of
                  the result unwritten
    q_start, k_start, head_start   global index of the first query (None: k_start + S - T), key and head held here
    dropout_p, seed   dropout of probabilities [0, 1); drawn from (seed, head, query, key), so it never depends on the layout;
                  seed: int, or int64 (B,), one per document with cu_seqlens
    return_lse    also return the log-sum-exp (B, H, T) in fp32 (float64 for float64), differentiable
    deterministic  False lets kernels add to q's gradient by atomics: 5 products of tiles in place of 7, but its last bits differ from call to call

    Raises ValueError naming the argument for shapes, dtypes or combinations that make no sense.
    """
    options = dict(causal=causal, window=window, softcap=softcap, scale=scale, alibi_slopes=alibi_slopes, bias=bias, prefix_len=prefix_len,
                   cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, q_start=q_start, k_start=k_start, head_start=head_start,
                   dropout_p=dropout_p, seed=seed)  # fmt: skip
    _check("flash_attention", q_BTHD, k_BSKD, v_BSKD, sinks=sinks, lengths=lengths, **options)
    serves = _has_kernel(q_BTHD, v_BSKD, alibi_slopes)
    tensors = [x for x in (q_BTHD, k_BSKD, v_BSKD, sinks, *options.values()) if isinstance(x, torch.Tensor)]
    if choose("flash_attention", impl, *tensors, triton=serves, native=True) == "triton":
        longest = _longest(q_BTHD, k_BSKD, cu_seqlens, cu_seqlens_k, lengths, bias)
        f = _features(q_BTHD, k_BSKD, sinks=sinks, **options)
        out, lse = _FlashAttention.apply(q_BTHD, k_BSKD, v_BSKD, sinks, bias, f, longest, deterministic)
        return (out, lse) if return_lse else out
    return flash_attention_reference(q_BTHD, k_BSKD, v_BSKD, sinks=sinks, lengths=lengths, return_lse=return_lse, impl=impl, **options)


def attention_delta(grad_BTHD, out_BTHD, grad_lse_BHT=None, *, impl="auto"):
    """What `flash_attention_backward` asks for beside the log-sum-exp: grad . out of each query and head, less the gradient of its log-sum-exp.

    grad and out (B, T, H, Dv); returns (B, H, T) in fp32 (float64 for float64). Where keys are spread over devices, out is what they all made.
    """
    if grad_BTHD.shape != out_BTHD.shape or grad_BTHD.dim() != 4:
        raise ValueError(f"attention_delta: grad {tuple(grad_BTHD.shape)} and out {tuple(out_BTHD.shape)} must be (B, T, H, Dv) alike")
    if grad_lse_BHT is not None and grad_lse_BHT.shape != (out_BTHD.shape[0], out_BTHD.shape[2], out_BTHD.shape[1]):
        raise ValueError(f"attention_delta: grad_lse {tuple(grad_lse_BHT.shape)} must be (B, H, T) of out {tuple(out_BTHD.shape)}")
    tensors = [x for x in (grad_BTHD, out_BTHD, grad_lse_BHT) if x is not None]
    if choose("attention_delta", impl, *tensors, triton=has_kernel(*tensors)) == "triton":
        return delta_of(grad_BTHD, out_BTHD, grad_lse_BHT)
    return attention_delta_reference(grad_BTHD, out_BTHD, grad_lse_BHT)


def flash_attention_backward(
    grad_BTHD, q_BTHD, k_BSKD, v_BSKD, lse_BHT, delta_BHT, *, bias=None, lengths=None, dtype=None, deterministic=True, impl="auto", **options
):
    """(grad_q, grad_k, grad_v, grad_bias or None) of attention to these keys, from a log-sum-exp and a delta over more keys than these.

    For ring attention: keys and values go round, every rank calls this with those it holds and adds up the results. grad (B, T, H, Dv) is the
    gradient of out; lse (B, H, T) the log-sum-exp over all keys; delta (B, H, T) that of `attention_delta`. `options` are those of
    `flash_attention`, sinks apart, whose gradient is -(exp(sink - lse) * delta) summed over queries. Results are in `dtype`, or the dtype of
    what each is the gradient of. Raises as `flash_attention` does.
    """
    _check("flash_attention_backward", q_BTHD, k_BSKD, v_BSKD, bias=bias, lengths=lengths, **options)
    shape = (q_BTHD.shape[0], q_BTHD.shape[2], q_BTHD.shape[1])
    for name, value, wanted in (("grad", grad_BTHD, (*q_BTHD.shape[:3], v_BSKD.shape[3])), ("lse", lse_BHT, shape), ("delta", delta_BHT, shape)):
        if value.shape != wanted:
            raise ValueError(f"flash_attention_backward: {name} {tuple(value.shape)} must be {wanted}")
    if options.get("sinks") is not None:
        raise ValueError("flash_attention_backward: sinks are part of lse already")
    inputs = (grad_BTHD, q_BTHD, k_BSKD, v_BSKD, lse_BHT, delta_BHT)
    tensors = [x for x in (*inputs, bias, *options.values()) if isinstance(x, torch.Tensor)]
    serves = _has_kernel(q_BTHD, v_BSKD, None) and has_kernel(grad_BTHD)
    if choose("flash_attention_backward", impl, *tensors, triton=serves) == "triton":
        longest = _longest(q_BTHD, k_BSKD, options.get("cu_seqlens"), options.get("cu_seqlens_k"), lengths, bias)
        f = _features(q_BTHD, k_BSKD, bias=bias, **options)
        lse_BHT, delta_BHT = (x.float().contiguous() for x in (lse_BHT, delta_BHT))
        *grads, grad_bias = backward(
            grad_BTHD.to(v_BSKD.dtype), q_BTHD, k_BSKD, v_BSKD, lse_BHT, delta_BHT, f, longest, deterministic,
            bias_shape=None if bias is None else f.bias.shape, dtype=dtype,
        )  # fmt: skip
        return *grads, None if bias is None else grad_bias.view(bias.shape)
    *grads, grad_bias = flash_attention_backward_reference(*inputs, bias=bias, lengths=lengths, **options)
    of = (q_BTHD, k_BSKD, v_BSKD)
    return *(g.to(dtype or x.dtype) for g, x in zip(grads, of, strict=True)), None if bias is None else grad_bias.to(dtype or bias.dtype)


def cost(shape, dtype, *, causal=True, window=None, lengths=None) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one forward for shape (B, T, S, H, K, D), or with Dv at the end: each tensor once, masked pairs not counted.

    `lengths` are those of documents that T = S tokens of one batch entry hold.
    """
    B, T, S, H, K, D, W = (*shape, shape[5])[:7]

    def seen(n):  # keys of all queries of a causal square of n
        return max(0, n) * (n + 1) // 2

    def pairs(t, s):
        if not causal:
            return t * s
        hidden = 0 if window is None else seen(s - window) - seen(s - t - window)
        return seen(s) - seen(s - t) - hidden

    total = B * pairs(T, S) if lengths is None else sum(pairs(n, n) for n in lengths)
    return B * (T * H + S * K) * (D + W) * dtype.itemsize, 2 * H * total * (D + W)
