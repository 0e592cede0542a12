"""adafactor_: the reference against torch.optim.Adafactor, the kernels against the reference."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from nanotrain.kernels.adafactor import EXAMPLES, adafactor_
from nanotrain.kernels.runtime import launches

from tests.kernels.kit import DEVICE, agree, drawn, layouts, on_gpu, place, poisoned, repeatable, seeds, values

SIX = {
    "_adafactor_sums_kernel": 1, "_adafactor_moments_kernel": 1, "_adafactor_totals_kernel": 2, "_adafactor_norms_kernel": 1,
    "_adafactor_apply_kernel": 1,
}  # fmt: skip

KINDS = ("fp32", "fp16", "bf16", "rounded", "narrow")
"""fp32; fp16 and bf16 with masters; bf16 rounded stochastically, with fp32 moments and with bf16 ones."""

TILES = ((66, 136), (9000,))
"""More than a tile in each direction, whose rows start at multiples of 16 bytes; more than a tile of what is no matrix."""


class Call:
    """Arguments of a call: params and grads, moments of earlier steps or `fresh` ones, and every option there is."""

    def __init__(self, shapes, kind="fp32", seed=0, layout="contiguous", *, fresh=False, wide=torch.float32, **options):
        dtype = {"fp32": wide, "fp16": torch.float16}.get(kind, torch.bfloat16)

        def moment(shape, n):
            kept = torch.bfloat16 if kind == "narrow" else wide
            return place((torch.zeros(shape, device=DEVICE) if fresh else values(shape, seed + n).square()).to(kept))

        start = [values(shape, seed + n) for n, shape in enumerate(shapes)]
        self.params = [place(p.to(dtype)) for p in start]
        self.grads = [place(values(shape, seed + 100 + n, dtype), layout) for n, shape in enumerate(shapes)]
        sides = ([moment(s[side : side + 1], n) if len(s) == 2 else None for n, s in enumerate(shapes)] for side in (0, 1))
        self.moments = [*sides, [None if len(s) == 2 else moment(s, n) for n, s in enumerate(shapes)]]
        self.masters = [place(p.to(wide)) for p in start] if kind in ("fp16", "bf16") else None
        rounded = dict(seed=7, counter_starts=[(1 << 33) + 100_000 * n for n in range(len(shapes))]) if kind in ("rounded", "narrow") else {}
        numbers = dict(lr=0.3, step=1 if fresh else 3, eps=(1e-2, 0.3), clip_threshold=0.7, grad_scale=0.5, weight_decay=0.125)
        self.options = numbers | rounded | options

    def written(self) -> dict[str, torch.Tensor]:
        """Every tensor that a step may write, by its kind and number."""
        lists = dict(zip(("row", "column", "variance"), self.moments, strict=True)) | {"param": self.params, "master": self.masters or []}
        return {f"{name} {n}": t for name, tensors in lists.items() for n, t in enumerate(tensors) if t is not None}

    def step(self, impl="triton", **options) -> dict[str, torch.Tensor]:
        """Make the step; returns what it wrote."""
        adafactor_(self.params, self.grads, *self.moments, masters=self.masters, **(self.options | options), impl=impl)
        return self.written()


def copies(call: Call) -> dict[str, torch.Tensor]:
    """What it may write, cloned."""
    return {name: t.clone() for name, t in call.written().items()}


def compare(shapes, kind, seed=0, layout="contiguous", **options):
    """A step of the kernels is as near to float64 as one of the reference, and writes nothing out of bounds."""
    call, same = Call(shapes, kind, seed, layout, **options), Call(shapes, kind, seed, layout, **options)
    exact = Call(shapes, "fp32", seed, wide=torch.float64, **options)
    starts = (*call.grads, *(call.masters or call.params), *(m for m in chain(*call.moments) if m is not None))
    for theirs, mine in zip((*exact.grads, *exact.params, *(m for m in chain(*exact.moments) if m is not None)), starts, strict=True):
        theirs.copy_(mine)
    before = Counter(launches)
    with poisoned():
        got = call.step()
    found = {name: count for name, count in (launches - before).items() if name.endswith("_kernel")}
    assert found == (SIX if any(len(s) == 2 for s in shapes) else {k: n for k, n in SIX.items() if k != "_adafactor_moments_kernel"}), found
    want, usual = exact.step("reference"), same.step("reference")
    for name, tensor in got.items():
        if kind != "fp32" and name.startswith("param"):
            # Rounding by chance turns on the last bits of what is rounded, so that of many elements a few may differ.
            nearest = got[name.replace("param", "master")].to(tensor.dtype) if call.masters else usual[name]
            assert not tensor.numel() or (tensor == nearest).double().mean() >= (1 if call.masters else 0.99), name
        else:
            agree(tensor, want[name.replace("master", "param")], usual[name], name)
        storage = torch.empty(0, dtype=tensor.dtype, device=DEVICE).set_(tensor.untyped_storage())
        assert int(storage.isnan().sum()) == storage.numel() - tensor.numel(), f"{name}: written out of bounds"


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", [{}, dict(eps=(1e-2, 0.5), clip_threshold=1.5, weight_decay=0.1, lr=0.3)], ids=["defaults", "others"])
def test_equals_torch_over_many_steps(dtype, tolerance, options):
    shapes = (*EXAMPLES, (5, 70))
    options = dict(lr=0.01, weight_decay=0.0) | options
    params = [values(shape, n, dtype) for n, shape in enumerate(shapes)]
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    reference = torch.optim.Adafactor(theirs, **{"d" if name == "clip_threshold" else name: value for name, value in options.items()})
    moments = [[p.new_zeros(p.shape[side]) if p.dim() == 2 else None for p in params] for side in (0, 1)]
    moments.append([None if p.dim() == 2 else torch.zeros_like(p) for p in params])
    for step in range(1, 9):
        grads = [values(shape, 10 * step + n, dtype) for n, shape in enumerate(shapes)]
        adafactor_(params, grads, *moments, step=torch.tensor(float(step), device=DEVICE), impl="reference", **options)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        reference.step()
        for p, their in zip(params, theirs, strict=True):
            torch.testing.assert_close(p, their.detach(), rtol=tolerance, atol=tolerance)
    for name, own in zip(("row_var", "col_var", "variance"), moments, strict=True):
        for moment, p in zip(own, theirs, strict=True):
            kept = reference.state[p].get(name)
            assert (moment is None) == (kept is None)
            if moment is not None:
                torch.testing.assert_close(moment, kept.view_as(moment), rtol=tolerance, atol=tolerance)


@drawn(6)
@given(
    st.integers(1, 70), st.integers(1, 140), st.integers(0, 300), st.sampled_from(KINDS), layouts, seeds, st.booleans(), st.sampled_from([1, 3, 40]),
    st.sampled_from([1.0, 0.01]),
)  # fmt: skip
@example(70, 140, 300, "fp32", "rows", 1, False, 3, 1.0)
@example(65, 129, 129, "rounded", "contiguous", 2, False, 40, 1.0)
@example(33, 8, 1, "fp16", "transposed", 3, True, 1, 1.0)
@example(3, 5, 0, "fp32", "sliced", 4, True, 1, 0.01)  # where both epsilons of the second moment decide
def test_kernels_equal_the_reference(rows, width, size, kind, layout, seed, fresh, step, grad_scale):
    shapes = ((rows, width), (size,), (width, 1))
    options = dict(fresh=fresh, step=step, grad_scale=grad_scale, weight_decay=[0.125, 0.5, 0.25], lr_scales=[1.0, 0.5, 2.0])
    compare(shapes, kind, seed, layout, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_tiles_and_tiles_cut_off(kind):
    compare(TILES, kind, 1, weight_decay=0.25, clip_threshold=5.0)


def test_moments_in_torchs_shapes_and_tensors_of_any_dimensions():
    compare(((2, 3, 4), (), (0,), (0, 3), (3, 0), (4, 3)), "fp32", fresh=True)
    call, same = Call(((5, 7),)), Call(((5, 7),))
    call.moments[0][0], call.moments[1][0] = call.moments[0][0].view(5, 1), call.moments[1][0].view(1, 7)
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(call.step().values(), same.step().values(), strict=True))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_where_the_flag_is_set(impl, kind):
    call = Call(((5, 40), (12,)), kind)
    call.grads[0][0, 0] = torch.inf
    before = copies(call)
    for flag in (torch.bool, torch.float32):
        call.step(impl, found_nonfinite=torch.ones((), dtype=flag, device=DEVICE))
        assert all(torch.equal(t, before[name]) for name, t in call.written().items())
    call.grads[0][0, 0] = 1.0
    call.step(impl, found_nonfinite=torch.zeros((), dtype=torch.bool, device=DEVICE))
    assert not any(torch.equal(t, before[name]) for name, t in call.written().items())


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_numbers_may_lie_on_the_device(impl):
    calls = [Call(((5, 40), (12,)), "rounded", lr_scales=[1.0, 0.5]) for _ in range(2)]
    numbers = {name: torch.tensor(float(calls[1].options[name]), device=DEVICE) for name in ("lr", "step", "grad_scale")}
    first = calls[0].step(impl)
    second = calls[1].step(impl, **numbers, seed=torch.tensor(7, device=DEVICE), found_nonfinite=torch.tensor(False, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_one_set_of_launches_serves_every_tensor_of_the_same_dtypes():
    call = Call(((3, 5), (7,), (70, 3)))
    call.grads[1] = call.grads[1].half()
    before = Counter(launches)
    call.step()
    assert launches - before == Counter({**{name: 2 * count for name, count in SIX.items()}, "_adafactor_moments_kernel": 1})


def test_the_same_bits_twice():
    def step():
        return tuple(Call(((70, 20), (300,))).step().values())

    repeatable(step, times=1)


def test_bad_arguments_are_named():
    call = Call(((3, 4), (5,)))
    row, col, variance = call.moments
    for moments in ((row, [None, None], variance), ([*reversed(row)], col, variance), (row, col, [None, variance[1][:4]]), (row, row, variance)):
        with pytest.raises(ValueError, match=r"needs a variance of its shape, or"):
            adafactor_(call.params, call.grads, *moments, lr=0.1, step=1)
    for name, value in dict(lr_scales=[1.0], weight_decay=[0.1] * 3, counter_starts=[1]).items():
        with pytest.raises(ValueError, match=f"{len(value)} {name} for 2 params"):
            call.step("reference", **{name: value})
    with pytest.raises(ValueError, match="1 grads for 2 params"):
        adafactor_(call.params, call.grads[:1], *call.moments, lr=0.1, step=1)
    with pytest.raises(ValueError, match="shapes of grads"):
        adafactor_(call.params, call.grads[::-1], *call.moments, lr=0.1, step=1)
    with pytest.raises(ValueError, match=r"must be torch\.float32, or moments bfloat16, not torch\.float64"):
        adafactor_(call.params, call.grads, row, col, [None, variance[1].double()], lr=0.1, step=1)
    with pytest.raises(ValueError, match=r"of one matrix must be of one dtype"):
        adafactor_(call.params, call.grads, row, [col[0].bfloat16(), None], variance, lr=0.1, step=1)
    for kind, seed in (("fp16", 1), ("bf16", None)):
        narrow = Call(((3, 4),), kind)
        narrow.masters = None
        with pytest.raises(ValueError, match="need masters"):
            narrow.step(seed=seed, counter_starts=[0])
    call.params[0] = call.params[0].T.contiguous().T
    with pytest.raises(ValueError, match="must be contiguous"):
        call.step()
    call.step("auto")
    with pytest.raises(RuntimeError, match="no Triton kernel"):
        Call(((3, 4),), wide=torch.float64).step()
    adafactor_([], [], [], [], [], lr=0.1, step=1)


@on_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_large(kind):
    compare(((4096, 4096), (50_257, 768), (2, 1_000_003), (1_000_003, 2), (1_000_003,), (768, 50_257)), kind, fresh=True)


@on_gpu
def test_offsets_past_2_to_the_31():
    """Both ends of a matrix of 2.3e9 elements move as those of a small one with the same rows."""
    rows, width = 70_000, 32_768
    small, call = Call(((2, width),), "rounded"), Call(((2, width),), "rounded")
    large = [t[0].new_empty(rows, width) for t in (call.params, call.grads)]
    for big, little in zip(large, (call.params[0], call.grads[0]), strict=True):
        big.view(rows // 2, 2, width).copy_(little)
    call.params, call.grads, call.moments[0] = [large[0]], [large[1]], [call.moments[0][0].repeat(rows // 2)]
    want, got = small.step(), call.step()
    torch.testing.assert_close(got["row 0"][-2:], want["row 0"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got["column 0"], want["column 0"], rtol=1e-4, atol=1e-6)
    for ends in (got["param 0"][:2], got["param 0"][-2:]):
        torch.testing.assert_close(ends.float(), want["param 0"].float(), rtol=2e-2, atol=2e-2)
