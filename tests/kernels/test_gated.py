"""swiglu and geglu in Triton: tensors laid flat, rows of every width, halves of one projection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from nanotrain.kernels import gated
from nanotrain.kernels.gated import geglu, geglu_reference, swiglu, swiglu_reference

from tests.kernels.kit import DEVICE, DTYPES, check, drawn, dtypes, far, layouts, on_gpu, place, repeatable, seeds, values

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's, on its way to sigmoid(-100) = 0

KERNELS = {"_gated_forward_kernel": 1, "_gated_backward_kernel": 1}
OPERATIONS = {swiglu: swiglu_reference, geglu: geglu_reference}
operations = st.sampled_from(tuple(OPERATIONS))


def compare(op, gate, up, layout="contiguous"):
    tensors = {"gate": gate, "up": up}
    check(lambda **t: op(**t, impl="triton"), OPERATIONS[op], tensors, KERNELS if gate.numel() else {}, layout=layout)


@drawn(40)
@given(operations, st.integers(0, 11), st.integers(0, 300), dtypes, layouts, layouts, layouts, seeds)
@example(swiglu, 5, 1030, torch.float16, "contiguous", "contiguous", "contiguous", 0)  # flat, more than one program
@example(geglu, 9, 768, torch.float32, "rows", "contiguous", "rows", 1)  # more than one tile of rows, and of columns
@example(swiglu, 17, 130, torch.float16, "contiguous", "rows", "sliced", 2)  # rows narrower than the least columns of a wide one
@example(geglu, 2, 4100, torch.float16, "rows", "rows", "transposed", 3)
def test_rows(op, rows, width, dtype, layout, other, upstream, seed):
    compare(op, place(values((rows, width), seed, dtype), layout), place(values((rows, width), seed + 1, dtype), other), upstream)


@pytest.mark.parametrize("op", OPERATIONS)
def test_halves_of_one_projection_are_read_where_they_lie(op):
    x = place(values((2, 3, 1280), 1))

    def on_halves(function, x):
        return function(*x.chunk(2, -1))

    check(lambda x: on_halves(lambda *t: op(*t, impl="triton"), x), lambda x: on_halves(OPERATIONS[op], x), {"x": x}, KERNELS, layout="rows")
    halves = x.chunk(2, -1)
    for half, rows in zip(halves, gated._rows(*halves), strict=True):
        assert rows.shape == (6, 640) and rows.data_ptr() == half.data_ptr()


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 5), (3, 0, 4), (0,)])
def test_any_number_of_dimensions(op, shape):
    compare(op, place(values(shape, 1)), place(values(shape, 2)))
    if len(shape) > 1:
        compare(op, place(values(shape, 1), "transposed"), place(values(shape, 2), "rows"), "rows")


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_range_of_gates(op, dtype):
    gate = place(torch.linspace(-60, 60, 1201, device=DEVICE).to(dtype))
    compare(op, gate, place(values(gate.shape, 1, dtype)))


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_gradient_of_one_input_alone(op):
    gate, up = values((3, 5), 1).requires_grad_(), values((3, 5), 2)
    for a, b in ((gate, up), (up, gate)):
        got, want = (torch.autograd.grad(function(a, b).square().sum(), gate)[0] for function in (lambda *t: op(*t, impl="triton"), OPERATIONS[op]))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("which", ["gate", "up", "grad"])
def test_offsets_past_2_to_the_31(which):
    tensors = {name: values((3, 40), seed, torch.float16) for seed, name in enumerate(("gate", "up", "grad"))}

    def run(gate, up, grad):
        leaves = [t.detach().requires_grad_() for t in (gate, up)]
        out = swiglu(*leaves, impl="triton")
        return out, *torch.autograd.grad(out, leaves, grad)

    for a, b in zip(run(**tensors), run(**tensors | {which: far(tensors[which])}), strict=True):
        assert torch.equal(a, b)


def test_float64_is_refused():
    with pytest.raises(RuntimeError, match="no Triton kernel for these arguments"):
        swiglu(torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), impl="triton")


@on_gpu
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("shape", [(8192, 14336), (4096, 11008), (4096, 2730), (100_000, 129)])
def test_large(op, shape):
    for dtype in DTYPES:
        x = torch.randn(shape[0], 2 * shape[1], device=DEVICE, dtype=dtype)
        compare(op, *x.chunk(2, -1))
        compare(op, *(half.contiguous() for half in x.chunk(2, -1)))
    repeatable(lambda: (op(*x.chunk(2, -1), impl="triton"),))


@on_gpu
def test_more_than_2_to_the_31_elements():
    """A float64 copy would not fit: the last elements must be those of the same elements alone."""
    for shape in (((1 << 31) + 4104,), (70_000, 32_768)):
        gate, up = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
        ends = [t.detach()[-7:].clone().requires_grad_() for t in (gate, up)]
        out, end = swiglu(gate, up, impl="triton"), swiglu(*ends, impl="triton")
        assert torch.equal(out[-7:], end)
        grads = torch.autograd.grad(out, (gate, up), out.detach())
        for a, b in zip(grads, torch.autograd.grad(end, ends, end.detach()), strict=True):
            assert torch.equal(a[-7:], b)
