"""RMSNorm and LayerNorm in Triton: both passes, every option, narrow rows and ones too wide for registers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from nanotrain.kernels import norm
from nanotrain.kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference

from tests.kernels.kit import DEVICE, DTYPES, check, drawn, dtypes, far, layouts, on_gpu, place, repeatable, seeds, values

NARROW = {"_norm_forward_kernel": 1, "_norm_backward_kernel": 1}
WIDE = {"_norm_forward_kernel": 1, "_norm_backward_wide_kernel": 1, "_norm_weight_kernel": 1}
OPERATIONS = ("rms", "rms_offset", "layer", "layer_bias")


def compare(kind, x, residual, *, eps=1e-5, kernels=NARROW, layout="contiguous"):
    """The kernel against its reference on x, with a residual where there is one."""
    width = x.shape[-1]
    tensors = {"x": x, "weight": place(values((width,), 7, x.dtype)) + 1}
    if kind == "layer_bias":
        tensors["bias"] = place(values((width,), 8, x.dtype))
    if residual is not None:
        tensors["residual"] = residual
    options = dict(eps=eps, offset=1.0) if kind == "rms_offset" else dict(eps=eps)
    op, reference = (rms_norm, rms_norm_reference) if kind.startswith("rms") else (layer_norm, layer_norm_reference)
    check(lambda **t: op(**t, **options, impl="triton"), lambda **t: reference(**t, **options), tensors, kernels, layout=layout)


@drawn(20)
@given(st.sampled_from(OPERATIONS), st.integers(0, 9), st.integers(1, 70), st.booleans(), dtypes, layouts, layouts, seeds)
@example("rms", 9, 2049, True, torch.float16, "rows", "transposed", 0)  # more rows than programs, a row a tile
@example("layer_bias", 9, 2049, False, torch.float32, "sliced", "contiguous", 0)
@example("layer", 75, 33, True, torch.float32, "contiguous", "rows", 1)  # several rows a tile, and more tiles than programs
@example("rms_offset", 75, 33, True, torch.float16, "contiguous", "sliced", 1)
def test_narrow_rows(kind, rows, width, fused, dtype, layout, other, seed):
    x = place(values((rows, width), seed, dtype), layout)
    compare(kind, x, place(values((rows, width), seed + 1, dtype), other) if fused else None, layout=other)


@pytest.mark.parametrize("kind,fused,rows", [*((kind, False, 3) for kind in OPERATIONS), ("rms", True, 18), ("layer_bias", True, 18)])
def test_rows_too_wide_for_registers(kind, fused, rows):
    x = place(values((rows, norm.WIDEST + 1337), 3, torch.float16), "rows")
    compare(kind, x, place(values(x.shape, 4, torch.float16), "sliced") if fused else None, kernels=WIDE, layout="rows")


@pytest.mark.parametrize("width", [48, norm.WIDEST + 40])
def test_a_mean_large_beside_the_deviation(width):
    """The mean of squares less the square of the mean would lose every digit; what stays is the rounding of the mean itself, in fp32."""
    drift = torch.linspace(-1, 1, width, device=DEVICE)  # so that the means of a wide row's blocks differ
    x, weight = values((3, width), 5) * 0.01 + 3000.0 + drift, torch.ones(width, device=DEVICE)
    got, want = layer_norm(x, weight, impl="triton"), layer_norm_reference(x.double(), weight.double())
    assert (got - want).abs().max() < 4 * torch.finfo(torch.float32).eps * 3000.0 / x.double().std(-1).min()


def test_many_dimensions_and_none():
    compare("rms", place(values((2, 3, 4, 10), 1), "transposed"), place(values((2, 3, 4, 10), 2)))
    compare("layer_bias", place(values((9,), 1)), None)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_results_alone(used):
    tensors, weight = {"x": place(values((5, 24), 1)), "residual": place(values((5, 24), 3))}, place(values((24,), 2))
    check(lambda **t: rms_norm(weight=weight, **t, impl="triton")[used], lambda **t: rms_norm_reference(weight=weight, **t)[used], tensors, NARROW)


def test_a_weight_of_another_dtype():
    x, weight = place(values((4, 24), 1, torch.float16)), place(values((24,), 2))
    check(lambda **t: rms_norm(**t, impl="triton"), rms_norm_reference, {"x": x, "weight": weight}, NARROW)


def test_offsets_past_2_to_the_31():
    x, weight = far(values((3, 40), 1, torch.float16)), values((40,), 2, torch.float16)
    grad = far(values((3, 40), 3, torch.float16))
    for op in (rms_norm, layer_norm):
        results = []
        for place_of in (lambda t: t, torch.Tensor.contiguous):
            leaves = [t.detach().requires_grad_() for t in (place_of(x), weight)]
            out = op(*leaves, impl="triton")
            results.append([out, *torch.autograd.grad(out, leaves, place_of(grad))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("width", [4097, norm.WIDEST + 1])
def test_the_same_bits_twice(width):
    x, weight = values((40, width), 1).requires_grad_(), values((width,), 2).requires_grad_()
    up = values(x.shape, 3)
    repeatable(lambda: torch.autograd.grad(rms_norm(x, weight, impl="triton"), (x, weight), up), times=1)


@on_gpu
@pytest.mark.parametrize("shape", [(4096, 4096), (300_000, 128), (64, 65_536), (70_000, 32_768)])
@pytest.mark.parametrize("kind", OPERATIONS)
def test_large(kind, shape):
    kernels = NARROW if shape[1] <= norm.WIDEST else WIDE
    for dtype in DTYPES[1:] if shape[0] * shape[1] > 1 << 31 else DTYPES:
        x = torch.randn(shape, device=DEVICE, dtype=dtype)
        if x.numel() < 1 << 28:
            compare(kind, x, torch.randn_like(x), kernels=kernels)
        else:  # a float64 copy would not fit: the last rows must be those of the same rows alone
            op = rms_norm if kind.startswith("rms") else layer_norm
            weight = torch.randn(shape[1], device=DEVICE, dtype=dtype)
            assert torch.equal(op(x, weight, impl="triton")[-7:], op(x[-7:], weight, impl="triton"))
