"""flash_attention's kernels against the reference, over features together, forward and every gradient."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nanotrain.kernels import attention_backward, attention_configs, attention_forward, attention_order
from nanotrain.kernels.attention import EXAMPLES, _features, attention_delta, flash_attention, flash_attention_backward
from nanotrain.kernels.attention_order import order_of
from nanotrain.kernels.runtime import launches
from triton.runtime import interpreter

from tests.kernels.kit import DEVICE, DTYPES, LAYOUTS, agree, check, drawn, dtypes, far, layouts, on_gpu, place, poisoned, repeatable, seeds

KERNELS = dict.fromkeys((f"_attention_{name}_kernel" for name in ("forward", "delta", "keys_backward", "queries_backward")), 1)
LONG = 3 if DEVICE.type == "cuda" else 1
"""A GPU's tiles are larger: lengths are multiplied by this, so that documents have several of them there too."""


def attend(impl, **options):
    """q, k, v and what else gets gradients -> out and the log-sum-exp, 0 where no key is seen."""

    def call(q, k, v, **leaves):
        out, lse = flash_attention(q, k, v, return_lse=True, impl=impl, **leaves, **options)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    return call


class Usual(torch.autograd.Function):
    """The reference with the roundings of every flash attention, and of no kernel: its backward has no more than the log-sum-exp in fp32 and
    outputs in the inputs' dtype."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, bias, options):
        out, lse = flash_attention(q, k, v, sinks=sinks, bias=bias, return_lse=True, impl="reference", **options)
        ctx.save_for_backward(q, k, v, sinks, bias, out, lse)
        ctx.options = options
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        q, k, v, sinks, bias, out, lse = ctx.saved_tensors
        delta = attention_delta(grad, out, grad_lse, impl="reference")
        *grads, grad_bias = flash_attention_backward(grad, q, k, v, lse, delta, bias=bias, impl="reference", **ctx.options)
        grad_sinks = None
        if sinks is not None:
            grad_sinks = -(torch.exp(sinks[:, None] - lse) * delta).sum((0, 2)).to(sinks.dtype)
        return *grads, grad_sinks, grad_bias, None


def usual(q, k, v, sinks=None, bias=None, *, options):
    out, lse = Usual.apply(q, k, v, sinks, bias, options)
    return out, lse.masked_fill(lse == -torch.inf, 0.0)


def normal(shape, seed, dtype=torch.float32):
    """Normal numbers. Were some rows larger than others, which way a few log-sum-exps are rounded would decide over the whole error."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def run(shape, dtype, layout="contiguous", *, sinks=False, bias=None, draw=0, size=1.0, kernels=KERNELS, **options):
    """Check a call of shape (B, T, S, H, K, D, Dv) with these options; queries are `size` times normal numbers."""
    B, T, S, H, K, D, W = shape
    tensors = {name: normal(s, draw + i, dtype) for i, (name, s) in enumerate((("q", (B, T, H, D)), ("k", (B, S, K, D)), ("v", (B, S, K, W))))}
    tensors["q"] *= size
    if sinks:
        tensors["sinks"] = normal((H,), draw + 3, dtype)
    if bias is not None:
        tensors["bias"] = normal(bias, draw + 4, dtype)
        kernels = kernels | {"_attention_bias_backward_kernel": 1}
    elif not options.get("deterministic", True) and not options.get("dropout_p"):
        kernels = {name: times for name, times in kernels.items() if name != "_attention_queries_backward_kernel"}
    if "cu_seqlens" in options:  # blocks of documents are put in order for each kernel that owns rows of them
        kernels = kernels | {"_attention_order_kernel": len(kernels.keys() - {"_attention_delta_kernel", "_attention_bias_backward_kernel"})}
    placed = {name: place(t, layout if t.dim() > 1 else "contiguous") for name, t in tensors.items()}
    plain = {name: value for name, value in options.items() if name != "deterministic"}
    check(attend("triton", **options), attend("reference", **plain), placed, kernels, layout=layout, usual=partial(usual, options=plain))


FEATURES = {
    "full": dict(causal=False),
    "window": dict(window=13 * LONG),
    "softcap": dict(softcap=3.0),
    "scale": dict(scale=-0.3),
    "slopes": dict(slopes="H"),
    "slopes of each": dict(batch=2, slopes="BH"),
    "bias": dict(bias="HTS"),
    "bias of rows": dict(batch=2, bias="BT1"),
    "prefix": dict(batch=2, prefix=True),
    "offsets": dict(offsets=True),
    "dropout": dict(batch=2, dropout_p=0.3),
    "documents": dict(documents=True, length=37),
    "sinks": dict(sinks=True, key_heads=12, length=10),  # heads enough that their errors are no matter of luck
    "shorter": dict(shorter=True, length=37),
    "groups": dict(group=3, key_heads=1),
    "wide": dict(widths=(80, 48)),
    "atomics": dict(deterministic=False),
}
"""What can be switched on."""

APART = [{"full", "window"}, {"full", "prefix"}, {"slopes", "slopes of each"}, {"bias", "bias of rows"}]


def groups() -> list[tuple[str, ...]]:
    """Features in threes, such that any two of them that can meet do so in one."""
    order = list(FEATURES)
    left = [pair for pair in combinations(order, 2) if set(pair) not in APART]
    found = []
    while left:
        a, b = left[0]
        fit = [x for x in order if x not in (a, b) and {a, x} not in APART and {b, x} not in APART]
        c = max(fit, key=lambda x: sum(set(pair) <= {a, b, x} for pair in left))
        found.append(tuple(sorted((a, b, c), key=order.index)))
        left = [pair for pair in left if not set(pair) <= {a, b, c}]
    return found


GROUPS = groups()


def features(
    dtype, layout="contiguous", *, draw=0, batch=1, group=1, widths=(16, 16), length=33, shorter=False, documents=False, slopes=None, bias=None,
    prefix=False, offsets=False, dropout_p=0.0, sinks=False, key_heads=2, size=1.0, **options,
):  # fmt: skip
    """Check a call with features by their names here, on a batch, or on five documents, one of no token and one of one."""
    T, S, H = length * LONG, (length + 13) * LONG, key_heads * group
    n = batch
    if documents:
        lengths_q, lengths_k = [5, 0, 1, T, 7], [S - 13 * LONG, 5, 2, S, 0]
        n, T, S = 5, sum(lengths_q), sum(lengths_k)
        cut = {"cu_seqlens": lengths_q} | ({} if shorter else {"cu_seqlens_k": lengths_k})
        for name, lengths in cut.items():
            options[name] = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
        S = T if shorter else S
        t, s = max(lengths_q), max(lengths_q if shorter else lengths_k)
    else:
        S = length * LONG - 17 if shorter else S  # the first queries see no key
        t, s = T, S
    if offsets:
        options |= dict(k_start=5, q_start=5 + s - t + 3, head_start=7)
    if slopes:
        options["alibi_slopes"] = torch.linspace(0.02, 0.3, n * H, device=DEVICE).view(n, H)[slice(None) if slopes == "BH" else 0]
    if prefix:
        options["prefix_len"] = torch.tensor([25, 9, 0, 11, 3][:n], device=DEVICE) * LONG
    if dropout_p:
        options |= dict(dropout_p=dropout_p, seed=torch.arange(n, device=DEVICE) * 2**33 + draw)
    shape = {None: None, "HTS": (1, H, t, s), "BT1": (n, 1, t, 1)}[bias]
    run((1 if documents else batch, T, S, H, key_heads, *widths), dtype, layout, sinks=sinks, bias=shape, draw=draw, size=size, **options)


@pytest.mark.parametrize("number", range(len(GROUPS)), ids=map("-".join, GROUPS))
def test_features_together(number):
    chosen = {}
    for name in GROUPS[number]:
        chosen |= FEATURES[name]
    features(DTYPES[number % len(DTYPES)], LAYOUTS[number // 2 % len(LAYOUTS)], draw=number, **chosen)


@given(data=st.data(), dtype=dtypes, layout=layouts, draw=seeds)
@drawn(25)
def test_shapes_and_features_at_random(data, dtype, layout, draw):
    """Any features together, odd shapes: rows of one token, more queries than keys, head dims of any width, no key for some queries, scores flat
    or sharp."""
    chosen = data.draw(st.sets(st.sampled_from(sorted(FEATURES)), min_size=2, max_size=5))
    options = {}
    for name in sorted(chosen):
        options |= FEATURES[name]
    if "sinks" in chosen and DEVICE.type == "cpu":  # so many heads take the interpreter long
        options["key_heads"] = 6 // options.get("group", 1)
    if options.get("causal") is False:
        options = {name: value for name, value in options.items() if name not in ("window", "prefix")}
    options |= dict(widths=data.draw(st.tuples(*[st.sampled_from((16, 24, 33, 80, 96))] * 2)), length=data.draw(st.integers(22, 40)))
    options["size"] = data.draw(st.sampled_from((1.0, 6.0)))
    features(dtype, layout, draw=draw, **options)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 16, 16), (2, 1, 40, 2, 1, 16, 16), (1, 40, 1, 2, 2, 16, 16), *((*s, s[-1]) for s in EXAMPLES)])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_one_token_and_examples(shape, causal):
    run(shape, DTYPES[sum(shape) % len(DTYPES)], causal=causal)


@pytest.mark.parametrize("D,W", [(128, 128), (192, 128), (256, 256), (160, 96), (16, 8), (33, 24)])
def test_head_dims(D, W):
    run((1, 33 * LONG, 33 * LONG, 2, 1, D, W), DTYPES[D % 3 % len(DTYPES)], LAYOUTS[(D + W) % len(LAYOUTS)])


@pytest.mark.parametrize("bias", [(58,), (2, 1, 1), (2, 1, 1, 58)])
def test_biases_of_one_row(bias):
    """All queries share it; it may have fewer dimensions than four."""
    run((2, 37, 58, 2, 1, 16, 16), DTYPES[len(bias) % 2], LAYOUTS[sum(bias) % len(LAYOUTS)], bias=bias)


def test_programs_take_turns(monkeypatch):
    """Keys and values of two heads of three may be in the cache at one time, then those of the last."""
    monkeypatch.setattr(attention_order, "_TOGETHER", 2 * 4 * 40 * LONG * (16 + 16))
    run((1, 40 * LONG, 40 * LONG, 3, 3, 16, 16), torch.float32)


def _reads(seen, block, other):
    """How many columns each block of rows reads, of a document's (rows, columns): those of tiles that any row sees, up to the last seen."""
    read = []
    for rows in seen.split(block) if len(seen) else ():
        columns = rows.any(0)
        last = int(columns.nonzero().max()) + 1 if columns.any() else 0
        read.append(sum(len(tile) for tile in columns[:last].split(other) if tile.any()))
    return read


@pytest.mark.parametrize("keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(causal=False), dict(window=9), dict(prefix_len=7), dict(window=6, prefix_len=9), dict(apart=True), dict(apart=True, q_start=0)],
    ids=str,
)
def test_blocks_that_read_the_most_come_first(options, keys):
    """Of all documents, some of no token; where cut apart, they have more keys than queries."""
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(30, (40,), generator=generator)
    t = t // 8 * 8 if "q_start" in options else t  # the last keys are seen by no query, nor by the tile of one that is
    s = torch.randint(60, (40,), generator=generator) if options.get("apart") else t
    options = {name: value for name, value in options.items() if name != "apart"}
    cut = [torch.cat([n.new_zeros(1), n.cumsum(0)]).int().to(DEVICE) for n in (t, s)]
    q, k = (torch.empty(1, int(n.sum()), 1, 16, device=DEVICE) for n in (t, s))
    block, other = (4, 8) if keys else (8, 4)
    blocks, order = order_of((q.shape[1], k.shape[1]), block, other, _features(q, k, cu_seqlens=cut[0], cu_seqlens_k=cut[1], **options), keys=keys)
    reads = {}
    for document, (rows, columns) in enumerate(zip(t.tolist(), s.tolist(), strict=True)):
        i, j = torch.arange(rows)[:, None] + options.get("q_start", columns - rows), torch.arange(columns)
        seen = j <= i + (0 if options.get("causal", True) else 1000)
        if "window" in options:
            seen &= j > i - options["window"]
        seen |= j < options.get("prefix_len", 0)
        reads |= {(document, at): n for at, n in enumerate(_reads(seen.T if keys else seen, block, other))}
    found = [tuple(pair) for pair in order.tolist()]
    assert len(found) == len(set(found)) == blocks and reads.keys() <= set(found)
    assert [reads.get(pair, 0) for pair in found] == sorted((reads.get(pair, 0) for pair in found), reverse=True)


def test_the_order_of_hundreds_of_documents():
    """More blocks than are compared at a time."""
    lengths = torch.arange(300) % 13
    cut = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(DEVICE)
    q = torch.empty(1, int(lengths.sum()), 1, 16, device=DEVICE)
    _blocks, order = order_of((q.shape[1],) * 2, 8, 8, _features(q, q, cu_seqlens=cut))
    pairs = [(d, b) for d, n in enumerate(lengths.tolist()) for b in range(-(-n // 8))]
    pairs.sort(key=lambda pair: -min(8 * pair[1] + 8, int(lengths[pair[0]])))  # stable
    assert [tuple(pair) for pair in order[: len(pairs)].tolist()] == pairs


@pytest.fixture
def products(monkeypatch):
    """Counts, by the program that makes them, in whatever the interpreter runs."""
    found = Counter()
    real = interpreter.InterpreterBuilder.create_dot

    def counted(builder, *arguments):
        found[builder.grid_idx[0]] += 1
        return real(builder, *arguments)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    return found


@pytest.mark.skipif(DEVICE.type == "cuda", reason="gpu: only the interpreter counts products")
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_make_no_more_products_than_each_alone(causal, products):
    """So that places for blocks that a document does not have do nothing."""

    def made(length, **options):
        products.clear()
        leaves = [normal((1, length, 2, 16), i).requires_grad_() for i in range(3)]
        out = flash_attention(*leaves, causal=causal, impl="triton", **options)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        return products.total()

    lengths = torch.tensor([64, 40, 64, 1, 70])
    packed = made(int(lengths.sum()), cu_seqlens=torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32))
    assert packed == sum(map(made, lengths.tolist()))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="gpu: only the interpreter counts products")
@pytest.mark.parametrize("lengths", [None, [30, 0, 90, 1, 29]], ids=["batch", "documents"])
def test_programs_that_make_the_most_products_come_first(lengths, products):
    """In the forward, and in each kernel of the backward."""
    cut = {} if lengths is None else {"cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)}
    q, k, v = (normal((1 if cut else 2, 150, 2, 16), i) for i in range(3))

    def made():
        counts = [products[program] for program in range(max(products) + 1)]
        products.clear()
        return counts

    flash_attention(q, k, v, impl="triton", **cut)
    found = [made()]
    for wanted in (q, k):
        wanted.requires_grad_()
        out = flash_attention(q, k, v, impl="triton", **cut)
        products.clear()
        torch.autograd.grad(out, wanted, torch.ones_like(out))
        wanted.requires_grad_(False)
        found.append(made())
    assert all(counts == sorted(counts, reverse=True) and counts[0] > counts[-1] > 0 for counts in found)


def test_a_query_that_sees_no_key_gives_zeros_and_zero_gradients():
    q, k, v = (normal(s, i).requires_grad_() for i, s in enumerate(((1, 50, 2, 16), (1, 20, 2, 16), (1, 20, 2, 16))))
    with poisoned():
        out, lse = flash_attention(q, k, v, return_lse=True, impl="triton")
        grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.full_like(lse, torch.nan).masked_fill(lse.isfinite(), 1.0)))
    assert (out[:, :30] == 0).all() and (lse[..., :30] == -torch.inf).all() and lse[..., 30:].isfinite().all()
    assert (grads[0][:, :30] == 0).all() and all(g.isfinite().all() for g in grads)


@pytest.mark.filterwarnings("ignore:overflow")  # of exponents, to minus infinity
@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_bias_may_hide_keys(lowest):
    """As that of a batch padded at its left does; of the first keys so many that whole tiles are hidden."""
    leaves = [normal((1, 70 * LONG, 2, 16), i).requires_grad_() for i in range(3)]
    bias = torch.zeros(70 * LONG, device=DEVICE)
    bias[: 40 * LONG] = lowest
    results = []
    for impl in ("triton", "reference"):
        out = flash_attention(*leaves, bias=bias, causal=False, impl=impl)
        results.append((out, *torch.autograd.grad(out, leaves, normal(out.shape, 3))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # of what is not stored
def test_keys_beyond_the_last_add_nothing_to_gradients_by_atomics():
    """Were their scores 0 in place of none, the probability of one would be exp(-lse), which overflows here: all scores are far below 0."""
    q, k, v = (normal((1, 40, 2, 16), i) for i in range(3))
    leaves = [x.half().requires_grad_() for x in (8 * q.abs(), -k.abs(), v)]
    results = []
    for deterministic in (True, False):
        out = flash_attention(*leaves, causal=False, deterministic=deterministic, impl="triton")
        results.append(torch.autograd.grad(out, leaves, normal(out.shape, 3).half()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("window", [36, 37, 2**31 - 1, 2**40])
def test_windows_that_hide_one_key_or_none(window):
    run((1, 37, 37, 2, 1, 16, 16), torch.float32, window=window)


def test_documents_cut_by_every_other_number():
    cut = torch.tensor([0, 9, 7, 9, 7, 9, 40, 9], dtype=torch.int64, device=DEVICE)[::2]
    run((1, 40, 40, 2, 2, 16, 16), torch.float32, cu_seqlens=cut)


@pytest.mark.parametrize("T,S", [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(T, S):
    q, k, v = (normal(s, i).requires_grad_() for i, s in enumerate(((2, T, 2, 16), (2, S, 2, 16), (2, S, 2, 16))))
    out, lse = flash_attention(q, k, v, return_lse=True, impl="triton")
    assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))


def test_only_what_is_asked_for_is_computed():
    q, k, v = (normal((1, 40, 2, 16), i) for i in range(3))
    for wanted, kernels in ((q, {"_attention_queries_backward_kernel"}), (k, {"_attention_keys_backward_kernel"})):
        wanted.requires_grad_()
        out = flash_attention(q, k, v, impl="triton")
        before = Counter(launches)
        torch.autograd.grad(out, wanted, torch.ones_like(out))
        assert set(launches - before) == kernels | {"_attention_delta_kernel"}
        wanted.requires_grad_(False)


def test_the_bits_of_gradients_repeat():
    T = 300 if DEVICE.type == "cuda" else 20  # in the interpreter programs run in turn, and repeat by themselves
    q, k, v = (normal((2, T, 2, 16), i, torch.float16).requires_grad_() for i in range(3))
    bias = normal((1, 2, T, T), 3, torch.float16).requires_grad_()

    def gradients():
        out = flash_attention(q, k, v, bias=bias, dropout_p=0.2, seed=3, impl="triton")
        return torch.autograd.grad(out, (q, k, v, bias), torch.ones_like(out))

    repeatable(gradients, 1)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("width", [16, 20], ids=["descriptors", "addresses"])
def test_rows_further_apart_than_32_bits_reach(name, width):
    tensors = {n: normal((3, 2, 2, width), i, torch.float16) for i, n in enumerate("qkv")}
    tensors[name] = far(tensors[name])
    moved = {n: t.transpose(0, 1) for n, t in tensors.items()}  # rows of the sequence lie far apart
    check(attend("triton"), attend("reference"), moved, KERNELS, usual=partial(usual, options={}))


@pytest.mark.parametrize("deterministic", [True, False])
def test_ring_blocks_add_up(deterministic):
    """Keys in two halves, each with its own offset: outputs merge by log-sum-exp, gradients of each from the whole's add up."""
    q, k, v, up = (normal((1, 40, 2, 16), i) for i in range(4))
    whole, lse = flash_attention(q, k, v, return_lse=True, impl="triton")
    halves = [(k[:, s : s + 20], v[:, s : s + 20], dict(q_start=0, k_start=s)) for s in (0, 20)]
    parts = [flash_attention(q, *kv, return_lse=True, impl="triton", **o) for *kv, o in halves]
    merged = torch.logsumexp(torch.stack([part for _, part in parts]), 0)
    torch.testing.assert_close(merged, lse)
    torch.testing.assert_close(sum(out * torch.exp(part - merged).transpose(1, 2)[..., None] for out, part in parts), whole)
    delta = attention_delta(up, whole, impl="triton")
    given = dict(impl="triton", dtype=torch.float32, deterministic=deterministic)
    rounds = [flash_attention_backward(up, q, *kv, merged, delta, **given, **o) for *kv, o in halves]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(flash_attention(*leaves, impl="reference"), leaves, up)
    got = (sum(r[0] for r in rounds), *(torch.cat([r[i] for r in rounds], 1) for i in (1, 2)))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [None, (2, 40, 40)])
def test_backward_takes_any_layouts_and_gives_any_dtype(bias):
    q, k, v, up = (normal((1, 40, heads, 16), i, torch.float16) for i, heads in enumerate((2, 1, 1, 2)))
    bias = None if bias is None else normal(bias, 4, torch.float16)
    out, lse = flash_attention(q, k, v, bias=bias, return_lse=True, impl="reference")
    delta = attention_delta(up, out, impl="reference")
    inputs = place(up, "rows"), q, k, v, place(lse, "transposed"), place(delta, "sliced")
    got, want = (flash_attention_backward(*inputs, bias=bias, dtype=torch.float32, impl=impl) for impl in ("triton", "reference"))
    for g, w in zip(got, want, strict=True):
        assert g is w is None or torch.testing.assert_close(g, w, rtol=5e-3, atol=5e-3) is None


def test_both_ways_of_reading_are_taken():
    """Whole rows by descriptors and specialized warps, all else by addresses, as the third kernel always: the tests above have both."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        real = attention_configs.config
        for module in (attention_forward, attention_backward):
            patch.setattr(module, "config", lambda *a: found.append(real(*a)) or found[-1])
        for width, layout in ((16, "contiguous"), (20, "contiguous"), (16, "sliced")):
            q, k, v = (place(normal((1, 40, 2, width), i), layout).requires_grad_() for i in range(3))
            flash_attention(q, k, v, impl="triton").backward(normal(q.shape, 3))
    if DEVICE.type == "cpu" or torch.cuda.get_device_capability() == (9, 0):
        assert [c.specialized for c in found] == [True, True] + [False] * 7


@on_gpu
@pytest.mark.parametrize("D", [64, 128])
def test_long_rows(D):
    """128k tokens, against torch's own."""
    q, k, v = (normal((1, 1 << 17, h, D), i, torch.bfloat16).requires_grad_() for i, h in enumerate((4, 1, 1)))
    out = flash_attention(q, k, v)
    up = normal(out.shape, 4, torch.bfloat16)
    wide = [x.detach().repeat_interleave(4 // x.shape[2], 2).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
    grads = torch.autograd.grad(out, (q, k, v), up)
    wants = torch.autograd.grad(want, wide, up.transpose(1, 2))
    pairs = [(out, want.transpose(1, 2)), *((g, w.transpose(1, 2).unflatten(2, (g.shape[2], -1)).sum(3)) for g, w in zip(grads, wants, strict=True))]
    for got, exact in pairs:
        assert (got.double() - exact.double()).norm() <= 1e-2 * exact.double().norm()
    repeatable(lambda: torch.autograd.grad(flash_attention(q, k, v), (q, k, v), up), 1)


@on_gpu
def test_more_elements_than_32_bits_count():
    """The last rows of queries, results and gradients lie beyond 2^31 elements."""
    T, H, last = (1 << 17) + 64, 129, 200
    q, k, v = (torch.randn(1, T, h, 128, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for h in (H, 1, 1))
    assert q.numel() > 1 << 31
    out = flash_attention(q, k, v, window=100)
    (grad,) = torch.autograd.grad(out, q, q.detach())

    def tail(dtype):
        q_, k_, v_ = (x.detach()[:, -n:].to(dtype).requires_grad_() for x, n in ((q[:, :, -2:], last), (k, last + 99), (v, last + 99)))
        want = flash_attention(q_, k_, v_, window=100, impl="reference")
        return want.detach(), *torch.autograd.grad(want, q_, q_.detach())

    for got, exact, same in zip((out, grad), tail(torch.float64), tail(torch.bfloat16), strict=True):
        agree(got[:, -last:, -2:], exact, same, "the last rows")


@on_gpu
def test_flex_attention_agrees():
    """An implementation by others, with a soft cap and a window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (normal((2, 700, 4, 64), i, torch.bfloat16) for i in range(3))
    mask = create_block_mask(lambda b, h, i, j: (j <= i) & (j > i - 100), None, None, 700, 700)
    flex = torch.compile(flex_attention)
    want = flex(*(x.transpose(1, 2) for x in (q, k, v)), score_mod=lambda s, b, h, i, j: 20 * torch.tanh(s / 20), block_mask=mask)
    got = flash_attention(q, k, v, window=100, softcap=20.0)
    exact = flash_attention(*(x.double() for x in (q, k, v)), window=100, softcap=20.0)
    agree(got, exact, want.transpose(1, 2), "out")
