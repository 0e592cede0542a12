"""AdamW over lists of tensors, in place, in one call.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        g = grad * grad_scale
    p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Computed in fp32 (float64 for float64) on the master copy where there is one; a bf16 parameter then gets its rounded
copy, or without a master is rounded stochastically. fp32: reads p, g, m, v and writes p, m, v: 28 bytes per parameter.
Source: Loshchilov and Hutter 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

import torch
from nanotrain.kernels.cpu import call, dense
from nanotrain.kernels.random import stochastic_round
from nanotrain.kernels.runtime import choose, compute_dtype

EXAMPLES = ((7,), (33, 5), (1,), (64, 64))
"""Shapes that tests and benchmarks share."""


def adamw_reference(
    params, grads, exp_avgs, exp_avg_sqs, *, lr, betas, eps, weight_decay, step, grad_scale=None, found_nonfinite=None, masters=None, seed=None,
    counter_starts=None,
):  # fmt: skip
    """AdamW through torch's own fused operator, in the master copies' dtype."""
    dtype = compute_dtype(*params)
    wide = list(masters) if masters is not None else [p if p.dtype == dtype else p.to(dtype) for p in params]
    grads = [g.to(dtype) if grad_scale is None else g.to(dtype) * grad_scale for g in grads]
    averages = [m if m.dtype == dtype else m.to(dtype) for m in (*exp_avgs, *exp_avg_sqs)]
    device = params[0].device
    steps = [torch.as_tensor(step, dtype=torch.float32, device=device) for _ in params]
    found = None if found_nonfinite is None else torch.as_tensor(found_nonfinite, dtype=torch.float32, device=device)
    scale = None if found is None else torch.ones((), device=device)
    torch._fused_adamw_(
        wide, grads, averages[: len(params)], averages[len(params) :], [], steps, lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False, grad_scale=scale, found_inf=found,
    )  # fmt: skip
    for narrow, average in zip((*exp_avgs, *exp_avg_sqs), averages, strict=True):
        if narrow is not average:
            narrow.copy_(average)
    for index, (p, w) in enumerate(zip(params, wide, strict=True)):
        if p is w:
            continue
        rounded = w
        if masters is None and seed is not None:
            rounded = stochastic_round(w, p.dtype, seed, counter_starts[index] if counter_starts is not None else 0)
        # Without a master the parameter is the only copy: where the step is refused its bits must stay.
        p.copy_(rounded if found is None or masters is not None else torch.where(found.bool(), p, rounded.to(p.dtype)))


def _native(params, grads, exp_avgs, exp_avg_sqs, *, lr, betas, eps, weight_decay, step, grad_scale, found_nonfinite, masters):
    if found_nonfinite is not None and bool(found_nonfinite):
        return
    (beta1, beta2), step = betas, float(step)
    rate, unbias = float(lr) / (1 - beta1**step), (1 - beta2**step) ** -0.5
    numbers = (1.0 if grad_scale is None else float(grad_scale), beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - float(lr) * weight_decay, rate, unbias)
    for p, w, g, m, v in zip(params, masters or params, grads, exp_avgs, exp_avg_sqs, strict=True):
        call("adamw" if g.dtype == p.dtype else "adamw_wide", p.dtype, p, w, dense(g), m, v, p.numel(), *numbers)


def _has_native(params, grads, written, masters):
    """Whether one pass can make the step: all that is written lies in memory in order, fp32 but for params that have masters."""
    wide = all(t.dtype == torch.float32 for t in written) and (masters is not None or all(p.dtype == torch.float32 for p in params))
    gradients = all(g.dtype in (p.dtype, torch.float32) for p, g in zip(params, grads, strict=True))
    return wide and gradients and all(t.is_contiguous() for t in (*params, *written))


def adamw_(
    params, grads, exp_avgs, exp_avg_sqs, *, lr, betas, eps, weight_decay, step, grad_scale=None, found_nonfinite=None, masters=None, seed=None,
    counter_starts=None, impl="auto",
):  # fmt: skip
    """One AdamW step over lists of tensors of equal shapes, in place.

    lr, step, grad_scale  numbers or device tensors; `step` is this update's number from 1; gradients are multiplied by grad_scale
    found_nonfinite       device tensor: where it is true nothing at all is written
    masters               fp32 copies of lower-precision params, updated; the params become their rounded copies
    seed, counter_starts  without masters, bf16 params are rounded stochastically, element i of tensor n keyed on
                          (seed, counter_starts[n] + i); needs counter_starts, so that no two tensors share their noise

    Raises ValueError for lists that do not match in length, shape or device, or for bf16 without masters or seed.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if masters is not None:
        lists["masters"] = masters
    for name, tensors in lists.items():
        if [t.shape for t in tensors] != [p.shape for p in params]:
            raise ValueError(f"adamw_: the shapes of {name} differ from those of params")
    if not params:
        return
    if masters is None and any(p.dtype in (torch.bfloat16, torch.float16) for p in params):
        if seed is None or counter_starts is None or any(p.dtype != torch.bfloat16 for p in params):
            raise ValueError("adamw_: low-precision params need masters, or (bf16 only) seed and counter_starts")
        if len(counter_starts) != len(params):
            raise ValueError(f"adamw_: {len(counter_starts)} counter_starts for {len(params)} params")
    native = _has_native(params, grads, (*exp_avgs, *exp_avg_sqs, *(masters or ())), masters)
    if choose("adamw_", impl, *params, *(tensor for tensors in lists.values() for tensor in tensors), native=native) == "native":
        return _native(params, grads, exp_avgs, exp_avg_sqs, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step,
                       grad_scale=grad_scale, found_nonfinite=found_nonfinite, masters=masters)  # fmt: skip
    adamw_reference(
        params, grads, exp_avgs, exp_avg_sqs, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step, grad_scale=grad_scale,
        found_nonfinite=found_nonfinite, masters=masters, seed=seed, counter_starts=counter_starts,
    )  # fmt: skip


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one step over an fp32 tensor of `shape`."""
    elements = torch.Size(shape).numel()
    return 28 * elements, 15 * elements
