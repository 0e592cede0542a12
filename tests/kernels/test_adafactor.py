"""adafactor_: the reference against torch.optim.Adafactor."""

from __future__ import annotations

import pytest
import torch
from nanotrain.kernels.adafactor import EXAMPLES, adafactor_

SHAPES = (*EXAMPLES, (5, 70), (0,), (0, 3))


def draw(dtype=torch.float32, shapes=SHAPES, seed=0):
    """(params, grads) with columns and rows of unlike scales."""
    g = torch.Generator().manual_seed(seed)

    def one(shape):
        return torch.randn(shape, generator=g, dtype=torch.float64) * torch.rand(shape[-1:], generator=g).add(0.1)

    return [[one(shape).to(dtype) for shape in shapes] for _ in range(2)]


def state(params, dtype=None):
    """(row_vars, col_vars, variances) of zeros."""
    zeros = [lambda p, n: p.new_zeros(n, dtype=dtype)] * 2
    row, col = ([zeros[i](p, p.shape[i]) if p.dim() == 2 else None for p in params] for i in (0, 1))
    return row, col, [None if p.dim() == 2 else torch.zeros_like(p, dtype=dtype) for p in params]


def theirs(params, **options):
    groups = [dict(params=[torch.nn.Parameter(p.clone())]) for p in params]
    return torch.optim.Adafactor(groups, **options)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", [{}, dict(eps=(1e-2, 0.5), clip_threshold=1.5, weight_decay=0.1, lr=0.3)], ids=["defaults", "others"])
def test_equals_torch_over_many_steps(dtype, tolerance, options):
    params, _ = draw(dtype, SHAPES[:5])
    options = dict(lr=0.01) | options
    reference = theirs(params, **{"d" if name == "clip_threshold" else name: value for name, value in (dict(weight_decay=0.0) | options).items()})
    moments = state(params)
    for step in range(1, 9):
        grads = draw(dtype, SHAPES[:5], seed=step)[1]
        adafactor_(params, grads, *moments, step=torch.tensor(float(step)), impl="reference", **options)
        for group, g in zip(reference.param_groups, grads, strict=True):
            group["params"][0].grad = g.clone()
        reference.step()
        for p, group in zip(params, reference.param_groups, strict=True):
            torch.testing.assert_close(p, group["params"][0].detach(), rtol=tolerance, atol=tolerance)
    for index, group in enumerate(reference.param_groups):
        kept = reference.state[group["params"][0]]
        for name, moment in zip(("row_var", "col_var", "variance"), (m[index] for m in moments), strict=True):
            assert (moment is None) == (name not in kept)
            if moment is not None:
                torch.testing.assert_close(moment, kept[name].view_as(moment), rtol=tolerance, atol=tolerance)
