"""Newton-Schulz by symmetric halves: the product against float64, and singular values where the docstring says."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from nanotrain.kernels.orthogonal import _POLAR_EXPRESS, _product_reference, _steps, _symmetric_product, orthogonalize, orthogonalize_reference
from nanotrain.kernels.runtime import launches

from tests.kernels.kit import DEVICE, DTYPES, agree, drawn, dtypes, far, layouts, on_gpu, place, poisoned, repeatable, seeds, values

STORED = {"_symmetric_product_kernel": 10}


def product(x, beta=0.0, alpha=1.0):
    """The kernel's product, checked against the reference in float64."""
    before = Counter(launches)
    with poisoned():
        got = _symmetric_product(x, beta, alpha)
    assert launches - before == Counter({"_symmetric_product_kernel": 1} if got.numel() else {})
    # PyTorch's products of halves on a CPU round sums of parts; one of fp32 rounded once is what the kernel is held to.
    same = _product_reference(x.float(), beta, alpha).to(x.dtype)
    agree(got, _product_reference(x.double(), beta, alpha), same, "product")
    assert torch.equal(got.tril(-128), got.mT.tril(-128))  # of one tile each, and its mirror image
    return got


@drawn(20)
@given(st.integers(1, 3), st.integers(1, 200), st.integers(1, 150), dtypes, layouts, seeds)
@example(1, 130, 65, torch.float16, "contiguous", 0)
@example(1, 127, 64, torch.float16, "transposed", 0)  # small tiles
@example(3, 129, 40, torch.float16, "rows", 0)
def test_product(n, rows, depth, dtype, layout, seed):
    product(place(values((n, rows, depth), seed, dtype) * 0.1, layout))


@drawn(10)
@given(st.integers(1, 3), st.integers(1, 150), st.sampled_from([(1.5, 1.0), (-2.8, 0.5), (-22.5, 15.9)]), dtypes, layouts, seeds)
@example(2, 200, (-2.8, 0.5), torch.float16, "rows", 0)
def test_product_of_a_symmetric_matrix_with_itself_and_its_multiple(n, rows, coefficients, dtype, layout, seed):
    x = values((n, rows, rows), seed) * 0.1
    product(place(((x + x.mT) / rows).to(dtype), layout), *coefficients)


def test_every_tile_of_a_long_side():
    """66 tiles: each has its place on or under the diagonal, where the row is found by a square root."""
    product(place(values((1, 650, 3), 1)))


def orthogonal(matrices, dtype):
    """The public function's steps in a dtype that the interpreter multiplies rightly."""
    before = Counter(launches)
    with poisoned():
        got = _steps(matrices, dtype, _symmetric_product)
    assert launches - before == Counter(STORED if got.numel() else {}) and got.shape == matrices.shape and got.dtype == dtype
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape,layout",
    [
        ((2, 40, 70), "rows"),
        ((1, 70, 40), "contiguous"),
        ((2, 35, 33), "transposed"),
        ((1, 33, 33), "sliced"),
        ((1, 1, 5), "rows"),
        ((0, 3, 4), "rows"),
    ],
)
def test_steps(shape, layout, dtype):
    matrices = place(values(shape, 1), layout)
    got, exact = orthogonal(matrices, dtype), _steps(matrices, torch.float64, _product_reference)
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-4)
    elif got.numel():
        same = _steps(matrices, dtype, lambda x, b=0.0, a=1.0: _product_reference(x.float(), b, a).to(dtype))
        agree(got, exact, same, "steps")


def spectra(matrices, got):
    """(singular values of the results, of which those that came from over a hundredth of the norm)."""
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    large = s > matrices.double().norm(dim=(1, 2))[:, None] / 100
    # In the matrix's own basis, so that each stays with the one that it came from.
    return (u.mT @ got.double() @ vh.mT).diagonal(dim1=1, dim2=2), large


@pytest.mark.parametrize("shape,scale", [((2, 48, 48), 1.0), ((2, 96, 40), 1e4), ((2, 40, 96), 1e-3)])
def test_singular_values_end_near_one(shape, scale):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) * scale
    results = [orthogonalize_reference(matrices), orthogonalize(matrices), orthogonal(matrices, torch.float32)]
    for got in (*results, orthogonalize(matrices.double())):
        found, large = spectra(matrices, got)
        assert large.float().mean() > 0.9 and found[large].min() > 0.85 and found.max() < 1.15


def test_the_reference_is_the_polynomial():
    """Five steps written out in float64."""
    x = values((2, 6, 9), 1).double()
    want = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in _POLAR_EXPRESS:
        gram = want @ want.mT
        want = a * want + b * gram @ want + c * gram @ gram @ want
    for got in (orthogonalize(x), orthogonalize(x.mT).mT, orthogonalize_reference(x)):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want)


def test_the_public_function_takes_the_kernel():
    """In bf16, whose numbers the interpreter gets wrong: there only the launches count."""
    matrices = values((2, 40, 70), 1)
    before = Counter(launches)
    got = orthogonalize(matrices.requires_grad_(), impl="triton")
    assert launches - before == Counter(STORED) and got.dtype == torch.bfloat16 and got.shape == (2, 40, 70) and not got.requires_grad
    if DEVICE.type == "cpu":
        before = Counter(launches)
        orthogonalize(matrices)
        assert not launches - before


def test_offsets_past_2_to_the_31():
    x = far(values((3, 9, 7), 1))
    assert torch.equal(_symmetric_product(x), _symmetric_product(x.contiguous()))


def test_the_same_bits_twice():
    x = values((2, 70, 40), 1)
    repeatable(lambda: [orthogonal(x, torch.float32)], times=1)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"matrices \(3, 4\)"):
        orthogonalize(torch.zeros(3, 4, device=DEVICE))
    with pytest.raises(RuntimeError, match="no Triton kernel"):
        orthogonalize(torch.zeros(1, 3, 4, dtype=torch.float64, device=DEVICE), impl="triton")


@on_gpu
@pytest.mark.parametrize("shape", [(12, 768, 3072), (36, 768, 768), (2, 2048, 8192), (4, 4096, 1000), (1, 8192, 8192)])
def test_large(shape):
    matrices = torch.randn(shape, device=DEVICE)
    got = orthogonalize(matrices)
    exact, same = orthogonalize_reference(matrices.double()), orthogonalize_reference(matrices)
    agree(got, exact, same, "steps")
    repeatable(lambda: [orthogonalize(matrices)], times=1)
