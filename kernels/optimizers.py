"""AdamW and Lion over lists of tensors, in place, in one call, and the norm of all gradients together.

    adamw_:     m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        g = grad * grad_scale
                p = p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    lion_:      p = p - lr wd p - lr sign(b1 m + (1 - b1) g)        m = b2 m + (1 - b2) g
    grad_norm_: the root of the sum of the squares of all elements

Computed in fp32 (float64 for float64) on the master copy where there is one; an fp16 or bf16 parameter then gets its rounded copy, or
without a master a bf16 parameter is rounded stochastically. bf16 moments are rounded to the nearest, to even in ties.
A kernel is launched once over all tensors, or once for each combination of dtypes among them; grad_norm_ once more, over the sums of tiles.
Bytes in fp32: AdamW reads p, g, m, v and writes p, m, v, 28 for each parameter; Lion 20; the norm reads g, 4.
Sources: Loshchilov and Hutter 2019 (arXiv 1711.05101); Chen et al. 2023 (arXiv 2302.06675).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from nanotrain.kernels.cpu import call, dense
from nanotrain.kernels.multi_tensor import (
    allowed,
    by_dtype,
    each,
    given,
    locate,
    number,
    on_device,
    read,
    tensor_table,
    tile_map,
    write,
    write_weight,
)
from nanotrain.kernels.random import stochastic_round
from nanotrain.kernels.runtime import choose, compute_dtype, has_kernel, jit, launch, tl

EXAMPLES = ((7,), (33, 5), (1,), (64, 64))
"""Shapes that tests and benchmarks share."""

_TILE, _BLOCK = 4096, 512
"""Elements of a program of an update, and those of them in flight, with 4 warps. 4 elements a thread are one access to each tensor, of 16 bytes
in fp32; of 8, an access of 16 bytes to bf16, Triton would turn the layout of every fp32 result in shared memory. Registers are left for 8 to 10
programs on a multiprocessor, which have 40 to 80 KB in flight. Tiles of 8 blocks pay for the look-up of their tensor."""

_NORM_TILE, _NORM_BLOCK = 16384, 2048
"""Those of the norm, which holds one tensor instead of four."""

_SUM_BLOCK = 8192
"""Sums of tiles that the norm's last program, alone on the device, adds at once, with 16 warps."""


def _rates(lr, lr_scales, weight_decay, count: int) -> list[tuple[Sequence[int], float | torch.Tensor, float]]:
    """[(indices, lr, weight decay)]: the tensors that share both."""
    if lr_scales is None and not isinstance(weight_decay, Sequence):
        return [(range(count), lr, weight_decay)]
    groups: dict[tuple[float, float], list[int]] = {}
    for index, pair in enumerate(zip(each(lr_scales, count), each(weight_decay, count), strict=True)):
        groups.setdefault(pair, []).append(index)
    return [(indices, lr * scale, decay) for (scale, decay), indices in groups.items()]


def adamw_reference(
    params, grads, exp_avgs, exp_avg_sqs, *, lr, betas, eps, weight_decay, step, lr_scales=None, grad_scale=None, found_nonfinite=None,
    masters=None, seed=None, counter_starts=None,
):  # fmt: skip
    """AdamW through torch's own fused operator, in the master copies' dtype."""
    dtype, device = compute_dtype(*params), params[0].device
    step = torch.as_tensor(step, dtype=torch.float32, device=device)
    found = None if found_nonfinite is None else torch.as_tensor(found_nonfinite, dtype=torch.float32, device=device)
    scale = None if found is None else torch.ones((), device=device)
    for indices, rate, decay in _rates(lr, lr_scales, weight_decay, len(params)):
        narrow, gradients, firsts, seconds = ([tensors[i] for i in indices] for tensors in (params, grads, exp_avgs, exp_avg_sqs))
        wide = [masters[i] for i in indices] if masters is not None else [p if p.dtype == dtype else p.to(dtype) for p in narrow]
        gradients = [g.to(dtype) if grad_scale is None else g.to(dtype) * grad_scale for g in gradients]
        averages = [m if m.dtype == dtype else m.to(dtype) for m in (*firsts, *seconds)]
        torch._fused_adamw_(
            wide, gradients, averages[: len(indices)], averages[len(indices) :], [], [step] * len(indices), lr=rate, beta1=betas[0],
            beta2=betas[1], weight_decay=decay, eps=eps, amsgrad=False, maximize=False, grad_scale=scale, found_inf=found,
        )  # fmt: skip
        for moment, average in zip((*firsts, *seconds), averages, strict=True):
            if moment is not average:
                moment.copy_(average)
        for index, p, w in zip(indices, narrow, wide, strict=True):
            if p is w:
                continue
            rounded = w
            if masters is None and seed is not None:
                rounded = stochastic_round(w, p.dtype, seed, counter_starts[index] if counter_starts is not None else 0)
            # Without a master the parameter is the only copy: where the step is refused its bits must stay.
            p.copy_(rounded if found is None or masters is not None else torch.where(found.bool(), p, rounded.to(p.dtype)))


def lion_reference(
    params, grads, exp_avgs, *, lr, betas, weight_decay, lr_scales=None, grad_scale=None, found_nonfinite=None, masters=None, seed=None,
    counter_starts=None,
):  # fmt: skip
    """Lion in plain PyTorch, tensor after tensor, without waiting for the device."""
    dtype = compute_dtype(*params)
    found = None if found_nonfinite is None else torch.as_tensor(found_nonfinite, device=params[0].device).bool()
    for indices, rate, decay in _rates(lr, lr_scales, weight_decay, len(params)):
        for index in indices:
            p, m, g = params[index], exp_avgs[index].to(dtype), grads[index].to(dtype)
            weight = p if masters is None else masters[index]
            g = g if grad_scale is None else g * grad_scale
            moved = weight.to(dtype) * (1 - rate * decay) - rate * (betas[0] * m + (1 - betas[0]) * g).sign()
            mean = betas[1] * m + (1 - betas[1]) * g
            if masters is None and p.dtype != dtype:
                moved = stochastic_round(moved, p.dtype, seed, counter_starts[index])
            weight.copy_(moved if found is None else torch.where(found, weight, moved))
            exp_avgs[index].copy_(mean if found is None else torch.where(found, m, mean))
            if masters is not None:
                p.copy_(weight)


def grad_norm_reference(grads):
    """The norm of the tensors' norms, in fp32 (float64 for float64)."""
    dtype = compute_dtype(*grads)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=dtype) for g in grads]))


@jit
def _adamw_kernel(
    table, tiles, lr, step, grad_scale, found, seed, beta1, rest1, log_beta1, beta2, rest2, log_beta2, eps,
    DTYPES: tl.constexpr, HAS_MASTERS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one tensor.

    Its row, and DTYPES of the first five: addresses of weight (the master, or the parameter), grad, m, v and parameter; numel, counter, lr scale
    and decay.
    """
    tensor, tile = locate(tiles)
    row = table + tensor * 9
    weight, grad, first, second, param = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    size, counter = allowed(tl.load(row + 5), found), tl.load(row + 6)
    scale, noise = given(grad_scale, 1.0, tl.float32), given(seed, 0, tl.int64)
    rate = tl.load(lr).to(tl.float32) * number(row + 7)
    decay = rate * number(row + 8)
    time = tl.load(step)
    rate = rate / _unbiased(time, log_beta1)
    spread = 1.0 / tl.sqrt_rn(_unbiased(time, log_beta2))
    tensors = (weight, grad, first, second, param)
    numbers = (scale, beta1, rest1, beta2, rest2, eps, rate, decay, spread)
    start = tile * TILE
    if (start + TILE <= size) & (((weight | grad | first | second | param) & 15) == 0):
        for offset in range(0, TILE, BLOCK):
            _adamw_block(tensors, start + offset + tl.arange(0, BLOCK), size, counter, noise, numbers, DTYPES, HAS_MASTERS, True)
    else:
        for offset in range(0, tl.minimum(size - start, TILE).to(tl.int32), BLOCK):
            _adamw_block(tensors, start + offset + tl.arange(0, BLOCK), size, counter, noise, numbers, DTYPES, HAS_MASTERS, False)


@jit
def _adamw_block(tensors, index, size, counter, noise, numbers, DTYPES: tl.constexpr, HAS_MASTERS: tl.constexpr, WHOLE: tl.constexpr):
    weight, grad, first, second, param = tensors
    scale, beta1, rest1, beta2, rest2, eps, rate, decay, spread = numbers
    # Named, for Triton 3.6 takes a tuple's strings for no constants.
    WEIGHT: tl.constexpr = DTYPES[0]
    GRAD: tl.constexpr = DTYPES[1]
    FIRST: tl.constexpr = DTYPES[2]
    SECOND: tl.constexpr = DTYPES[3]
    PARAM: tl.constexpr = DTYPES[4]
    mask = index < size
    w = read(weight, index, mask, WEIGHT, WHOLE)
    g = read(grad, index, mask, GRAD, WHOLE) * scale
    m = beta1 * read(first, index, mask, FIRST, WHOLE) + rest1 * g
    v = beta2 * read(second, index, mask, SECOND, WHOLE) + rest2 * g * g
    w -= decay * w + rate * m / (tl.sqrt(v) * spread + eps)
    write(first, index, m, mask, FIRST, WHOLE)
    write(second, index, v, mask, SECOND, WHOLE)
    write_weight(weight, param, index, w, mask, noise, counter, WEIGHT, PARAM, HAS_MASTERS, WHOLE)


@jit
def _lion_kernel(
    table, tiles, lr, grad_scale, found, seed, beta1, rest1, beta2, rest2,
    DTYPES: tl.constexpr, HAS_MASTERS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one tensor; rows and DTYPES as those of _adamw_kernel, without v."""
    tensor, tile = locate(tiles)
    row = table + tensor * 8
    weight, grad, first, param = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    size, counter = allowed(tl.load(row + 4), found), tl.load(row + 5)
    scale, noise = given(grad_scale, 1.0, tl.float32), given(seed, 0, tl.int64)
    rate = tl.load(lr).to(tl.float32) * number(row + 6)
    decay = rate * number(row + 7)
    tensors = (weight, grad, first, param)
    numbers = (scale, beta1, rest1, beta2, rest2, rate, decay)
    start = tile * TILE
    if (start + TILE <= size) & (((weight | grad | first | param) & 15) == 0):
        for offset in range(0, TILE, BLOCK):
            _lion_block(tensors, start + offset + tl.arange(0, BLOCK), size, counter, noise, numbers, DTYPES, HAS_MASTERS, True)
    else:
        for offset in range(0, tl.minimum(size - start, TILE).to(tl.int32), BLOCK):
            _lion_block(tensors, start + offset + tl.arange(0, BLOCK), size, counter, noise, numbers, DTYPES, HAS_MASTERS, False)


@jit
def _lion_block(tensors, index, size, counter, noise, numbers, DTYPES: tl.constexpr, HAS_MASTERS: tl.constexpr, WHOLE: tl.constexpr):
    weight, grad, first, param = tensors
    scale, beta1, rest1, beta2, rest2, rate, decay = numbers
    WEIGHT: tl.constexpr = DTYPES[0]
    GRAD: tl.constexpr = DTYPES[1]
    FIRST: tl.constexpr = DTYPES[2]
    PARAM: tl.constexpr = DTYPES[3]
    mask = index < size
    w = read(weight, index, mask, WEIGHT, WHOLE)
    g = read(grad, index, mask, GRAD, WHOLE) * scale
    m = read(first, index, mask, FIRST, WHOLE)
    turn = beta1 * m + rest1 * g
    w -= decay * w + tl.where(turn > 0, rate, tl.where(turn < 0, -rate, 0.0))
    write(first, index, beta2 * m + rest2 * g, mask, FIRST, WHOLE)
    write_weight(weight, param, index, w, mask, noise, counter, WEIGHT, PARAM, HAS_MASTERS, WHOLE)


@jit
def _unbiased(time, log_beta):
    """1 - beta^time, of log2 beta.

    In float64: fp32 would round beta^time near 1 and the difference lose what it has, a relative 3e-5 for beta 0.999 at the first step. What
    rounding log2 beta to fp32 costs is at most half of an fp32 rounding: y / (e^y - 1) <= 1 times that of y = time * ln(1 / beta).
    """
    return (1.0 - tl.exp2(time.to(tl.float64) * log_beta)).to(tl.float32)


@jit
def _square_sum_kernel(table, tiles, sums, GRAD: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares of one tile of one tensor. Its row: address, numel."""
    tensor, tile = locate(tiles)
    grad, size = tl.load(table + tensor * 2), tl.load(table + tensor * 2 + 1)
    start = tile * TILE
    total = tl.zeros((BLOCK,), tl.float32)
    if (start + TILE <= size) & ((grad & 15) == 0):
        for offset in range(0, TILE, BLOCK):
            index = start + offset + tl.arange(0, BLOCK)
            g = read(grad, index, index < size, GRAD, True)
            total += g * g
    else:
        for offset in range(0, tl.minimum(size - start, TILE).to(tl.int32), BLOCK):
            index = start + offset + tl.arange(0, BLOCK)
            g = read(grad, index, index < size, GRAD, False)
            total += g * g
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@jit
def _norm_kernel(sums, norm, count, BLOCK: tl.constexpr):
    """The root of the sum of all sums, by one program, always in the same order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(sums + index, index < count, 0.0)
    tl.store(norm, tl.sqrt_rn(tl.sum(total, 0)))


def _dense(grads) -> list[torch.Tensor]:
    return [g if g.is_contiguous() and not g.is_neg() else dense(g) for g in grads]


def _update(kernel, params, grads, moments, scalars, numbers, *, weight_decay, lr_scales, found_nonfinite, masters, seed, counter_starts):
    """Launch a kernel over all tensors; `scalars` are numbers or device tensors, read on the device, `numbers` the kernel's own."""
    device, count = params[0].device, len(params)
    scalars = [on_device(value, device) for value in (*scalars, found_nonfinite)]
    seed = on_device(seed if masters is None else None, device, torch.int64)
    columns = (params if masters is None else masters, _dense(grads), *moments, params)
    counters, scales, decays = counter_starts or [0] * count, each(lr_scales, count), each(weight_decay, count)
    for dtypes, indices in by_dtype(columns).items():
        picked = [[column[i] for i in indices] for column in columns]
        sizes = [params[i].numel() for i in indices]
        table = tensor_table(picked, [sizes, [counters[i] for i in indices]], [[scales[i] for i in indices], [decays[i] for i in indices]])
        tiles = tile_map([-(-size // _TILE) for size in sizes], device)
        if len(tiles):
            launch(kernel, (len(tiles),), table, tiles, *scalars, seed, *numbers, DTYPES=dtypes, HAS_MASTERS=masters is not None, TILE=_TILE,
                   BLOCK=_BLOCK, num_warps=4)  # fmt: skip


def _norm(grads) -> torch.Tensor:
    grads, device = _dense(grads), grads[0].device
    groups = by_dtype([grads])
    counts = {dtypes: [-(-grads[i].numel() // _NORM_TILE) for i in indices] for dtypes, indices in groups.items()}
    sums = torch.empty(sum(map(sum, counts.values())), dtype=torch.float32, device=device)
    norm, first = torch.empty((), dtype=torch.float32, device=device), 0
    for dtypes, indices in groups.items():
        if programs := sum(counts[dtypes]):
            table = tensor_table([[grads[i] for i in indices]], [[grads[i].numel() for i in indices]])
            tiles = tile_map(counts[dtypes], device)
            launch(_square_sum_kernel, (programs,), table, tiles, sums[first : first + programs], GRAD=dtypes[0], TILE=_NORM_TILE, BLOCK=_NORM_BLOCK,
                   num_warps=4)  # fmt: skip
            first += programs
    launch(_norm_kernel, (1,), sums, norm, first, BLOCK=_SUM_BLOCK, num_warps=16)
    return norm


def _native(params, grads, exp_avgs, exp_avg_sqs, *, lr, betas, eps, weight_decay, step, lr_scales, grad_scale, found_nonfinite, masters):
    if found_nonfinite is not None and bool(found_nonfinite):
        return
    (beta1, beta2), step, lr, scale = betas, float(step), float(lr), 1.0 if grad_scale is None else float(grad_scale)
    bias, unbias = 1 - beta1**step, (1 - beta2**step) ** -0.5
    for indices, rate, decay in _rates(lr, lr_scales, weight_decay, len(params)):
        numbers = (scale, beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - rate * decay, rate / bias, unbias)
        for i in indices:
            p, g = params[i], grads[i]
            w = p if masters is None else masters[i]
            call("adamw" if g.dtype == p.dtype else "adamw_wide", p.dtype, p, w, dense(g), exp_avgs[i], exp_avg_sqs[i], p.numel(), *numbers)


def _has_native(params, grads, written, masters):
    """Whether one pass can make the step: all that is written lies in memory in order, fp32 but for params that have masters."""
    wide = all(t.dtype == torch.float32 for t in written) and (masters is not None or all(p.dtype == torch.float32 for p in params))
    gradients = all(g.dtype in (p.dtype, torch.float32) for p, g in zip(params, grads, strict=True))
    return wide and gradients and all(t.is_contiguous() for t in (*params, *written))


def _has_triton(op, impl, params, grads, moments, masters):
    """Whether the kernel serves the dtypes, and all that is written lies in memory in order; asked for by name it says what does not."""
    written = {"params": params, **moments} | ({} if masters is None else {"masters": masters})
    if not all(map(torch.Tensor.is_contiguous, chain(*written.values()))):
        if impl == "triton":
            gap = next(f"{name}[{i}]" for name, tensors in written.items() for i, t in enumerate(tensors) if not t.is_contiguous())
            raise ValueError(f"{op}: {gap} is not contiguous, as impl='triton' needs; use impl='auto'")
        return False
    dtypes = [{t.dtype for t in tensors} for tensors in ((*params, *grads), chain(*moments.values()), masters or ())]
    half = {torch.float16, torch.bfloat16}
    return dtypes[0] <= {torch.float32, *half} and dtypes[1] <= {torch.float32, torch.bfloat16} and dtypes[2] <= {torch.float32}


def _check(op, params, grads, moments, masters, seed, counter_starts, lr_scales, weight_decay):
    """Raise ValueError for arguments that do not fit each other."""
    lists = {"grads": grads, **moments} | ({} if masters is None else {"masters": masters})
    shapes = [p.shape for p in params]
    for name, tensors in lists.items():
        if [t.shape for t in tensors] != shapes:
            raise ValueError(f"{op}: the shapes of {name} differ from those of params")
    for name, numbers in {"lr_scales": lr_scales, "weight_decay": weight_decay, "counter_starts": counter_starts}.items():
        if isinstance(numbers, Sequence) and len(numbers) != len(params):
            raise ValueError(f"{op}: {len(numbers)} {name} for {len(params)} params")
    narrow = {p.dtype for p in params} & {torch.bfloat16, torch.float16}
    if masters is None and narrow:
        if seed is None or counter_starts is None or torch.float16 in narrow:
            raise ValueError(f"{op}: low-precision params need masters, or (bf16 only) seed and counter_starts")


def adamw_(
    params, grads, exp_avgs, exp_avg_sqs, *, lr, betas, eps, weight_decay, step, lr_scales=None, grad_scale=None, found_nonfinite=None,
    masters=None, seed=None, counter_starts=None, impl="auto",
):  # fmt: skip
    """One AdamW step over lists of tensors of equal shapes, in place.

    lr, step, grad_scale  numbers or device tensors; `step` is this update's number from 1; gradients are multiplied by grad_scale
    lr_scales             a factor of lr for each tensor; None is ones
    weight_decay          a number, or one for each tensor [per step, times its rate]
    found_nonfinite       device tensor: where it is true nothing at all is written
    masters               fp32 copies of lower-precision params, updated; the params become their rounded copies
    seed, counter_starts  without masters, bf16 params are rounded stochastically, element i of tensor n keyed on
                          (seed, counter_starts[n] + i); needs counter_starts, so that no two tensors share their noise; a number or tensor

    Raises ValueError for lists that do not match in length, shape or device, for low-precision params without masters (or, bf16, a seed),
    and with impl="triton" for params, moments or masters that are not contiguous.
    """
    moments = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check("adamw_", params, grads, moments, masters, seed, counter_starts, lr_scales, weight_decay)
    if not params:
        return
    written = (*exp_avgs, *exp_avg_sqs, *(masters or ()))
    native = params[0].device.type == "cpu" and _has_native(params, grads, written, masters)
    triton = _has_triton("adamw_", impl, params, grads, moments, masters)
    chosen = choose("adamw_", impl, *params, *grads, *written, triton=triton, native=native)
    options = dict(weight_decay=weight_decay, lr_scales=lr_scales, found_nonfinite=found_nonfinite, masters=masters)
    if chosen == "triton":
        (beta1, beta2), logs = betas, [math.log2(beta) if beta else -math.inf for beta in betas]
        numbers = (beta1, 1 - beta1, logs[0], beta2, 1 - beta2, logs[1], eps)
        return _update(_adamw_kernel, params, grads, (exp_avgs, exp_avg_sqs), (lr, step, grad_scale), tuple(map(float, numbers)), **options,
                       seed=seed, counter_starts=counter_starts)  # fmt: skip
    options |= dict(lr=lr, betas=betas, eps=eps, step=step, grad_scale=grad_scale)
    if chosen == "native":
        return _native(params, grads, exp_avgs, exp_avg_sqs, **options)
    adamw_reference(params, grads, exp_avgs, exp_avg_sqs, **options, seed=seed, counter_starts=counter_starts)


def lion_(
    params, grads, exp_avgs, *, lr, betas, weight_decay, lr_scales=None, grad_scale=None, found_nonfinite=None, masters=None, seed=None,
    counter_starts=None, impl="auto",
):  # fmt: skip
    """One Lion step over lists of tensors of equal shapes, in place; arguments and errors are those of `adamw_`."""
    _check("lion_", params, grads, {"exp_avgs": exp_avgs}, masters, seed, counter_starts, lr_scales, weight_decay)
    if not params:
        return
    served = _has_triton("lion_", impl, params, grads, {"exp_avgs": exp_avgs}, masters)
    options = dict(weight_decay=weight_decay, lr_scales=lr_scales, found_nonfinite=found_nonfinite, masters=masters, seed=seed,
                   counter_starts=counter_starts)  # fmt: skip
    if choose("lion_", impl, *params, *grads, *exp_avgs, *(masters or ()), triton=served) == "triton":
        numbers = [float(number) for beta in betas for number in (beta, 1 - beta)]
        return _update(_lion_kernel, params, grads, (exp_avgs,), (lr, grad_scale), numbers, **options)
    lion_reference(params, grads, exp_avgs, lr=lr, betas=betas, grad_scale=grad_scale, **options)


def grad_norm_(grads, *, impl="auto") -> torch.Tensor:
    """The L2 norm of all elements of a list of tensors together, 0-d in fp32 (float64 for float64), on their device; the same bits each time.

    Raises ValueError for an empty list and for tensors on different devices.
    """
    if not grads:
        raise ValueError("grad_norm_: no grads")
    if choose("grad_norm_", impl, *grads, triton=has_kernel(*grads)) == "triton":
        return _norm(grads)
    return grad_norm_reference(grads)


def cost(shape, dtype, moments=2) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one step of adamw_ (lion_: one moment) over a tensor of `shape` and its gradient in `dtype`, moments in fp32."""
    elements = torch.Size(shape).numel()
    return (3 * dtype.itemsize + 8 * moments) * elements, (15 if moments == 2 else 9) * elements
