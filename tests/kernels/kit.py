"""How a Triton kernel is proven: `check` runs it against its reference, forward and every gradient.

On a machine without a GPU kernels run in Triton's interpreter, in fp32 and fp16 (bf16 is silently wrong there); on a GPU the same tests run
on it, in bf16 too. What a test gives `check` it gives as plain tensors; the kit sees to the rest:

- inputs lie in storage whose other elements are NaN, in the layout asked for (`LAYOUTS`), so that a read out of bounds is seen;
- torch.empty and its kin give NaN with guard zones around, so that an element not written, or written out of bounds, is seen;
- upstream gradients differ from element to element and lie in a layout too;
- the kernels launched are counted, inputs and upstream gradients must keep their bits;
- errors are measured against the reference in float64, and may be twice those of the reference in the same dtype, and the rounding of one
  result more.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from nanotrain.kernels.runtime import launches

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if DEVICE.type == "cuda" else ()))
LAYOUTS = ("contiguous", "rows", "sliced", "transposed")
"""In memory: one after another; rows apart, as halves of a fused projection are; every other element; dimensions in reverse order."""

on_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="gpu: needs CUDA")

_GUARD = 1 << 14
"""Elements of NaN before and after each tensor."""


def drawn(examples: int):
    """Settings of a test whose shapes hypothesis draws: the same draws each time, so that a red run can be repeated."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, report_multiple_bugs=False)


dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 1 << 16)


def values(shape, seed: int, dtype=torch.float32) -> torch.Tensor:
    """Normal numbers on the device, whose rows have scales of 0.01, 1 and 8, so that an epsilon matters and so does an overflow."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if x.dim() > 1:
        x *= torch.tensor([1.0, 0.01, 8.0])[torch.randint(3, (*x.shape[:-1], 1), generator=generator)]
    return x.to(DEVICE, dtype)


def place(tensor: torch.Tensor, layout: str = "contiguous") -> torch.Tensor:
    """The same values in another layout, in storage that is NaN elsewhere."""
    order = range(tensor.dim()) if layout == "transposed" else reversed(range(tensor.dim()))
    strides, stride = [0] * tensor.dim(), 2 if layout == "sliced" else 1
    for step, dimension in enumerate(order):
        strides[dimension] = stride
        stride *= max(1, tensor.shape[dimension]) + (16 if layout == "rows" and step == 0 else 0)
    placed = _guarded(tensor.shape, strides, tensor.dtype, tensor.device)[1]
    return placed.copy_(tensor)


def far(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the rows of the first dimension 2^30 + 16 elements apart, so that offsets of the third pass 2^31.

    The memory between is never touched, and so never committed on a CPU.
    """
    stride = (1 << 30) + 16
    storage = torch.empty(stride * (tensor.shape[0] - 1) + tensor[0].numel(), dtype=tensor.dtype, device=tensor.device)
    return storage.as_strided(tensor.shape, (stride, *tensor[0].contiguous().stride())).copy_(tensor)


def _guarded(shape, strides, dtype, device):
    """(storage, tensor in the middle of it), all NaN, or the largest number of an integer dtype."""
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    poison = float("nan") if dtype.is_floating_point else 1 if dtype == torch.bool else torch.iinfo(dtype).max
    storage = torch.full((extent + 2 * _GUARD,), poison, dtype=dtype, device=device)
    return storage, storage.as_strided(tuple(shape), tuple(strides), _GUARD)


def _intact(storage: torch.Tensor) -> bool:
    guards = torch.cat([storage[:_GUARD], storage[-_GUARD:]])
    return bool((guards.isnan() if storage.dtype.is_floating_point else guards == guards[0]).all())


@contextmanager
def poisoned():
    """Within, torch.empty, empty_like, empty_strided and new_empty give NaN; at the end an overwritten guard zone is an AssertionError."""
    storages = []

    def empty_strided(shape, strides, *, dtype=None, device=None, **_):
        storage, tensor = _guarded(shape, strides, dtype or torch.get_default_dtype(), device or "cpu")
        storages.append(storage)
        return tensor

    def empty(*shape, dtype=None, device=None, **_):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return empty_strided(shape, _dense(shape), dtype=dtype, device=device)

    def empty_like(tensor, *, dtype=None, device=None, memory_format=None, **_):
        dense = memory_format == torch.contiguous_format or not _without_gaps(tensor)
        strides = _dense(tensor.shape) if dense else tensor.stride()
        return empty_strided(tensor.shape, strides, dtype=dtype or tensor.dtype, device=device or tensor.device)

    def new_empty(tensor, *shape, dtype=None, device=None, **_):
        return empty(*shape, dtype=dtype or tensor.dtype, device=device or tensor.device)

    with ExitStack() as stack:
        for function in (empty, empty_like, empty_strided):
            stack.enter_context(mock.patch.object(torch, function.__name__, function))
        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", new_empty))
        yield
    assert all(map(_intact, storages)), "a kernel wrote outside of its output"


def _dense(shape) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(1, size))
    return tuple(reversed(strides)) if shape else ()


def _without_gaps(tensor: torch.Tensor) -> bool:
    """Whether torch.empty_like keeps the strides: no gaps, no overlaps, in some order of the dimensions."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def check(
    op, reference, tensors: dict[str, torch.Tensor], kernels: dict[str, int], *, layout: str = "contiguous", changed: tuple[str, ...] = (), usual=None
):
    """Fail unless op(**tensors) launches `kernels` {name: times} and agrees with reference(**tensors), forward and in every gradient.

    Gradients are taken of every floating-point tensor; the first output's upstream gradient lies in `layout`, others' in other ones. Inputs
    named in `changed` are ones that the op may overwrite. `usual` computes in the tensors' dtype as PyTorch usually does, where the reference
    computes in a wider one. Each function returns a tensor or a tuple of tensors.
    """
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    before = Counter(launches)
    with poisoned():
        outs, ups, grads = _run(op, tensors, layout)
    found = {name: count for name, count in (launches - before).items() if name.endswith("_kernel")}
    assert found == kernels, f"launched {found}, not {kernels}"
    for name, tensor in tensors.items():
        assert name in changed or torch.equal(_bits(tensor), _bits(kept[name])), f"{name} was overwritten"
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in kept.items()}
    exact, exact_grads = _run(reference, wide, layout, ups)[::2]
    plain, plain_grads = _run(usual or reference, kept, layout, ups)[::2]
    for index, (got, want, same) in enumerate(zip(outs, exact, plain, strict=True)):
        agree(got, want, same, f"output {index}")
    for name, got in grads.items():
        agree(got, exact_grads[name], plain_grads[name], f"gradient of {name}")


def agree(got: torch.Tensor, exact: torch.Tensor, same: torch.Tensor, what: str) -> None:
    """Fail where the error against `exact` (float64), in its largest element or in the mean of squares, is more than twice that of `same`.

    To that comes, for where `same` is right by luck, two roundings of the largest element.
    """
    assert got.shape == exact.shape and got.dtype == same.dtype, f"{what}: {tuple(got.shape)} {got.dtype}, not {tuple(exact.shape)} {same.dtype}"
    if not got.numel():
        return
    eps = torch.finfo(got.dtype).eps
    assert got.isfinite().all() or not same.isfinite().all(), f"{what}: not finite"
    for measure in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
        error, usual, size = measure(got.double() - exact), measure(same.double() - exact), measure(exact)
        assert not error > 2 * usual + 2 * eps * size, f"{what}: error {error:.3g}, that of PyTorch {usual:.3g}, size {size:.3g}"


def _run(function, tensors, layout, ups=None):
    """(outputs, upstream gradients, gradients by name) of one call."""
    leaves = {name: t.detach().requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}
    outs = function(**leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if ups is None:
        others = (LAYOUTS[(LAYOUTS.index(layout) + i) % len(LAYOUTS)] for i in range(len(outs)))
        ups = [place(values(out.shape, 1000 + i, out.dtype), layout) for i, (out, layout) in enumerate(zip(outs, others, strict=True))]
    else:
        ups = [up.to(out.dtype) for up, out in zip(ups, outs, strict=True)]
    kept = [up.clone() for up in ups]
    grads = torch.autograd.grad(outs, list(wanted.values()), ups)
    assert all(torch.equal(up, copy) for up, copy in zip(ups, kept, strict=True)), "an upstream gradient was overwritten"
    return [out.detach() for out in outs], ups, dict(zip(wanted, grads, strict=True))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor such that NaNs are equal to themselves."""
    return tensor.nan_to_num(nan=12345.0) if tensor.is_floating_point() else tensor


def repeatable(function, times: int = 3) -> None:
    """Fail unless calls of function() give the same bits; it returns tensors."""
    first = [tensor.clone() for tensor in function()]
    for _ in range(times):
        assert all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, function(), strict=True)), "a second call gave other bits"
