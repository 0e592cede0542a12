"""Dropout and the addition after it in Triton: the same elements fall as in random.dropout_reference, in the forward and in the backward."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from nanotrain.kernels.dropout import dropout_add, dropout_add_reference
from nanotrain.kernels.random import dropout_reference
from nanotrain.kernels.runtime import launches

from tests.kernels.kit import DEVICE, DTYPES, check, drawn, dtypes, far, layouts, on_gpu, place, repeatable, seeds, values

SEEDS = (0, 7, -3, (1 << 62) + 12345, 0x123456789ABCDE0)
BOTH = {"_dropout_kernel": 2}


def compare(x, residual, p, seed, counters, *, layout="contiguous", kernels=BOTH):
    tensors = {"x": x} if residual is None else {"x": x, "residual": residual}

    def run(function, **options):
        return lambda x, residual=None: function(x, residual, p, seed, counters, **options)

    check(run(dropout_add, impl="triton"), run(dropout_add_reference), tensors, kernels, layout=layout)


def counted(*shape, first=0):
    return torch.arange(first, first + torch.Size(shape).numel(), device=DEVICE).view(shape)


@drawn(25)
@given(
    st.integers(1, 40), st.integers(1, 70), st.sampled_from((0.0, 0.1, 0.5, 0.9)), st.sampled_from(SEEDS),
    st.sampled_from((0, (1 << 32) - 9, 1 << 40)), st.booleans(), dtypes, layouts, layouts, seeds,
)  # fmt: skip
@example(3, 2051, 0.3, 7, 5, True, torch.float16, "rows", "sliced", 0)  # blocks of columns
@example(300, 15, 0.3, 7, (1 << 32) - 20, False, torch.float32, "transposed", "rows", 0)  # several programs of rows
def test_against_the_reference(rows, width, p, seed, first, added, dtype, layout, other, draw):
    x = place(values((rows, width), draw, dtype), layout)
    residual = place(values((rows, width), draw + 1, dtype), other) if added else None
    compare(x, residual, p, seed, counted(rows, first=first), layout=other)


@pytest.mark.parametrize("seed,width", [*((seed, 37) for seed in SEEDS), (7, 1), (7, 64), (SEEDS[-1], 1030)])
def test_the_same_elements_fall(seed, width):
    """To the bit, with counters past 2^32 and a width that four does not divide."""
    x = values((9, width), 1).sign() + 3
    for p in (0.25, 0.75):
        counters = torch.tensor([0, 1, 5, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, 1 << 33, (1 << 45) + 3, (1 << 62) + 7], device=DEVICE)
        got, want = dropout_add(x, None, p, seed, counters, impl="triton"), dropout_reference(x, p, seed, counters)
        assert torch.equal(got == 0, want == 0)
        assert torch.equal(got, dropout_add(x, None, p, torch.tensor(seed, device=DEVICE), counters, impl="triton"))


def test_a_seed_in_memory():
    x, counters = place(values((4, 20), 1)), counted(4)
    compare(x, place(values((4, 20), 2)), 0.4, torch.tensor((1 << 62) + 12345, device=DEVICE), counters)


def test_counters_that_are_strided_or_broadcast():
    x, residual = place(values((2, 5, 12), 1)), place(values((2, 5, 12), 2), "transposed")
    for counters in (counted(2, 5, first=3), counted(2, 10)[:, ::2], counted(5, 2).T, counted(1, 5), counted(5), counted(2, 1).expand(2, 5)):
        compare(x, residual, 0.4, 11, counters)
    compare(x[0, 0], residual[0, 0], 0.4, 11, torch.tensor(9, device=DEVICE))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_the_share_that_is_kept(p):
    rows, width = 64, 1024
    out = dropout_add(torch.ones(rows, width, device=DEVICE), None, p, 5, counted(rows), impl="triton")
    kept = (out != 0).float()
    deviation = (p * (1 - p) / (rows * width)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * deviation * width**0.5
    assert (kept.mean(1) - (1 - p)).abs().max() < 5 * deviation * rows**0.5
    assert torch.all((out == 0) | ((out - 1 / (1 - p)).abs() < 1e-5))


def test_what_falls_is_zero_even_where_it_is_not_finite():
    x = torch.full((8, 64), float("inf"), device=DEVICE)
    x[::2] = float("nan")
    got = dropout_add(x, torch.ones_like(x), 0.5, 3, counted(8), impl="triton")
    assert torch.equal(got == 1, dropout_reference(torch.ones_like(x), 0.5, 3, counted(8)) == 0)


def test_gradients_that_nobody_wants():
    x, residual, up = values((5, 12), 1), values((5, 12), 2), values((5, 12), 3)
    before = Counter(launches)
    leaf = residual.clone().requires_grad_()
    (got,) = torch.autograd.grad(dropout_add(x, leaf, 0.3, 1, counted(5), impl="triton"), leaf, up)
    assert torch.equal(got, up) and (launches - before)["_dropout_kernel"] == 1


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 5)])
def test_empty(shape):
    compare(values(shape, 1), values(shape, 2), 0.3, 1, counted(*shape[:-1]), kernels={})


def test_offsets_past_2_to_the_31():
    x, residual, up = (far(values((3, 40), seed, torch.float16)) for seed in range(3))
    leaf = x.detach().requires_grad_()
    got = dropout_add(leaf, residual, 0.3, 1, counted(3), impl="triton")
    near = x.contiguous().requires_grad_()
    want = dropout_add(near, residual.contiguous(), 0.3, 1, counted(3), impl="triton")
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, leaf, up)[0], torch.autograd.grad(want, near, up.contiguous())[0])


def test_the_same_bits_twice():
    x = values((6, 40), 1)
    repeatable(lambda: [dropout_add(x, x, 0.3, 5, counted(6), impl="triton")])


def test_the_reference_rounds_once():
    x, residual = values((6, 40), 1, torch.float16), values((6, 40), 2, torch.float16)
    got = dropout_add(x, residual, 0.3, 5, counted(6), impl="reference")
    assert torch.equal(got, (residual.float() + dropout_reference(x.float(), 0.3, 5, counted(6))).half())


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of a CPU")
def test_a_cpu_takes_the_reference():
    before = Counter(launches)
    dropout_add(values((3, 8), 1), None, 0.3, 1, counted(3))
    assert not launches - before


@pytest.mark.parametrize(
    "change,message",
    [
        ({"residual": torch.zeros(2, 8)}, "residual"),
        ({"residual": torch.zeros(3, 8).half()}, "residual"),
        ({"p": 1.0}, "p 1.0"),
        ({"p": -0.1}, "p -0.1"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, "seed"),
        ({"seed": torch.zeros(())}, "seed"),
        ({"counters": torch.arange(4)}, "counters"),
        ({"counters": torch.zeros(1, 3, dtype=torch.int64)}, "counters"),
        ({"counters": torch.arange(3).int()}, "counters"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"x": torch.zeros(3, 8), "residual": None, "p": 0.1, "seed": 1, "counters": torch.arange(3)} | change
    with pytest.raises(ValueError, match=message):
        dropout_add(**arguments)


def test_float64_has_no_kernel():
    with pytest.raises(RuntimeError, match="no Triton kernel"):
        dropout_add(torch.zeros(3, 8, dtype=torch.float64, device=DEVICE), None, 0.1, 1, counted(3), impl="triton")


@on_gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (100_000, 768), (70_000, 32_768)])
def test_large(shape):
    for dtype in DTYPES[1:]:
        x, counters = torch.randn(shape, device=DEVICE, dtype=dtype), counted(shape[0], first=1 << 33)
        out = dropout_add(x, x, 0.1, 5, counters, impl="triton")
        for rows in (slice(0, 9), slice(shape[0] - 9, shape[0])):
            assert torch.equal(out[rows], dropout_add(x[rows], x[rows], 0.1, 5, counters[rows], impl="triton"))
            torch.testing.assert_close(out[rows], dropout_add_reference(x[rows], x[rows], 0.1, 5, counters[rows]))
