"""Adafactor over lists of tensors, in place, in one call: a second moment kept as one number per row and one per column.

    R = b R + (1 - b) mean over columns of g^2      C = b C + (1 - b) mean over rows of g^2      1 - b = t^decay
    V = R C / max(mean R, eps1)                     u = g / sqrt(max(V, eps1^2))
    p = p (1 - lr wd) - min(lr, 1 / sqrt(t)) max(eps2, RMS(p)) u / max(1, RMS(u) / clip)

g is grad * grad_scale. A tensor of one dimension keeps its whole second moment V. Computed in fp32 (float64 for float64) on the master copy
where there is one; a bf16 parameter then gets its rounded copy, or without a master is rounded stochastically.
Source: Shazeer and Stern 2018 (arXiv 1804.04235), with the rate, the decay and the epsilons of torch.optim.Adafactor; eps1 is that of the dtype
computed in.
"""

from __future__ import annotations

import torch
from nanotrain.kernels.random import stochastic_round
from nanotrain.kernels.runtime import choose, compute_dtype

EXAMPLES = ((7,), (33, 5), (1,), (64, 64))
"""Shapes that tests and benchmarks share."""


def adafactor_reference(
    params, grads, row_vars, col_vars, variances, *, lr, step, beta2_decay=-0.8, eps=(None, 1e-3), clip_threshold=1.0, weight_decay=0.0,
    lr_scales=None, grad_scale=None, found_nonfinite=None, masters=None, seed=None, counter_starts=None,
):  # fmt: skip
    """Adafactor in plain PyTorch, tensor after tensor, without waiting for the device."""
    dtype, device = compute_dtype(*params), params[0].device
    lr, step = _number(lr, dtype, device), _number(step, dtype, device)
    found = torch.zeros((), dtype=torch.bool, device=device) if found_nonfinite is None else found_nonfinite.bool()
    finfo = torch.finfo(dtype)
    eps1 = finfo.eps if eps[0] is None else eps[0]
    mix = step**beta2_decay
    for index, p in enumerate(params):
        if not p.numel():
            continue
        weight = p if masters is None else masters[index]
        wide, g = weight.to(dtype), grads[index].to(dtype)
        g = g if grad_scale is None else g * grad_scale
        rate = lr if lr_scales is None else lr * lr_scales[index]
        decay = weight_decay if isinstance(weight_decay, (int, float)) else weight_decay[index]
        size = wide.square().mean().sqrt().clamp(min=eps[1]) * torch.minimum(rate, step.rsqrt())
        square = g.square()
        if row_vars[index] is None:
            moments = {variances[index]: square}
        else:
            moments = {row_vars[index]: square.mean(1), col_vars[index]: square.mean(0)}
        moved = [old.lerp(new.view(old.shape), mix) for old, new in moments.items()]
        if len(moved) == 1:
            variance = moved[0]
        else:
            row, col = (moment.flatten() for moment in moved)
            variance = (row / row.mean().clamp(min=eps1))[:, None] * col
        # The square of a small epsilon may be 0, and so would be the root of a variance of 0.
        update = g * variance.clamp(min=max(eps1 * eps1, finfo.tiny)).rsqrt()
        size = size / (update.square().mean().sqrt() / clip_threshold).clamp(min=1.0)
        wide = torch.where(found, wide, wide * (1 - rate * decay) - size * update)
        for old, new in zip(moments, moved, strict=True):
            old.copy_(torch.where(found, old, new))
        if masters is None and p.dtype != dtype:  # of a value that bf16 can hold, as one refused is, rounding changes no bit
            wide = stochastic_round(wide, p.dtype, seed, counter_starts[index])
        weight.copy_(wide)
        if masters is not None:
            p.copy_(weight)


def _number(value, dtype, device):
    """A number or a 0-d tensor as a tensor of `dtype`; a number comes to the device without waiting for it."""
    return value.to(dtype) if isinstance(value, torch.Tensor) else torch.full((), value, dtype=dtype, device=device)


def adafactor_(
    params, grads, row_vars, col_vars, variances, *, lr, step, beta2_decay=-0.8, eps=(None, 1e-3), clip_threshold=1.0, weight_decay=0.0,
    lr_scales=None, grad_scale=None, found_nonfinite=None, masters=None, seed=None, counter_starts=None, impl="auto",
):  # fmt: skip
    """One Adafactor step over lists of tensors, in place.

    row_vars, col_vars    of each matrix (rows, columns): rows and columns numbers, as (rows,) or (rows, 1) and (columns,) or (1, columns);
                          None where the tensor has a `variance`
    variances             second moments in the tensor's own shape; None of the matrices above
    lr, step, grad_scale  numbers or 0-d device tensors; `step` is this update's number from 1; gradients are multiplied by grad_scale
    beta2_decay           the new square has the weight step^beta2_decay in the second moment
    eps                   (least root of the second moment, or None for the epsilon of fp32; least RMS of a parameter that its step is sized by)
    clip_threshold        largest RMS of an update
    weight_decay          a number or one per tensor
    lr_scales             factors of lr, one per tensor
    found_nonfinite       0-d device tensor: where it is true nothing at all is written
    masters               fp32 copies of lower-precision params, updated; the params become their rounded copies
    seed, counter_starts  without masters, bf16 params are rounded stochastically, element i of tensor n keyed on (seed, counter_starts[n] + i)

    Moments are fp32 (float64 for float64). Raises ValueError for lists that do not match in length, shape or device, for moments of another
    dtype, or for bf16 without masters, seed and counter_starts.
    """
    tensors = _check(params, grads, row_vars, col_vars, variances, masters, seed, counter_starts, weight_decay, lr_scales)
    if not params:
        return
    choose("adafactor_", impl, *tensors)
    adafactor_reference(
        params, grads, row_vars, col_vars, variances, lr=lr, step=step, beta2_decay=beta2_decay, eps=eps, clip_threshold=clip_threshold,
        weight_decay=weight_decay, lr_scales=lr_scales, grad_scale=grad_scale, found_nonfinite=found_nonfinite, masters=masters, seed=seed,
        counter_starts=counter_starts,
    )  # fmt: skip


def _check(params, grads, row_vars, col_vars, variances, masters, seed, counter_starts, weight_decay, lr_scales):
    """All tensors of a call whose arguments fit together; else ValueError."""
    lists = dict(grads=grads, row_vars=row_vars, col_vars=col_vars, variances=variances, masters=masters, lr_scales=lr_scales,
                 counter_starts=counter_starts, weight_decay=None if isinstance(weight_decay, (int, float)) else weight_decay)  # fmt: skip
    for name, values in lists.items():
        if values is not None and len(values) != len(params):
            raise ValueError(f"adafactor_: {len(values)} {name} for {len(params)} params")
    for name in ("grads", "masters"):
        if lists[name] is not None and any(t.shape != p.shape for t, p in zip(lists[name], params, strict=True)):
            raise ValueError(f"adafactor_: the shapes of {name} differ from those of params")
    moments = []
    for p, row, col, variance in zip(params, row_vars, col_vars, variances, strict=True):
        shape = tuple(p.shape)
        whole = variance is not None and row is None and col is None and variance.shape == p.shape
        factored = variance is None and row is not None and col is not None and p.dim() == 2 and (row.numel(), col.numel()) == shape
        if not (whole or factored):
            raise ValueError(f"adafactor_: a tensor of shape {shape} needs a variance of that shape, or if it is a matrix row_vars and col_vars")
        moments += [variance] if whole else [row, col]
    wide = compute_dtype(*params) if params else None
    if any(t.dtype != wide for t in (*moments, *(masters or ()))):
        raise ValueError(f"adafactor_: row_vars, col_vars, variances and masters must be {wide}")
    if masters is None and any(p.dtype != wide for p in params):
        if seed is None or counter_starts is None or any(p.dtype not in (torch.bfloat16, wide) for p in params):
            raise ValueError("adafactor_: low-precision params need masters, or (bf16 only) seed and counter_starts")
    return (*params, *grads, *moments, *(masters or ()))


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one step over a tensor of `shape` with gradients in `dtype`: three passes over those, one and an update of params."""
    elements = torch.Size(shape).numel()
    return 6 * elements * dtype.itemsize, 16 * elements
