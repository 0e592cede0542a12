"""norm, rotary and gated operations against float64 written from their formulas, with gradients."""

import math

import pytest
import torch
from nanotrain.kernels import gated, norm, rotary
from nanotrain.kernels.gated import geglu, swiglu
from nanotrain.kernels.norm import layer_norm, rms_norm
from nanotrain.kernels.rotary import rope


def check(function, formula, tensors, dtype):
    """Results within the dtype's rounding of the float64 formula, and gradients too, under a non-uniform upstream."""
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got, want = function(*leaves), formula(*wide)
    assert got.dtype == dtype
    up = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view(want.shape)
    gradients = torch.autograd.grad((got.double() * up).sum(), leaves)
    exact = torch.autograd.grad((want * up).sum(), wide)
    limit = 8 * torch.finfo(dtype).eps
    for a, b in ((got, want), *zip(gradients, exact, strict=True)):
        assert (a.double() - b).norm() <= limit * (b.norm() + 1e-3)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", norm.EXAMPLES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(shape, dtype, offset):
    def formula(x, w):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (w + offset)

    check(lambda x, w: rms_norm(x, w, offset=offset), formula, (normal(*shape), normal(shape[1], seed=1)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", norm.EXAMPLES)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(shape, dtype, bias):
    def formula(x, w, *b):
        centred = x - x.mean(-1, keepdim=True)
        y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * w
        return y + b[0] if b else y

    tensors = (normal(*shape), normal(shape[1], seed=1), *([normal(shape[1], seed=2)] if bias else []))
    check(layer_norm, formula, tensors, dtype)


@pytest.mark.parametrize("function", [rms_norm, layer_norm])
def test_a_single_row_without_a_batch_dimension(function):
    x, w = normal(8).requires_grad_(), normal(8, seed=1).requires_grad_()
    up = normal(8, seed=2)
    alone, batched = function(x, w), function(x[None], w)[0]
    torch.testing.assert_close(alone, batched)
    torch.testing.assert_close(torch.autograd.grad((alone * up).sum(), (x, w)), torch.autograd.grad((batched * up).sum(), (x, w)))


@pytest.mark.parametrize("function", [rms_norm, layer_norm])
def test_fused_residual_equals_addition_before(function):
    x, r, w = normal(4, 8).requires_grad_(), normal(4, 8, seed=1).requires_grad_(), normal(8, seed=2)
    normed, total = function(x, w, residual=r)
    assert torch.equal(total, x + r) and torch.equal(normed, function(x + r, w))
    a = torch.autograd.grad((normed * 2 + total).sum(), (x, r))
    b = torch.autograd.grad((function(x + r, w) * 2 + x + r).sum(), (x, r))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", gated.EXAMPLES)
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gated(shape, dtype, name):
    def formula(g, u):
        if name == "swiglu":
            return g * torch.sigmoid(g) * u
        return 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u

    check({"swiglu": swiglu, "geglu": geglu}[name], formula, (normal(*shape), normal(*shape, seed=1)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B,T,H,K,D", rotary.EXAMPLES)
@pytest.mark.parametrize("partial", [False, True])
def test_rope_is_a_rotation_by_position(B, T, H, K, D, dtype, partial):
    half = D // 4 if partial else D // 2
    angles = torch.arange(2 * T, dtype=torch.float64)[:, None] * 10 ** -torch.linspace(0, 2, half, dtype=torch.float64)
    positions = torch.arange(T).flip(0).repeat(B, 1)

    def formula(x):
        z = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angles), angles)[positions][:, :, None]
        return torch.cat([z.real, z.imag, x[..., 2 * half :]], -1)

    tables = (angles.cos(), angles.sin())
    other = torch.zeros(B, T, K, D, dtype=dtype)
    check(lambda q: rope(q, other, *tables, positions=positions)[0], formula, (normal(B, T, H, D),), dtype)
    other = torch.zeros(B, T, H, D, dtype=dtype)
    check(lambda k: rope(other, k, *tables, positions=positions)[1], formula, (normal(B, T, K, D),), dtype)


def test_rope_scores_depend_on_distance_only():
    angles = torch.arange(20, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    q, k = normal(1, 1, 1, 4), normal(1, 1, 1, 4, seed=1)

    def score(i, j):
        a = rope(q, k, angles.cos(), angles.sin(), positions=torch.tensor([[i]]))[0]
        b = rope(q, k, angles.cos(), angles.sin(), positions=torch.tensor([[j]]))[1]
        return (a * b).sum()

    torch.testing.assert_close(score(3, 1), score(19, 17))
    assert not torch.allclose(score(3, 1), score(3, 2))


def test_bad_arguments_are_named():
    x = normal(2, 4)
    with pytest.raises(ValueError, match="rms_norm: weight"):
        rms_norm(x, normal(3))
    with pytest.raises(ValueError, match="rms_norm: residual"):
        rms_norm(x, normal(4), residual=normal(3, 4))
    with pytest.raises(ValueError, match="layer_norm: bias"):
        layer_norm(x, normal(4), normal(3))
    with pytest.raises(ValueError, match="swiglu: gate"):
        swiglu(x, normal(2, 3))
    q = normal(1, 5, 2, 4)
    with pytest.raises(ValueError, match="rope: tables of 3"):
        rope(q, q, normal(3, 2), normal(3, 2))
    with pytest.raises(ValueError, match="rope: q .* must be"):
        rope(q[0], q[0], normal(5, 2), normal(5, 2))
    with pytest.raises(ValueError, match="rope: positions"):
        rope(q, q, normal(5, 2), normal(5, 2), positions=torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="no Triton kernel"):
        swiglu(x, x, impl="triton")
