"""flash_attention against a few lines of float64 written from its definition, over the product of its features."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nanotrain.kernels import attention
from nanotrain.kernels.attention import EXAMPLES, flash_attention
from nanotrain.kernels.random import philox


def oracle(
    q,
    k,
    v,
    *,
    causal=True,
    window=None,
    softcap=None,
    scale=None,
    sinks=None,
    alibi_slopes=None,
    bias=None,
    prefix_len=None,
    q_start=None,
    k_start=0,
    head_start=0,
    dropout_p=0.0,
    seed=None,
):
    """One score at a time, in Python: slow and plain."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    q_start = k_start + S - T if q_start is None else q_start
    scale = D**-0.5 if scale is None else scale
    out, lse = torch.zeros(B, T, H, v.shape[-1], dtype=q.dtype), torch.full((B, H, T), -math.inf, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                scores, values = [], []
                for j in range(S):
                    row, column = q_start + i, k_start + j
                    seen = not causal or (column <= row and (window is None or column > row - window))
                    if prefix_len is not None and column < prefix_len[b]:
                        seen = True
                    if not seen:
                        continue
                    s = scale * (q[b, i, h] * k[b, j, h // (H // K)]).sum()
                    s = s if softcap is None else softcap * torch.tanh(s / softcap)
                    s = s if bias is None else s + bias.expand(B, H, T, S)[b, h, i, j]
                    s = s if alibi_slopes is None else s - alibi_slopes[h] * abs(row - column)
                    keep = 1.0
                    if dropout_p:
                        words = philox(seed, torch.tensor(column >> 2), row, head_start + h, 1)
                        keep = float(words[column & 3] >= int(dropout_p * 2**32)) / (1 - dropout_p)
                    scores.append(s)
                    values.append(keep * v[b, j, h // (H // K)])
                denominator = scores + ([] if sinks is None else [sinks[h]])
                if not denominator:
                    continue
                lse[b, h, i] = torch.logsumexp(torch.stack(denominator), 0)
                if scores:
                    out[b, i, h] = (torch.exp(torch.stack(scores) - lse[b, h, i])[:, None] * torch.stack(values)).sum(0)
    return out, lse


def draw_inputs(B, T, S, H, K, D, Dv=None, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((B, T, H, D), (B, S, K, D), (B, S, K, Dv or D)))
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6), st.sampled_from([(1, 1), (2, 1), (4, 2)]), st.sampled_from([2, 5])),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 5),
    softcap=st.none() | st.just(2.0),
    sinks=st.booleans(),
    alibi=st.booleans(),
    bias=st.booleans(),
    prefix=st.booleans(),
    v_width=st.sampled_from([None, 3]),
    offset=st.none() | st.integers(-3, 4),
    dropout=st.sampled_from([0.0, 0.3]),
    small_blocks=st.booleans(),
)
def test_every_feature_and_gradient_equals_the_definition(
    shape, causal, window, softcap, sinks, alibi, bias, prefix, v_width, offset, dropout, small_blocks
):
    B, T, S, (H, K), D = shape
    q, k, v = draw_inputs(B, T, S, H, K, D, v_width)
    options = dict(causal=causal, softcap=softcap, dropout_p=dropout, seed=7 if dropout else None, head_start=3, k_start=5)
    if offset is not None:
        options["q_start"] = 5 + offset
    if causal and window is not None:
        options["window"] = window
    if causal and prefix:
        options["prefix_len"] = torch.tensor([6, 7][:B])
    leaves = [q, k, v]
    if sinks:
        options["sinks"] = torch.linspace(-1, 1, H, dtype=torch.float64).requires_grad_()
        leaves.append(options["sinks"])
    if alibi:
        options["alibi_slopes"] = torch.linspace(0.1, 0.5, H, dtype=torch.float64)
    if bias:
        options["bias"] = torch.randn(1, H, T, S, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        leaves.append(options["bias"])
    expected, expected_lse = oracle(q, k, v, **options)
    size = attention._SCORES
    try:
        attention._SCORES = 1 if small_blocks else size
        out, lse = flash_attention(q, k, v, return_lse=True, **options)
    finally:
        attention._SCORES = size
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(flash_attention(q, k, v, **options), expected, rtol=1e-10, atol=1e-10)
    up = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    up_lse = torch.randn(lse.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    finite = torch.isfinite(expected_lse)

    def total(o, e):
        return (o * up).sum() + torch.where(finite, e, 0.0).mul(up_lse).sum()

    if not total(expected, expected_lse).requires_grad:  # no query sees any key
        return
    want = torch.autograd.grad(total(expected, expected_lse), leaves, allow_unused=True)
    got = torch.autograd.grad(total(out, lse), leaves, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        w = torch.zeros_like(g) if w is None else w
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("B,T,S,H,K,D", EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_within_twice_that_of_plain_attention_in_the_same_dtype(B, T, S, H, K, D, dtype):
    q, k, v = draw_inputs(B, T, S, H, K, D, dtype=dtype)
    wide = [x.detach().double() for x in (q, k, v)]
    exact = flash_attention(*wide)
    rows, columns = torch.arange(S - T, S)[:, None], torch.arange(S)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(H // K, 2)) * D**-0.5
    weights = torch.softmax(scores.float().masked_fill(columns > rows, -math.inf), -1).to(dtype)
    plain = torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(H // K, 2))
    error = (flash_attention(q, k, v).double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + 1e-7


@pytest.mark.parametrize("features", [{}, {"window": 3}, {"softcap": 1.5}, {"dropout_p": 0.4}])
def test_packed_documents_equal_each_alone(features):
    lengths = [3, 1, 5, 3, 4]
    q, k, v = draw_inputs(1, sum(lengths), sum(lengths), 4, 2, 8)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    seeds = torch.arange(10, 10 + len(lengths)) if "dropout_p" in features else None
    packed, lse = flash_attention(q, k, v, cu_seqlens=cu_seqlens, seed=seeds, return_lse=True, **features)
    outs, lses, first = [], [], 0
    for n, length in enumerate(lengths):
        part = slice(first, first + length)
        out, e = flash_attention(q[:, part], k[:, part], v[:, part], seed=None if seeds is None else int(seeds[n]), return_lse=True, **features)
        outs.append(out)
        lses.append(e)
        first += length
    torch.testing.assert_close(packed, torch.cat(outs, 1))
    torch.testing.assert_close(lse, torch.cat(lses, -1))


def test_ring_blocks_merge_by_log_sum_exp():
    q, k, v = draw_inputs(1, 8, 8, 2, 2, 4)
    whole = flash_attention(q, k, v)
    parts = [flash_attention(q, k[:, s : s + 4], v[:, s : s + 4], q_start=0, k_start=s, return_lse=True) for s in (0, 4)]
    lse = torch.logsumexp(torch.stack([e for _, e in parts]), 0)
    merged = sum(o * torch.exp(e - lse).transpose(1, 2)[..., None] for o, e in parts)
    torch.testing.assert_close(merged, whole)
    (merged.square().sum()).backward()
    assert torch.isfinite(q.grad).all()


def test_a_query_that_sees_no_key_gives_zeros_and_zero_gradients():
    q, k, v = draw_inputs(1, 4, 2, 1, 1, 4)
    out, lse = flash_attention(q, k, v, q_start=-2, return_lse=True)
    assert (out[:, :2] == 0).all() and (lse[..., :2] == -math.inf).all()
    out.sum().backward()
    assert (q.grad[:, :2] == 0).all() and torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all()


def test_long_inputs_never_hold_all_scores():
    q, k, v = draw_inputs(1, 3000, 3000, 1, 1, 4, dtype=torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for r in result if isinstance(result, (tuple, list)) else [result]:
                largest = max(largest, r.numel()) if isinstance(r, torch.Tensor) else largest
            return result

    with Watch():
        flash_attention(q, k, v, softcap=5.0).sum().backward()
    assert largest <= attention._SCORES < 3000 * 3000


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(window=0), "window=0"),
        (dict(causal=False, window=3), "causal=True"),
        (dict(dropout_p=0.5), "needs a seed"),
        (dict(dropout_p=1.0, seed=1), "dropout_p=1.0"),
        (dict(cu_seqlens_k=torch.tensor([0, 1])), "cu_seqlens_k without"),
        (dict(impl="fast"), "impl='fast'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q, k, v = draw_inputs(1, 2, 2, 1, 1, 4)
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, v, **change)


def test_bad_shapes_are_named():
    q, k, v = draw_inputs(2, 3, 3, 4, 2, 4)
    with pytest.raises(ValueError, match="do not fit"):
        flash_attention(q, k[:, :2], v)
    with pytest.raises(ValueError, match="no multiple"):
        flash_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="dtypes differ"):
        flash_attention(q.float(), k, v)
    with pytest.raises(ValueError, match="B must be 1"):
        flash_attention(q, k, v, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(RuntimeError, match="no Triton kernel"):
        flash_attention(q, k, v, impl="triton")
