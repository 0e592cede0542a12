"""rope and qk_norm_rope in Triton: every option, in place and not, q and k as they come from projections."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from nanotrain.kernels.norm import rms_norm
from nanotrain.kernels.rotary import qk_norm_rope, qk_norm_rope_reference, rope, rope_reference

from tests.kernels.kit import DEVICE, DTYPES, check, drawn, dtypes, far, layouts, on_gpu, place, repeatable, seeds, values

ROPE = {"_rope_kernel": 2}
"""One launch for q and k each way."""
FUSED = {"_qk_norm_rope_forward_kernel": 1, "_qk_norm_rope_backward_kernel": 1}
POSITIONS = ("none", "drawn", "from the end")


def tables(rows: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of angles that differ from row to row and from channel to channel."""
    angles = torch.arange(1, rows + 1)[:, None] * 3.0 ** -torch.linspace(0, 2, half)
    return place(angles.cos().to(DEVICE)), place(angles.sin().to(DEVICE))


def places(B: int, T: int, rows: int, kind: str) -> torch.Tensor | None:
    """Positions in no order, in a layout of their own."""
    if kind == "none":
        return None
    drawn = torch.randint(rows, (B, T), generator=torch.Generator().manual_seed(B + T)) - (rows if kind == "from the end" else 0)
    return place(drawn.to(DEVICE), "transposed")


def queries_and_keys(B, T, H, K, D, dtype, layout="contiguous", other="contiguous", seed=0) -> dict[str, torch.Tensor]:
    return {"q": place(values((B, T, H, D), seed, dtype), layout), "k": place(values((B, T, K, D), seed + 1, dtype), other)}


def options(B, T, half, positions):
    rows = max(1, T) + 3
    return dict(zip(("cos", "sin"), tables(rows, half), strict=True)) | dict(positions=places(B, T, rows, positions))


def weights(D, dtype):
    return {"q_weight": place(values((D,), 8, dtype)), "k_weight": place(values((D,), 9, dtype))}


def compare(op, reference, tensors, kernels, **more):
    """`check` for functions that take the tensors in order."""
    check(lambda **t: op(*t.values()), lambda **t: reference(*t.values()), tensors, kernels, **more)


def fused(given_options):
    """qk_norm_rope and its reference."""
    return partial(qk_norm_rope, impl="triton", **given_options), partial(qk_norm_rope_reference, **given_options)


def in_place(q, k, **rest):
    """rope in place on views of q and k, which as leaves it would refuse; the results must lie where those did."""
    turned = rope(q.view_as(q), k.view_as(k), inplace=True, impl="triton", **rest)
    assert [x.data_ptr() for x in turned] == [x.data_ptr() for x in (q, k)]
    return turned


shapes = st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 5), st.integers(1, 3), st.sampled_from((2, 6, 16, 20, 80)))
drawn_options = (shapes, st.booleans(), st.sampled_from(POSITIONS), dtypes, layouts, layouts, layouts, seeds)


@drawn(14)
@given(*drawn_options, st.booleans())
@example((2, 3, 5, 2, 80), False, "drawn", torch.float16, "rows", "transposed", "rows", 0, True)
@example((2, 2, 3, 1, 20), True, "from the end", torch.float32, "transposed", "rows", "transposed", 0, True)
@example((1, 3, 4, 4, 96), True, "none", torch.float16, "contiguous", "sliced", "sliced", 0, False)
@example((1, 2, 20, 2, 256), False, "drawn", torch.float32, "contiguous", "contiguous", "contiguous", 0, False)  # two programs a token
@example((1, 2, 3, 20, 256), False, "none", torch.float32, "contiguous", "contiguous", "contiguous", 0, True)  # for the keys
def test_rope(shape, partial_rotary, positions, dtype, layout, other, upstream, seed, inplace):
    B, T, _, _, D = shape
    given_options = options(B, T, max(1, D // 4) if partial_rotary else D // 2, positions)
    op = partial(in_place, **given_options) if inplace else partial(rope, impl="triton", **given_options)
    compare(
        op, partial(rope_reference, **given_options), queries_and_keys(*shape, dtype, layout, other, seed), ROPE if B * T else {},
        layout=upstream, changed=("q", "k") if inplace else (),
    )  # fmt: skip


@drawn(8)
@given(*drawn_options, st.sampled_from((0.0, 1.0)), st.sampled_from((1e-6, 1e-2)))
@example((2, 3, 5, 2, 80), False, "drawn", torch.float16, "rows", "transposed", "rows", 0, 1.0, 1e-6)
@example((1, 3, 3, 1, 20), True, "from the end", torch.float32, "transposed", "rows", "transposed", 0, 0.0, 1e-2)
@example((2, 5, 4, 2, 16), True, "none", torch.float32, "contiguous", "rows", "sliced", 0, 1.0, 1e-2)  # more tokens than programs
@example((2, 5, 2, 2, 6), False, "none", torch.float16, "contiguous", "rows", "contiguous", 0, 0.0, 1e-6)
@example((1, 2, 20, 2, 256), False, "drawn", torch.float32, "contiguous", "sliced", "contiguous", 0, 0.0, 1e-6)  # blocks of heads
@example((1, 2, 3, 20, 256), False, "none", torch.float32, "contiguous", "contiguous", "contiguous", 0, 0.0, 1e-6)
def test_qk_norm_rope(shape, partial_rotary, positions, dtype, layout, other, upstream, seed, offset, eps):
    B, T, _, _, D = shape
    given_options = options(B, T, max(1, D // 4) if partial_rotary else D // 2, positions) | dict(offset=offset, eps=eps)

    op, reference = fused(given_options)
    tensors = queries_and_keys(*shape, dtype, layout, other, seed) | weights(D, dtype)
    compare(op, reference, tensors, FUSED if B * T else {}, layout=upstream)


@pytest.mark.parametrize("T,H,K", [(0, 2, 1), (2, 0, 0), (2, 0, 1), (2, 1, 0)])
def test_nothing_to_turn(T, H, K):
    given_options = options(2, T, 3, "none")
    tensors, pieces = queries_and_keys(2, T, H, K, 6, torch.float32), T * (H + K)
    compare(partial(rope, impl="triton", **given_options), partial(rope_reference, **given_options), tensors, ROPE if pieces else {})
    compare(*fused(given_options), tensors | weights(6, torch.float32), FUSED if pieces else {})


@pytest.mark.parametrize("cut", ["split", "slices", "chunk"])
@pytest.mark.parametrize("inplace", [False, True])
def test_views_of_one_projection(cut, inplace):
    """q, k and v are parts of one output; v is used after q and k were turned, as attention does."""
    B, T, H, D = 2, 2, 2, 6
    K = H if cut == "chunk" else 1
    given_options = options(B, T, 3, "drawn")

    def run(turn, hidden, weight):
        out = F.linear(hidden, weight)
        if cut == "slices":
            parts = out[..., : H * D], out[..., H * D : (H + K) * D], out[..., (H + K) * D :]
        else:
            parts = out.chunk(3, -1) if cut == "chunk" else out.split((H * D, K * D, K * D), -1)
        q, k, v = (part.view(B, T, -1, D) for part in parts)
        turned = turn(q, k, **given_options)
        if inplace and turn is not rope_reference:
            assert [x.data_ptr() for x in turned] == [x.data_ptr() for x in (q, k)]
        return *turned, v * v.sum(-1, keepdim=True)

    tensors = {"hidden": place(values((B, T, 5), 1)), "weight": place(values(((H + 2 * K) * D, 5), 2))}
    check(partial(run, partial(rope, inplace=inplace, impl="triton")), partial(run, rope_reference), tensors, ROPE)


def test_in_place_without_gradients():
    cos_sin = tables(5, 4)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            tensors = queries_and_keys(1, 3, 2, 1, 10, torch.float32, "rows", "transposed").values()
            want = rope_reference(*tensors, *cos_sin)
            got = rope(*tensors, *cos_sin, inplace=True, impl="triton")
        for x, a, b in zip(tensors, got, want, strict=True):
            assert x.data_ptr() == a.data_ptr() and torch.equal(x, a)
            torch.testing.assert_close(a, b)


def test_in_place_is_refused_where_gradients_would_be_wrong():
    x, cos_sin = values((1, 2, 1, 4), 1).requires_grad_(), tables(2, 2)
    for impl in ("triton", "reference"):
        with pytest.raises(ValueError, match="inplace=True would overwrite q or k, a leaf"):
            rope(x * 1, x, *cos_sin, inplace=True, impl=impl)
    q = x.exp()  # whose backward needs q
    turned = rope(q, x * 1, *cos_sin, inplace=True, impl="triton")
    said = "nothing"
    try:
        turned[0].sum().backward()
    except RuntimeError as error:
        said = str(error)
    assert "modified by an inplace operation" in said


def test_in_place_leaves_expanded_tensors_alone():
    x, cos_sin = values((1, 2, 1, 4), 1), tables(2, 2)
    wide = x.expand(2, 2, 3, 4)
    kept, want = x.clone(), rope_reference(wide, wide, *cos_sin)
    for got, expected in zip(rope(wide, wide, *cos_sin, inplace=True, impl="triton"), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.equal(x, kept)


def test_a_second_backward_and_one_of_q_alone():
    q, k = (x.requires_grad_() for x in queries_and_keys(1, 2, 2, 1, 4, torch.float32).values())
    turned = rope(q * 1, k * 1, *tables(2, 2), inplace=True, impl="triton")
    want = torch.autograd.grad(rope_reference(q, k, *tables(2, 2))[0].square().sum(), q)[0]
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(turned[0].square().sum(), q, retain_graph=True)[0], want)


@pytest.mark.parametrize("normed", [False, True])
def test_positions_outside_of_the_tables_read_nothing(normed):
    """Only their own tokens are NaN, though beyond the tables lie ones."""
    cos, sin = (torch.ones(40, 2, device=DEVICE)[15:20] for _ in range(2))
    x, weight = values((1, 5, 1, 4), 1), torch.ones(4, device=DEVICE)
    positions = torch.tensor([[4, 5, -5, -6, 0]], device=DEVICE)
    op = partial(qk_norm_rope, x, x, weight, weight, impl="triton") if normed else partial(rope, x, x, impl="triton")
    for turned in op(cos, sin, positions=positions):
        assert turned.isnan().all(-1).flatten().tolist() == [False, True, False, True, False]
        assert turned.isnan().any(-1).flatten().tolist() == [False, True, False, True, False]
    if DEVICE.type == "cpu":
        with pytest.raises(IndexError):
            rope(x, x, cos, sin, positions=positions)


def far_along(tensor: torch.Tensor, dimension: int) -> torch.Tensor:
    """The same values, so far apart along a dimension of 3 that the third lies past 2^31 elements."""
    return far(tensor.movedim(dimension, 0).contiguous()).movedim(0, dimension)


@pytest.mark.parametrize("dimension", range(4))
@pytest.mark.parametrize("which", ["x", "grad"])
def test_offsets_past_2_to_the_31(dimension, which):
    shape = [3 if d == dimension else n for d, n in enumerate((1, 1, 1, 4))]
    q, grad = (values(shape, seed, torch.float16) for seed in (1, 2))
    k, half = values(shape, 3, torch.float16), shape[3] // 2
    move = partial(far_along, dimension=dimension)

    def run(function, q, grad):
        leaves = [t.detach().requires_grad_() for t in (q, k)]
        outs = function(*leaves)
        return *outs, *torch.autograd.grad(outs, leaves, (grad, grad))

    cos_sin, weight = tables(3, half), values(shape[3:], 4, torch.float16)
    for function in (lambda q, k: rope(q, k, *cos_sin, impl="triton"), lambda q, k: qk_norm_rope(q, k, weight, weight, *cos_sin, impl="triton")):
        want = run(function, q, grad)
        got = run(function, move(q), grad) if which == "x" else run(function, q, move(grad))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if which == "x":
        moved = move(q)
        rope(moved, k.clone(), *cos_sin, inplace=True, impl="triton")
        assert torch.equal(moved, run(lambda q, k: rope(q, k, *cos_sin, impl="triton"), q, grad)[0])


def test_float64_is_refused():
    x = values((1, 2, 1, 4), 1)
    with pytest.raises(RuntimeError, match="rope has no Triton kernel for these arguments"):
        rope(x, x, *(t.double() for t in tables(2, 2)), impl="triton")
    with pytest.raises(RuntimeError, match="qk_norm_rope has no Triton kernel for these arguments"):
        qk_norm_rope(x, x, x.new_ones(4), x.new_ones(4).double(), *tables(2, 2), impl="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_a_cpu_the_two_operations_one_after_the_other(dtype):
    q, k = (torch.randn(2, 3, n, 8, dtype=dtype, generator=torch.Generator().manual_seed(n)) for n in (4, 2))
    weight, cos_sin = torch.linspace(-1, 1, 8, dtype=dtype), [table.cpu() for table in tables(3, 4)]
    got = qk_norm_rope(q, k, weight, weight, *cos_sin, eps=1e-3, offset=1.0)
    want = rope(*(rms_norm(x, weight, 1e-3, offset=1.0) for x in (q, k)), *cos_sin)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_bad_arguments_of_qk_norm_rope_are_named():
    q, weight, cos_sin = torch.ones(1, 5, 2, 4), torch.ones(4), (torch.ones(5, 2), torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"qk_norm_rope: k_weight \(3,\) must be \(4,\)"):
        qk_norm_rope(q, q, weight, torch.ones(3), *cos_sin)
    with pytest.raises(ValueError, match="qk_norm_rope: q_weight"):
        qk_norm_rope(q, q, torch.ones(1, 4), weight, *cos_sin)
    with pytest.raises(ValueError, match="qk_norm_rope: tables of 3"):
        qk_norm_rope(q, q, weight, weight, torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="qk_norm_rope: positions"):
        qk_norm_rope(q, q, weight, weight, *cos_sin, positions=torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="qk_norm_rope: q .* must be"):
        qk_norm_rope(q, q[0], weight, weight, *cos_sin)


def test_the_same_bits_twice():
    q, k, weight = (values(shape, seed).requires_grad_() for seed, shape in enumerate(((1, 9, 2, 4), (1, 9, 1, 4), (4,))))
    cos_sin = tables(9, 2)

    def run():
        outs = qk_norm_rope(q, k, weight, weight, *cos_sin, impl="triton")
        return torch.autograd.grad(outs, (q, k, weight), [out.detach() for out in outs])

    repeatable(run, times=1)


@on_gpu
@pytest.mark.parametrize("shape", [(2, 2048, 32, 8, 128), (4, 1024, 12, 12, 64), (2, 512, 32, 32, 80), (2, 512, 16, 1, 256), (1, 300, 40, 8, 96)])
@pytest.mark.parametrize("positions", ["none", "drawn"])
@pytest.mark.parametrize("share", [1, 4])
def test_large(shape, positions, share):
    B, T, _, _, D = shape
    given_options = options(B, T, D // (2 * share), positions)
    for dtype in DTYPES:
        tensors = queries_and_keys(*shape, dtype, "rows", "contiguous")
        compare(partial(rope, impl="triton", **given_options), partial(rope_reference, **given_options), tensors, ROPE)
        compare(partial(in_place, **given_options), partial(rope_reference, **given_options), tensors, ROPE, changed=("q", "k"))
        tensors = queries_and_keys(*shape, dtype, "rows", "transposed") | weights(D, dtype)
        compare(*fused(given_options), tensors, FUSED)


@on_gpu
def test_more_than_2_to_the_31_elements():
    """A float64 copy would not fit: the last tokens must be those of the same tokens alone."""
    B, T, H, D = 9, 65_536, 32, 128
    q, k = (torch.randn(B, T, heads, D, device=DEVICE, dtype=torch.bfloat16) for heads in (H, 1))
    cos_sin, weight = tables(T, D // 2), torch.ones(D, device=DEVICE, dtype=torch.bfloat16)
    for op in (partial(rope, impl="triton"), lambda q, k, *rest, **more: qk_norm_rope(q, k, weight, weight, *rest, impl="triton", **more)):
        ends = op(q[-1:, -5:], k[-1:, -5:], *cos_sin, positions=torch.arange(T - 5, T, device=DEVICE)[None])
        for whole, end in zip(op(q, k, *cos_sin), ends, strict=True):
            assert torch.equal(whole[-1:, -5:], end)
