"""The embedding and its gradient in Triton: against float64, the same bits each time, and runs of one token of any length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from nanotrain.kernels import lookup
from nanotrain.kernels.lookup import embedding, embedding_reference

from tests.kernels.kit import DEVICE, DTYPES, agree, check, drawn, dtypes, far, layouts, on_gpu, place, poisoned, repeatable, seeds, values


def launched(n):
    return {"_embedding_backward_kernel": 1} | ({"_embedding_chunk_kernel": 1} if n >= lookup._CHUNK else {})


def compare(tokens, weight, *, layout="contiguous"):
    check(
        lambda weight: embedding(tokens, weight, impl="triton"),
        lambda weight: embedding_reference(tokens, weight),
        {"weight": weight},
        launched(tokens.numel()) if weight.numel() else {},
        layout=layout,
    )


def drawn_tokens(n, vocabulary, seed):
    """Tokens of which a few are common: the square of a uniform number falls near 0 more often."""
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return (uniform.square() * vocabulary).long().to(DEVICE)


def test_tokens_in_any_layout_and_upstream_gradients_that_are_broadcast():
    tokens = drawn_tokens(60, 9, 1)
    for shaped in (tokens.view(3, 4, 5), tokens.view(6, 10).T, tokens[::2], tokens[7]):
        compare(shaped, place(values((9, 8), 2)), layout="transposed")
    weight = values((9, 8), 2).requires_grad_()
    (got,) = torch.autograd.grad(embedding(tokens, weight, impl="triton").sum(), weight)
    assert torch.equal(got, torch.bincount(tokens, minlength=9)[:, None].expand(9, 8).float())


@drawn(20)
@given(st.integers(0, 300), st.integers(1, 12), st.integers(1, 70), dtypes, layouts, layouts, seeds)
@example(700, 2, 20, torch.float32, "contiguous", "rows", 0)  # several chunks of each token
@example(1700, 1, 5, torch.float16, "rows", "contiguous", 0)  # more chunks of one token than are loaded together
@example(40, 3, 2050, torch.float32, "sliced", "sliced", 0)  # blocks of columns
@example(130, 3, 1030, torch.float16, "contiguous", "transposed", 0)
def test_against_the_reference(n, vocabulary, width, dtype, layout, other, seed):
    compare(drawn_tokens(n, vocabulary, seed), place(values((vocabulary, width), seed, dtype), layout), layout=other)


@pytest.mark.parametrize("before", [0, 1, 127, 129])
@pytest.mark.parametrize("count", [0, 1, 9, 128, 129, 256, 400])
def test_a_run_of_any_length_at_any_place(before, count):
    """fp32 sums of fp16 numbers, rounded once: whatever chunks the run covers."""
    shuffled = torch.randperm(before + count + 30, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([0] * before + [1] * count + [2] * 30)[shuffled].to(DEVICE)
    up = values((len(tokens), 3), 5, torch.float16)
    weight = values((4, 3), 6, torch.float16).requires_grad_()
    with poisoned():
        (got,) = torch.autograd.grad(embedding(tokens, weight, impl="triton"), weight, up)
    want = torch.zeros(4, 3, dtype=torch.float64, device=DEVICE).index_add_(0, tokens, up.double())
    torch.testing.assert_close(got.double(), want, rtol=2**-10, atol=1e-5)


def test_a_tied_weight_gathers_both_gradients():
    tokens, weight = drawn_tokens(20, 7, 1), values((7, 5), 2).requires_grad_()
    up = values((20, 7), 3)

    def gradient(impl):
        return torch.autograd.grad(embedding(tokens, weight, impl=impl) @ weight.T, weight, up)[0]

    torch.testing.assert_close(gradient("triton"), gradient("reference"))


def test_the_forward_is_the_rows_themselves():
    tokens, weight = drawn_tokens(20, 7, 1), values((7, 5), 2)
    assert torch.equal(embedding(tokens, weight, impl="triton"), weight[tokens])


@pytest.mark.parametrize("n,vocabulary,width", [(0, 3, 4), (5, 3, 0), (0, 0, 4)])
def test_empty(n, vocabulary, width):
    compare(torch.zeros(n, dtype=torch.int64, device=DEVICE), values((vocabulary, width), 1))


def test_offsets_past_2_to_the_31():
    tokens, up = torch.tensor([1, 0, 1], device=DEVICE), far(values((3, 40), 3, torch.float16))
    weight = values((2, 40), 1, torch.float16).requires_grad_()
    got, want = (torch.autograd.grad(embedding(tokens, weight, impl="triton"), weight, u)[0] for u in (up, up.contiguous()))
    assert torch.equal(got, want)


def test_the_same_bits_twice():
    tokens, weight, up = drawn_tokens(400, 5, 1), values((5, 24), 2).requires_grad_(), values((400, 24), 3)
    repeatable(lambda: torch.autograd.grad(embedding(tokens, weight, impl="triton"), weight, up))


def test_bad_arguments():
    weight = torch.zeros(4, 3, device=DEVICE)
    with pytest.raises(ValueError, match="tokens are torch.int32"):
        embedding(torch.zeros(2, dtype=torch.int32, device=DEVICE), weight)
    with pytest.raises(ValueError, match=r"weight \(4,\)"):
        embedding(torch.zeros(2, dtype=torch.int64, device=DEVICE), weight[:, 0])
    with pytest.raises(RuntimeError, match="no Triton kernel"):
        embedding(torch.zeros(2, dtype=torch.int64, device=DEVICE), weight.double(), impl="triton")


@on_gpu
@pytest.mark.parametrize("kind", ["uniform", "skewed", "one"])
@pytest.mark.parametrize("n,vocabulary,width", [(65_536, 50_304, 768), (65_536, 128_256, 2048)])
def test_large(kind, n, vocabulary, width):
    tokens = {
        "uniform": torch.randint(vocabulary, (n,), device=DEVICE),
        "skewed": (torch.rand(n, device=DEVICE) ** 8 * vocabulary).long(),
        "one": torch.full((n,), vocabulary - 1, device=DEVICE),
    }[kind]
    for dtype in DTYPES:
        weight = torch.randn(vocabulary, width, device=DEVICE, dtype=dtype, requires_grad=True)
        up = torch.randn(n, width, device=DEVICE, dtype=dtype)
        (got,) = torch.autograd.grad(embedding(tokens, weight), weight, up)
        want = torch.zeros(vocabulary, width, device=DEVICE, dtype=torch.float64).index_add_(0, tokens, up.double())
        same = torch.zeros(vocabulary, width, device=DEVICE).index_add_(0, tokens, up.float()).to(dtype)
        agree(got, want, same, kind)
        repeatable(lambda weight=weight, up=up: torch.autograd.grad(embedding(tokens, weight), weight, up))
