"""Attention to a cache in Triton: rings of cells and of pages, every option, one query a row and several; NaN wherever no token lies."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from nanotrain.kernels import decode
from nanotrain.kernels.attention import flash_attention_reference
from nanotrain.kernels.decode import EXAMPLES, cost, decode_attention, decode_attention_reference
from nanotrain.kernels.runtime import launches

from tests.kernels.kit import DEVICE, DTYPES, agree, drawn, dtypes, far, layouts, on_gpu, place, poisoned, repeatable, seeds, values

ONE, SPLIT = {"_decode_kernel": 1}, {"_decode_kernel": 1, "_decode_merge_kernel": 1}


def split_for(programs: int, keys: int = 16):
    """The keys of a row are shared by more programs: as on a GPU that runs so many, with so few keys each, and few are merged at once."""
    return mock.patch.multiple(decode, multiprocessors=lambda device: programs, _PROGRAMS=1, _KEYS=keys, _MERGED=64)


def caches(lengths, ring, page, K, D, W, dtype, layout="contiguous", seed=0):
    """(k_cache, v_cache, page_table or None, keys and values by row) of rows of `lengths`; what holds no token is NaN, as is a row more.

    A ring of `ring` cells, or, with a page size, of so many pages, which lie in no order among others.
    """
    B, cells = len(lengths), ring * max(1, page)
    rows = [[values((length, K, width), seed + 7 * row + number, dtype) for number, width in enumerate((D, W))] for row, length in enumerate(lengths)]
    table = None
    if page:
        order = torch.randperm(B * ring + 3, generator=torch.Generator().manual_seed(seed))[: B * ring].view(B, ring)
        table = place(order.to(DEVICE, torch.int32), layout)
    held = []
    for number, width in enumerate((D, W)):
        x = torch.full(((B * ring + 3, page) if page else (B + 1, cells)) + (K, width), float("nan"), dtype=dtype, device=DEVICE)
        for row, tokens in enumerate(rows):
            for position in range(max(0, lengths[row] - cells), lengths[row]):
                cell = position % cells
                where = (order[row, cell // page], cell % page) if page else (row, cell)
                x[where] = tokens[number][position]
        held.append(place(x, layout))
    if page:
        for row, length in enumerate(lengths):  # entries that are not to be followed
            table[row, -(-length // page) :] = -12345
    return *held, table, rows


def compare(q, k, v, lengths, kernels, **options):
    """Fail unless the kernel launches `kernels`, overwrites nothing and agrees with the reference."""
    tensors = [x for x in (q, k, v, lengths, *options.values()) if isinstance(x, torch.Tensor)]
    kept, before = [x.clone() for x in tensors], Counter(launches)
    with poisoned():
        got = decode_attention(q, k, v, lengths, impl="triton", **options)
    assert launches - before == kernels
    assert all(torch.equal(x.nan_to_num(7.0), copy.nan_to_num(7.0)) for x, copy in zip(tensors, kept, strict=True)), "an input was overwritten"
    options.pop("longest", None)
    agree(got, *(decode_attention_reference(*x, lengths, **options) for x in ([y.double() for y in (q, k, v)], (q, k, v))), "result")
    return got


@drawn(30)
@given(
    st.lists(st.integers(0, 75), min_size=1, max_size=3), st.integers(1, 5), st.sampled_from(((1, 1), (2, 1), (3, 3), (6, 2), (20, 2))),
    st.sampled_from(((16, 16), (80, 80), (96, 40), (20, 128))), st.sampled_from((0, 16, 48)), st.integers(0, 90), st.booleans(),
    st.sampled_from((None, 5.0)), st.sampled_from((None, 0.3)), st.sampled_from((None, "heads", "rows")), st.booleans(), st.integers(1, 6), dtypes,
    layouts, layouts, seeds,
)  # fmt: skip
@example([5, 70], 1, (6, 2), (80, 80), 16, 40, True, 5.0, None, "rows", True, 4, torch.float32, "rows", "transposed", 0)
@example([100, 30], 3, (6, 2), (16, 16), 0, 37, False, None, 0.3, "heads", False, 3, torch.float16, "transposed", "rows", 1)  # beyond the ring
@example([200, 2], 2, (2, 1), (96, 40), 48, 1, False, None, None, None, True, 2, torch.float32, "sliced", "sliced", 2)
@example([90], 5, (20, 2), (20, 128), 16, 0, True, None, None, None, False, 6, torch.float16, "contiguous", "contiguous", 3)  # several tiles
@example([0, 3, 64], 5, (1, 1), (16, 16), 0, 0, False, None, None, None, True, 4, torch.float32, "contiguous", "contiguous", 4)
def test_against_the_reference(lengths, T, heads, widths, page, window, snug, softcap, scale, slopes, sinks, programs, dtype, layout, other, seed):
    """`snug` rings hold just what the window needs, others all tokens or somewhat fewer than the longest row."""
    (H, K), (D, W), B = heads, widths, len(lengths)
    window = window or None
    cells = window + T - 1 if window and snug else max(8, max(lengths) - (max(lengths) > 80) * 30)
    k, v, table, _ = caches(lengths, -(-cells // max(1, page)), page, K, D, W, dtype, layout, seed)
    q = place(values((B, T, H, D), seed + 50, dtype), other)
    options = dict(page_table=table, window=window, softcap=softcap, scale=scale, longest=max(lengths) if seed % 2 else None)
    if slopes:
        options["alibi_slopes"] = place(values((H,) if slopes == "heads" else (B, H), seed + 60).abs() * 0.1, other)
    if sinks:
        options["sinks"] = place(values((H,), seed + 61), layout)
    lengths = place(torch.tensor(lengths, device=DEVICE, dtype=torch.int32 if seed % 3 else torch.int64), other)
    ring = k.shape[1] if table is None else page * table.shape[1]
    seen = min(limit for limit in (ring, options["longest"], window and window + T - 1) if limit is not None)
    blocks = -(-T * (H // K) // (16 if dtype == torch.float32 else 64))
    with split_for(programs * B * K * blocks):
        compare(q, k, v, lengths, SPLIT if min(programs, seen // 16) > 1 else ONE, **options)


@pytest.mark.parametrize("page", [0, 16])
def test_it_is_attention_of_the_last_queries(page):
    """Against the attention of training over keys laid end to end, also where the first tokens are lost."""
    for cells, lengths in ((64, [33, 64, 5]), (32, [33, 90, 5])):
        k, v, table, rows = caches(lengths, cells // max(1, page), page, 2, 16, 16, torch.float32)
        q = values((3, 4, 6, 16), 1)
        for options in (dict(), dict(window=9, softcap=3.0, sinks=values((6,), 3), alibi_slopes=values((6,), 2).abs())):
            got = decode_attention(q, k, v, torch.tensor(lengths, device=DEVICE), page_table=table, impl="triton", **options)
            for row, length in enumerate(lengths):
                first = max(0, length - cells)
                tokens = (x[first:][None] for x in rows[row])
                want = flash_attention_reference(q[row : row + 1], *tokens, q_start=length - 4, k_start=first, **options)
                torch.testing.assert_close(got[row], want[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length,kernels", [(31, ONE), (32, SPLIT), (500, SPLIT)])
def test_splits(length, kernels, dtype):
    """From the length that two programs are worth on; however many share a row, and whatever the host believes, it is the same row."""
    k, v, _, _ = caches([length], length, 0, 1, 16, 16, dtype)
    q, lengths, found = values((1, 1, 2, 16), 1, dtype), torch.tensor([length], device=DEVICE), []
    for programs in (2, 7, 300):
        with split_for(programs):
            found.append(compare(q, k, v, lengths, kernels))
            compare(q, k, v, lengths, ONE, longest=10)
    for other in found:
        torch.testing.assert_close(other, found[0])
    with split_for(1):
        compare(q, k, v, lengths, ONE)


def test_how_many_splits():
    device = torch.device("meta")
    assert [decode._splits(units, 1 << 20, device) for units in (1, 8, 132, 300, 4000)] == [528, 66, 4, 1, 1]
    assert [decode._splits(1, longest, device) for longest in (0, 255, 511, 512, 8192)] == [1, 1, 1, 2, 32]


@pytest.mark.parametrize("page", [0, 16])
def test_rows_that_see_nothing_give_zeros(page):
    """An empty row, and queries that stand before a row's first token, with and without a sink, by one program and by several."""
    k, v, table, _ = caches([0, 2, 40], 64 // max(1, page), page, 1, 16, 16, torch.float32)
    q, lengths = values((3, 4, 2, 16), 1), torch.tensor([0, 2, 40], device=DEVICE)
    for sinks in (None, values((2,), 2)):
        for programs, kernels in ((1, ONE), (9, SPLIT)):
            with split_for(programs):
                out = compare(q, k, v, lengths, kernels, page_table=table, sinks=sinks)
            assert not out[0].any() and not out[1, :2].any() and out[1, 2:].all() and out[2].all()


@pytest.mark.parametrize("B,T,H,cells", [(0, 1, 2, 8), (2, 0, 2, 8), (2, 1, 2, 0)])
def test_nothing_to_attend(B, T, H, cells):
    k = torch.zeros(B, cells, 1, 16, device=DEVICE)
    out = compare(values((B, T, H, 16), 1), k, k, torch.zeros(B, dtype=torch.int32, device=DEVICE), {})
    assert out.shape == (B, T, H, 16) and not out.any()
    table = torch.zeros(B, 0, dtype=torch.int32, device=DEVICE)
    compare(values((B, T, H, 16), 1), k.new_zeros(1, 16, 1, 16), k.new_zeros(1, 16, 1, 16), torch.zeros(B, dtype=torch.int32, device=DEVICE), {},
            page_table=table)  # fmt: skip


@pytest.mark.parametrize("along", [0, 1, 2])
def test_offsets_past_2_to_the_31(along):
    """Rows, tokens of a row and heads of the cache so far apart; then pages, queries and the rows of the table."""
    shape, lengths = (3, 3, 3, 16), torch.tensor([3, 2, 3], device=DEVICE)
    q, k, v = (values(shape, seed, torch.float16) for seed in range(3))
    want = decode_attention(q, k, v, lengths, impl="triton")

    def far_along(x):
        return far(x.movedim(along, 0).contiguous()).movedim(0, along)

    assert torch.equal(decode_attention(q, far_along(k), far_along(v), lengths, impl="triton"), want)
    assert torch.equal(decode_attention(far_along(q), k, v, lengths, impl="triton"), want)
    if along == 0:
        pages = far(torch.cat([k, k.new_full((3, 13, 3, 16), float("nan"))], 1)), far(torch.cat([v, v.new_full((3, 13, 3, 16), float("nan"))], 1))
        table = far(torch.tensor([[0], [1], [2]], device=DEVICE, dtype=torch.int32))
        assert torch.equal(decode_attention(q, *pages, far(lengths[:, None])[:, 0], page_table=table, impl="triton"), want)


def test_the_same_bits_twice():
    k, v, table, _ = caches([300, 40], 20, 16, 2, 16, 16, torch.float32)
    q, lengths = values((2, 2, 4, 16), 1), torch.tensor([300, 40], device=DEVICE)
    with split_for(40):
        repeatable(lambda: [decode_attention(q, k, v, lengths, page_table=table, impl="triton")])


def test_without_gradients():
    x = torch.zeros(1, 1, 1, 16, requires_grad=True)
    for impl in ("triton", "reference"):
        assert not decode_attention(*(y.to(DEVICE) for y in (x, x, x)), torch.ones(1, dtype=torch.int32, device=DEVICE), impl=impl).requires_grad


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of a CPU")
def test_a_cpu_takes_the_reference_and_so_does_float64():
    x, before = torch.ones(1, 1, 1, 16), Counter(launches)
    assert decode_attention(x, x, x, torch.tensor([1])).eq(1).all() and not launches - before
    for y in (x.double(), torch.zeros(1, 1, 1, 264)):
        with pytest.raises(RuntimeError, match="no Triton kernel"):
            decode_attention(y, y, y, torch.tensor([1]), impl="triton")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"q_BTHD": torch.zeros(2, 4, 16)}, "4 dimensions, got 3, 4, 4"),
        ({"k_cache": torch.zeros(2, 32, 2, 8)}, "do not fit"),
        ({"v_cache": torch.zeros(2, 33, 2, 16)}, "do not fit"),
        ({"q_BTHD": torch.zeros(2, 1, 3, 16)}, "3 query heads are no multiple of 2"),
        ({"q_BTHD": torch.zeros(2, 1, 4, 16).half()}, "dtypes differ: q torch.float16"),
        (dict.fromkeys(("q_BTHD", "k_cache", "v_cache"), torch.zeros(2, 2, 2, 16).int()), "floating point, got torch.int32"),
        ({"lengths_B": torch.tensor([1])}, r"lengths_B \(1,\)"),
        ({"lengths_B": torch.ones(2)}, "lengths_B .*float32 must be"),
        ({"q_BTHD": torch.zeros(3, 1, 4, 16), "lengths_B": torch.ones(3).int()}, "k_cache has 2 rows, q 3"),
        ({"page_table": torch.zeros(1, 2).int()}, r"page_table \(1, 2\)"),
        ({"page_table": torch.zeros(2).int()}, r"page_table \(2,\)"),
        ({"page_table": torch.zeros(2, 2)}, "page_table .*float32 must be"),
        ({"page_table": torch.zeros(2, 2).int(), "k_cache": torch.zeros(2, 24, 2, 16), "v_cache": torch.zeros(2, 24, 2, 16)}, "pages of 24 tokens"),
        ({"page_table": torch.zeros(2, 2).int(), "k_cache": torch.zeros(2, 0, 2, 16), "v_cache": torch.zeros(2, 0, 2, 16)}, "pages of 0 tokens"),
        ({"window": 0}, "window=0"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"sinks": torch.zeros(2)}, r"sinks \(2,\) must be \(4,\)"),
        ({"alibi_slopes": torch.zeros(3, 4)}, r"alibi_slopes \(3, 4\) must be \(4,\) or \(2, 4\)"),
        ({"impl": "cuda"}, "impl='cuda'"),
    ],
)
def test_bad_arguments(change, message):
    given_arguments = {"q_BTHD": torch.zeros(2, 1, 4, 16), "k_cache": torch.zeros(2, 32, 2, 16), "v_cache": torch.zeros(2, 32, 2, 16)}
    with pytest.raises(ValueError, match=message):
        decode_attention(**(given_arguments | {"lengths_B": torch.ones(2, dtype=torch.int32)} | change))


@pytest.mark.parametrize("shape", EXAMPLES)
def test_cost(shape):
    B, T, S, H, K, D = shape
    bytes_moved, flops = cost(shape, torch.float16)
    assert bytes_moved == 2 * B * D * (2 * S * K + 2 * T * H)
    assert flops == sum(4 * D * B * H for t in range(T) for j in range(S) if j <= S - T + t)


@on_gpu
@pytest.mark.parametrize("shape", [(4, 1, 32768, 32, 8, 128), (64, 5, 3000, 16, 2, 80), (300, 1, 500, 12, 12, 64), (1, 1, 200_000, 16, 4, 256)])
def test_large(shape):
    B, T, S, H, K, D = shape
    for dtype in DTYPES[1:]:
        q, lengths = torch.randn(B, T, H, D, device=DEVICE, dtype=dtype), torch.randint(T, S, (B,), device=DEVICE)
        k, v = (torch.randn(B, S, K, D, device=DEVICE, dtype=dtype) for _ in range(2))
        compare(q, k, v, lengths, SPLIT if decode._splits(B * K, S // 2, DEVICE) > 1 else ONE, window=S // 2)
