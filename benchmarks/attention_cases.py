"""The cases of attention: flash_attention over lengths, head dims and features, and decode_attention over caches."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial
from unittest import mock

import torch
import torch.nn.functional as F
from nanotrain.kernels import attention, attention_configs, decode

from benchmarks.cases import Case, eager, normal

# Attention: (B, T, S, H, K, D), or with Dv at the end. As FlashAttention's own benchmark does, 16k tokens whatever their length, of 2048 channels
# whatever the head's; 32k tokens where one row is as long.


def _shapes(*lengths: int, widths=(128, 64, 256)) -> tuple[tuple[int, ...], ...]:
    return tuple((max(1, 16384 // T), T, T, 2048 // D, 2048 // D, D) for T in lengths for D in widths)


@cache
def _documents(tokens: int) -> tuple[int, ...]:
    """Lengths of 16 packed documents, uneven as those of a text are: cuts at random."""
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))[:15].sort().values + 1
    return tuple(torch.tensor([0, *cuts, tokens]).diff().tolist())


def _inputs(shape, dtype, device, *, packed=False, sinks=False, slopes=False, bias=False):
    B, T, S, H, K, D, W = (*shape, shape[5])[:7]
    make = partial(normal, dtype=dtype, device=device, grad=True)
    inputs = {"q": make(B, T, H, D), "k": make(B, S, K, D), "v": make(B, S, K, W)}
    if packed:
        ends = torch.tensor(_documents(T)).cumsum(0)
        inputs |= {"cu_seqlens": F.pad(ends, (1, 0)).to(device, torch.int32), "lengths": _documents(T)}
    return inputs | ({"sinks": make(H)} if sinks else {}) | ({"bias": make(H, T, S)} if bias else {}) | (
        {"alibi_slopes": 2.0 ** (-8 / H * torch.arange(1, H + 1, device=device))} if slopes else {}
    )  # fmt: skip


def _attend(inputs, impl, **options):
    # Asked for the log-sum-exp too, the reference in float64, which no fused operator serves, holds the scores of a few queries at a time.
    exact = impl == "reference" and inputs["q"].dtype == torch.float64
    given = {name: value for name, value in inputs.items() if name not in ("q", "k", "v")}
    out = attention.flash_attention(inputs["q"], inputs["k"], inputs["v"], **given, **options, return_lse=exact, impl=impl)
    return out[0] if exact else out


def _cost(shape, dtype, *, packed=False, bias=False, prefix=0, **options):
    B, T, S, H, *_ = shape
    nbytes, flops = attention.cost(shape, dtype, lengths=_documents(T) if packed else None, **options)
    if prefix:  # of which each query before it sees the rest too
        widths = (*shape, shape[5])[5:7]
        flops += 2 * B * H * prefix * (prefix - 1) // 2 * sum(widths)
    return nbytes + bias * H * T * S * dtype.itemsize, flops


def _backward_cost(shape, dtype, *, bias=False, **options):
    """FLOPs as everyone counts them, 2.5 times the forward's, for the 5 products of a backward that computes nothing twice: ours makes 7, which
    is 3.5 times, or those 5 by atomics. Bytes: q, k, v, out and its gradient in, three gradients out, and the log-sum-exp; of the bias it and its
    gradient."""
    B, T, S, H, K, D, W = (*shape, shape[5])[:7]
    elements = 2 * B * (T * H * (D + W) + S * K * (D + W)) + 2 * bias * H * T * S
    return elements * dtype.itemsize + 4 * B * H * T, 5 * _cost(shape, dtype, bias=bias, **options)[1] // 2


_FlashAttention = attention._FlashAttention


class _Pipelined(_FlashAttention):
    """Ours by the configurations that specialize no warps, in its backward too, which autograd calls when it likes."""

    @staticmethod
    def forward(ctx, *arguments):
        with mock.patch.dict(attention_configs._SPECIALIZED, clear=True):
            return _FlashAttention.forward(ctx, *arguments)

    @staticmethod
    def backward(ctx, *grads):
        with mock.patch.dict(attention_configs._SPECIALIZED, clear=True):
            return _FlashAttention.backward(ctx, *grads)


def _pipelined(inputs, **options):
    with mock.patch.object(attention, "_FlashAttention", _Pipelined):
        return _attend(inputs, "triton", **options)


def _heads_first(inputs):
    return [inputs[name].transpose(1, 2) for name in ("q", "k", "v")]


def _sdpa(backend=None, *, causal=True, scale=None):
    """torch's operator, by one of its backends or by the one it chooses."""

    def load():
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attend(inputs):
            q, k, v = _heads_first(inputs)
            options = dict(attn_mask=inputs.get("bias"), is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            with sdpa_kernel(SDPBackend[backend]) if backend else nullcontext():
                return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

        return attend

    return load


def _flex(*, causal=True, window=None, softcap=None, prefix_len=0):
    """FlexAttention, whose mask says which blocks of keys are read; made once for a workload."""

    def load():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch.compiler.reset()  # each workload is compiled, and the limit of recompilations would soon be reached
        flex = torch.compile(flex_attention, dynamic=False)

        @cache
        def mask_of(T, S, device, lengths):
            document = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device)) if lengths else None

            def seen(b, h, i, j):
                visible = (j <= i) | (j < prefix_len)
                if window is not None:
                    visible = visible & (j > i - window)
                return visible if document is None else visible & (document[i] == document[j])

            return create_block_mask(seen, None, None, T, S, device=device)

        def capped(score, b, h, i, j):
            return softcap * torch.tanh(score / softcap)

        def attend(inputs):
            q, k, v = _heads_first(inputs)
            mask = mask_of(q.shape[2], k.shape[2], q.device, inputs.get("lengths")) if causal else None
            score = None if softcap is None else capped
            return flex(q, k, v, score_mod=score, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

        return attend

    return load


def _flash_attn(number, *, causal=True, window=None, softcap=None):
    """FlashAttention 2 or 3, as its own packages have it."""

    def load():
        if number == 2:
            from flash_attn import flash_attn_func, flash_attn_varlen_func
        else:
            from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
        options = dict(causal=causal, window_size=(-1, -1) if window is None else (window - 1, 0), softcap=softcap or 0.0)

        def attend(inputs):
            q, k, v = (inputs[name] for name in ("q", "k", "v"))
            if "cu_seqlens" not in inputs:
                out = flash_attn_func(q, k, v, **options)
            else:
                cut, longest = inputs["cu_seqlens"], max(inputs["lengths"])
                out = flash_attn_varlen_func(q[0], k[0], v[0], cut, cut, longest, longest, **options)
            out = out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp too
            return out.view(*q.shape[:3], -1)

        return attend

    return load


def _varlen():
    from torch.nn.attention.varlen import varlen_attn

    def attend(inputs):
        cut, longest = inputs["cu_seqlens"], max(inputs["lengths"])
        q, k, v = (inputs[name][0] for name in ("q", "k", "v"))
        return varlen_attn(q, k, v, cut, cut, longest, longest, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1])[None]

    return attend


def _peers(*, packed=False, **options):
    """Who can do the same. Of torch's own operator, which knows no option but causal, also the two backends that are fastest."""
    found = {"pipelined": eager(partial(_pipelined, **options))}
    if not packed and not options.keys() - {"causal"}:
        found |= {"torch": _sdpa(**options), "flash": _sdpa("FLASH_ATTENTION", **options), "cudnn": _sdpa("CUDNN_ATTENTION", **options)}
    found["flex"] = _flex(**options)
    if "prefix_len" not in options:
        found |= {"fa2": _flash_attn(2, **options), "fa3": _flash_attn(3, **options)}
    return found | ({"varlen": _varlen} if packed else {})


def _product(kernel, dtype, target):
    if kernel in ("_attention_delta_kernel", "_attention_order_kernel"):
        return "-"
    if target == "gfx942":
        return "mfma"
    return "-" if dtype == torch.float32 else {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}[target]


# AMD's are scalar registers, of which the many strides and limits need more than there are. NVIDIA's are what one Triton or the other leaves a
# thread short of 64 or 128 registers, in fp32 and in the gradient of a bias; on Hopper there are none.
_STACK = {
    ("_attention_forward_kernel", "gfx942"): 204,
    ("_attention_queries_backward_kernel", "gfx942"): 180,
    ("_attention_keys_backward_kernel", "gfx942"): 140,
    ("_attention_bias_backward_kernel", "gfx942"): 52,
    ("_attention_forward_kernel", "sm_80"): 16,
    ("_attention_bias_backward_kernel", "sm_80"): 16,
    ("_attention_bias_backward_kernel", "sm_100"): 88,
}


def _case(variant, shapes, *, packed=False, bias=False, inputs=(), peers=None, dtypes=(torch.bfloat16,), always=1, **options):
    make = partial(_inputs, packed=packed, bias=bias, **dict.fromkeys(inputs, True))
    counted = dict(packed=packed, bias=bias, prefix=options.get("prefix_len", 0)) | {n: x for n, x in options.items() if n in ("causal", "window")}
    return Case(
        "flash_attention", "attention", shapes, make, partial(_attend, **options), partial(_cost, **counted), partial(_backward_cost, **counted),
        variant, always, dtypes, _peers(packed=packed, **options) if peers is None else peers, _product, _STACK, slow=True,
    )  # fmt: skip


_BOTH = (torch.bfloat16, torch.float32)

_WIDTHS = ((8, 2048, 2048, 24, 24, 80), (4, 4096, 4096, 16, 16, 192, 128), (8, 2048, 2048, 16, 16, 96), (4, 4096, 4096, 16, 16, 192))

_ATTENTION = (
    _case("", _shapes(2048, 512, 8192), dtypes=_BOTH),
    _case("long", _shapes(32768), always=0),
    _case(
        "atomics", _shapes(2048, widths=(128, 64)), dtypes=_BOTH, peers={"deterministic": eager(partial(_attend, impl="triton"))},
        deterministic=False,
    ),
    _case("full", _shapes(2048, widths=(64, 128, 256)), causal=False, always=0),
    _case("window", _shapes(8192, 32768), window=1024),
    _case("packed", tuple((1, 16384, 16384, 2048 // D, 512 // D, D) for D in (128, 64, 256)), packed=True),
    _case("grouped", ((2, 8192, 8192, 32, 8, 128),), always=0),
    _case("prefix", ((8, 2048, 2048, 8, 1, 256),), prefix_len=512, always=0),
    _case("soft cap", ((2, 8192, 8192, 8, 4, 256),), softcap=50.0, always=0),
    _case("soft cap, sinks, slopes", _shapes(2048, widths=(64,)), softcap=50.0, inputs=("sinks", "slopes"), peers={}, dtypes=(torch.float16,)),
    _case("bias", _shapes(2048, widths=(64, 128)), bias=True, causal=False, scale=1.0, peers={"torch": _sdpa(causal=False, scale=1.0)}, always=0),
    _case("dropout", ((8, 2048, 2048, 16, 16, 128),), dropout_p=0.1, seed=1234, peers={}, always=0),
    _case("bias, dropout", _shapes(512, widths=(64,)), bias=True, causal=False, dropout_p=0.1, seed=1234, peers={}, dtypes=_BOTH),
    _case("other widths", _WIDTHS),
)  # fmt: skip


# Decoding: (B, T, S, H, K, D), T new tokens of rows that hold S. Llama-3 8B for few and for many rows, heads of 64, of 80 and of 256 channels.

_DECODE_SHAPES = (
    (4, 1, 16384, 32, 8, 128), (128, 1, 2048, 32, 8, 128), (16, 1, 8192, 16, 16, 64), (16, 1, 8192, 32, 32, 80), (8, 1, 8192, 16, 4, 256),
)  # fmt: skip

_PAGE = 64


def _decode_inputs(shape, dtype, device, *, paged=False):
    B, T, S, H, K, D = shape
    make, pages = partial(normal, dtype=dtype, device=device), S // _PAGE
    held = {name: make(*((B * pages, _PAGE) if paged else (B, S)), K, D) for name in ("k_cache", "v_cache")}
    order = torch.randperm(B * pages, generator=torch.Generator().manual_seed(0))
    table = {"page_table": order.view(B, pages).to(device, torch.int32)} if paged else {}
    return {"q": make(B, T, H, D), "lengths": torch.full((B,), S, device=device, dtype=torch.int32)} | held | table


def _decode(inputs, impl, **options):
    i = inputs
    return decode.decode_attention(i["q"], i["k_cache"], i["v_cache"], i["lengths"], page_table=i.get("page_table"), impl=impl, **options)


def _decode_cost(shape, dtype, *, window):
    """Keys that no query sees are not read."""
    B, T, S, *rest = shape
    return decode.cost((B, T, min(S, window + T - 1), *rest), dtype)


def _torch_decode(inputs):
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k_cache", "v_cache"))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _flash_decode(number, *, window=None, softcap=0.0):
    """FlashAttention's own."""

    def load():
        if number == 2:
            from flash_attn import flash_attn_with_kvcache
        else:
            from flash_attn_interface import flash_attn_with_kvcache
        options = dict(causal=True, window_size=(-1, -1) if window is None else (window - 1, 0), softcap=softcap)

        def attend(inputs):
            q, k, v = (inputs[name] for name in ("q", "k_cache", "v_cache"))
            return flash_attn_with_kvcache(q, k, v, cache_seqlens=inputs["lengths"], **options)

        return attend

    return load


def _decode_product(kernel, dtype, target, *, many=False):
    """A tile's 16 or 32 queries are too few for Hopper's and Blackwell's own instructions, of which one takes 64; fp32 has none but AMD's."""
    if kernel == "_decode_merge_kernel":
        return "-"
    if target == "gfx942":
        return "mfma"
    return "-" if dtype == torch.float32 else {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(target, "mma") if many else "mma"


_DECODE_STACK = {("_decode_kernel", "gfx942"): 40, ("_decode_kernel", "sm_80"): 16}
_DECODE_MASKS_STACK = {("_decode_kernel", "gfx942"): 136}

_WINDOWED = dict(window=4096, softcap=50.0)

_DECODE = (
    Case(
        "decode_attention", "decode", _DECODE_SHAPES, _decode_inputs, _decode, decode.cost, product=_decode_product, stack=_DECODE_STACK,
        peers={"torch": eager(_torch_decode), "fa2": _flash_decode(2), "fa3": _flash_decode(3)},
    ),
    Case(
        "decode_attention", "decode", _DECODE_SHAPES, partial(_decode_inputs, paged=True), _decode, decode.cost, variant="pages",
        dtypes=(torch.bfloat16,), product=_decode_product, stack=_DECODE_STACK,
    ),
    Case(
        "decode_attention", "decode", ((16, 9, 8192, 32, 8, 128),), partial(_decode_inputs, paged=True), _decode, decode.cost,
        variant="nine tokens", dtypes=(torch.bfloat16,), product=partial(_decode_product, many=True), stack=_DECODE_MASKS_STACK,
    ),
    Case(
        "decode_attention", "decode", _DECODE_SHAPES[:1], partial(_decode_inputs, paged=True), partial(_decode, **_WINDOWED),
        partial(_decode_cost, window=_WINDOWED["window"]), variant="window, soft cap", dtypes=(torch.bfloat16,),
        product=_decode_product, stack=_DECODE_MASKS_STACK,
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_ATTENTION, *_DECODE)
