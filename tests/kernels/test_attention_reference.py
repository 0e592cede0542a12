"""flash_attention against a few lines of float64 written from its definition, over the product of its features."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nanotrain.kernels import attention_reference
from nanotrain.kernels.attention import EXAMPLES, attention_delta, flash_attention, flash_attention_backward
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


def plain(q, k, v, *, causal=True, lengths=None):
    """Attention inside documents of `lengths`, over whole matrices in the inputs' dtype with the softmax in fp32 at least."""
    (_, T, H, D), (S, K) = q.shape, k.shape[1:3]
    rows, columns = torch.arange(S - T, S)[:, None], torch.arange(S)
    visible = columns <= rows if causal else torch.ones(T, S, dtype=torch.bool)
    if lengths is not None:
        document = torch.repeat_interleave(torch.tensor(lengths))
        visible = visible & (document[:, None] == document)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(H // K, 2)) * D**-0.5
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~visible, -math.inf)
    return torch.einsum("bhts,bshd->bthd", torch.softmax(scores, -1).to(q.dtype), v.repeat_interleave(H // K, 2))


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
    size = attention_reference._SCORES
    try:
        attention_reference._SCORES = 1 if small_blocks else size
        out, lse = flash_attention(q, k, v, return_lse=True, **options)
    finally:
        attention_reference._SCORES = size
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
    exact = plain(*(x.detach().double() for x in (q, k, v)))
    error = (flash_attention(q, k, v).double() - exact).abs().max()
    assert error <= 2 * (plain(q, k, v).double() - exact).abs().max() + 1e-7


def offsets(lengths):
    """cu_seqlens of documents of these lengths."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def result_and_gradients(function, inputs, **options):
    """(out, gradients of q, k, v) under one non-uniform upstream, and whether the path that keeps its probabilities ran."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, **options)
    up = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    nodes, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        nodes.add(node.name())
        waiting += [parent for parent, _ in node.next_functions if parent is not None]
    return (out.detach(), *torch.autograd.grad(out, leaves, up)), "_CausalBackward" in nodes


LAYOUTS = [(5, None), (5, [1, 3, 1]), (129, None), (129, [1, 128]), (300, None), (300, [1, 129, 170])]
"""Rows of T tokens, short of and across the causal path's blocks of 128 queries; or packed documents that make them up."""


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T,lengths", LAYOUTS)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "fused"])
def test_plain_attention_and_its_gradients_equal_the_definition(T, lengths, causal, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(attention_reference, "_SCORES", 0)  # every row counts as long
    inputs = draw_inputs(1, T, T, 4, 2, 8)
    packed = {} if lengths is None else {"cu_seqlens": offsets(lengths)}
    got, took = result_and_gradients(flash_attention, inputs, causal=causal, **packed)
    want, _ = result_and_gradients(plain, inputs, causal=causal, lengths=lengths)
    assert took == kept
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)
    if T == 5 and lengths is None:  # that definition over matrices is the one of single scores
        torch.testing.assert_close(want[0], oracle(*inputs, causal=causal)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T,lengths", LAYOUTS)
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_gradients_err_within_twice_those_of_plain_attention_in_the_same_dtype(T, lengths, dtype, sharpness):
    q, k, v = draw_inputs(1, T, T, 16, 8, 64, dtype=dtype)  # heads enough that the shortest rows' errors are no matter of luck
    q = q * sharpness
    packed = {} if lengths is None else {"cu_seqlens": offsets(lengths)}
    (got, took), (same, _) = result_and_gradients(flash_attention, (q, k, v), **packed), result_and_gradients(plain, (q, k, v), lengths=lengths)
    exact, _ = result_and_gradients(plain, [x.double() for x in (q, k, v)], lengths=lengths)
    assert took
    for g, s, e in zip(got, same, exact, strict=True):
        assert (g.double() - e).norm() <= 2 * (s.double() - e).norm()


def test_scores_are_not_rounded():
    """Equal large scores beyond fp16, and bf16 scores of about 20: an error of their own rounding would be 0.08 in the exponent."""
    x = torch.full((1, 8, 1, 64), 40.0, dtype=torch.float16)
    torch.testing.assert_close(flash_attention(x, x, x), x)
    q, k, v = draw_inputs(1, 128, 128, 4, 4, 64, dtype=torch.bfloat16)
    q = q * 8
    exact = plain(q.double(), k.double(), v.double())
    assert (flash_attention(q, k, v).double() - exact).norm() < 2**-8 * exact.norm()


@pytest.mark.parametrize("shape", [(), (20,), (1, 1, 1, 1), (1, 1, 1, 20), (1, 1, 20, 1), (2, 1, 20, 20), (4, 20, 20), (2, 4, 1, 20)])
@pytest.mark.parametrize("window", [None, 2])
def test_a_bias_is_broadcast_in_every_block(shape, window, monkeypatch):
    monkeypatch.setattr(attention_reference, "_SCORES", 1)  # blocks of 16 queries
    q, k, v = draw_inputs(2, 20, 20, 4, 2, 8)
    bias = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    results = []
    for tensor in (bias, bias.expand(2, 4, 20, 20).contiguous()):
        out = flash_attention(q, k, v, bias=tensor, window=window)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(4, 2, 5, 5), (1, 2, 6, 7), (4, 1, 1, 1), (4, 1, 5, 1), (2, 5, 5), (1, 5)])
def test_a_bias_is_picked_for_each_packed_document(shape):
    lengths = [3, 1, 5, 3]
    q, k, v = draw_inputs(1, 12, 12, 2, 2, 8)
    bias = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    packed = flash_attention(q, k, v, bias=bias, cu_seqlens=offsets(lengths))
    alone = []
    for n, (length, *inputs) in enumerate(zip(lengths, *(x.split(lengths, 1) for x in (q, k, v)), strict=True)):
        own = torch.broadcast_to(bias, (4, 2, max(5, *shape[-2:-1]), max(5, shape[-1])))[n : n + 1, :, :length, :length]
        alone.append(flash_attention(*inputs, bias=own))
    torch.testing.assert_close(packed, torch.cat(alone, 1))


@pytest.mark.parametrize("features", [{}, {"window": 3}, {"softcap": 1.5}, {"dropout_p": 0.4}])
def test_packed_documents_equal_each_alone(features):
    lengths = [3, 1, 5, 3, 4]
    q, k, v = draw_inputs(1, sum(lengths), sum(lengths), 4, 2, 8)
    cu_seqlens = offsets(lengths)
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

    bias = torch.zeros(1, 1, 1, 3000, requires_grad=True)
    with Watch():
        flash_attention(q, k, v, softcap=5.0, bias=bias).sum().backward()
    assert largest <= attention_reference._SCORES < 3000 * 3000


def test_lengths_that_the_host_knows_change_nothing():
    q, k, v = draw_inputs(1, 9, 9, 2, 1, 4)
    offsets = torch.tensor([0, 2, 2, 9])
    assert torch.equal(flash_attention(q, k, v, cu_seqlens=offsets, lengths=(2, 0, 7)), flash_attention(q, k, v, cu_seqlens=offsets))


@settings(max_examples=30, deadline=None)
@given(
    features=st.fixed_dictionaries({}, optional=dict(
        window=st.integers(1, 5), softcap=st.just(2.0), prefix_len=st.integers(0, 7), k_start=st.integers(0, 5), q_start=st.integers(0, 9),
        head_start=st.just(3), alibi_slopes=st.just(torch.linspace(0.1, 0.5, 4, dtype=torch.float64)),
    )),
    sinks=st.booleans(), bias=st.sampled_from([None, (4, 6, 7), (2, 1, 1, 7), (1, 4, 6, 1)]), dropout=st.sampled_from([0.0, 0.3]),
    packed=st.booleans(), small_blocks=st.booleans(),
)  # fmt: skip
def test_the_explicit_backward_equals_autograd(features, sinks, bias, dropout, packed, small_blocks):
    lengths, keys = ([6, 1, 0, 5], [7, 2, 3, 5]) if packed else ([6], [7])
    q, k, v = draw_inputs(1 if packed else 2, sum(lengths), sum(keys), 4, 2, 5, 3)
    options = features | dict(dropout_p=dropout, seed=7 if dropout else None)
    if packed:
        options |= dict(cu_seqlens=offsets(lengths), cu_seqlens_k=offsets(keys))
    leaves = [q, k, v]
    if bias is not None:
        bias = (1, *bias[1:]) if packed and len(bias) == 4 else bias
        options["bias"] = torch.randn(bias, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        leaves.append(options["bias"])
    joined = dict(sinks=torch.linspace(-1, 1, 4, dtype=torch.float64)) if sinks else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_reference, "_SCORES", 1 if small_blocks else attention_reference._SCORES)
        out, lse = flash_attention(q, k, v, return_lse=True, **options, **joined)
        up, up_lse = (torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for x in (out, lse))
        up_lse = up_lse.masked_fill(lse == -math.inf, 0.0)
        want = torch.autograd.grad((out, torch.where(lse == -math.inf, 0.0, lse)), leaves, (up, up_lse), allow_unused=True)
        with torch.no_grad():
            got = flash_attention_backward(up, q, k, v, lse, attention_delta(up, out, up_lse), **options)
    for g, w in zip(got, want, strict=False):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w)
    assert (got[3] is None) == (bias is None)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(window=0), "window=0"),
        (dict(causal=False, window=3), "causal=True"),
        (dict(dropout_p=0.5), "needs a seed"),
        (dict(dropout_p=1.0, seed=1), "dropout_p=1.0"),
        (dict(cu_seqlens_k=torch.tensor([0, 1])), "cu_seqlens_k without"),
        (dict(impl="fast"), "impl='fast'"),
        (dict(softcap=0.0), "softcap=0.0"),
        (dict(sinks=torch.zeros(2)), r"sinks \(2,\) must be \(1,\)"),
        (dict(alibi_slopes=torch.zeros(2, 1)), r"alibi_slopes \(2, 1\) must be \(1,\) or \(1, 1\)"),
        (dict(prefix_len=torch.tensor([1, 2])), "prefix_len"),
        (dict(dropout_p=0.5, seed=torch.tensor([1, 2])), "seed"),
        (dict(bias=torch.zeros(2, 1, 1, 1)), r"bias .* does not broadcast to \(1, 1, 3, 3\)"),
        (dict(bias=torch.zeros(2)), "bias .* does not broadcast"),
        (dict(cu_seqlens=torch.tensor([0, 1])), r"cu_seqlens must rise from 0 to the 3 tokens held, got \[0, 1\]"),
        (dict(cu_seqlens=torch.tensor([0, 4, 3])), "cu_seqlens must rise"),
        (dict(cu_seqlens=torch.tensor([0, 3]), cu_seqlens_k=torch.tensor([0, 1])), "cu_seqlens_k must rise"),
        (dict(cu_seqlens=torch.tensor([0, 1, 3]), lengths=(1, 1)), "2 lengths of 2 tokens do not fit cu_seqlens of 2 documents, 3 tokens"),
        (dict(cu_seqlens=torch.tensor([0, 1, 3]), lengths=(3,)), "1 lengths of 3 tokens do not fit"),
        (dict(cu_seqlens=torch.tensor([0, 3]), cu_seqlens_k=torch.tensor([0, 1, 3])), "cu_seqlens_k .* as many as in cu_seqlens"),
        (dict(cu_seqlens=torch.tensor([0.0, 3.0])), "torch.float32 must be .* in int32 or int64"),
        (dict(cu_seqlens=torch.zeros(0, dtype=torch.int32)), "must be \\(documents"),
        (dict(cu_seqlens=torch.tensor([0, 1, 3]), bias=torch.zeros(3, 1, 1, 1)), "bias .* does not broadcast"),
        (dict(cu_seqlens=torch.tensor([0, 3]), bias=torch.zeros(2, 3)), "bias .* does not reach the longest document, 3 x 3"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q, k, v = draw_inputs(1, 3, 3, 1, 1, 4)
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
    with pytest.raises(ValueError, match="floating point"):
        flash_attention(q.long(), k.long(), v.long())
    with pytest.raises(ValueError, match="B must be 1"):
        flash_attention(q, k, v, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(RuntimeError, match="no Triton kernel"):
        flash_attention(q, k, v, impl="triton")  # float64
