"""adamw_ against its formula in float64 and against torch.optim.AdamW."""

import pytest
import torch
from nanotrain.kernels.optimizers import EXAMPLES, adamw_

HYPER = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def draw(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(s, generator=g).to(dtype) for s in EXAMPLES] for _ in range(2)]


def moments(params, dtype=None):
    return [[torch.zeros_like(p, dtype=dtype) for p in params] for _ in range(2)]


def test_equals_the_formula_in_float64():
    params, grads = draw(torch.float64)
    expected = [p.clone() for p in params]
    m, v = moments(params)
    em, ev = moments(params)
    for step in (1, 2, 3):
        adamw_(params, grads, m, v, lr=0.01, step=step, grad_scale=0.5, **HYPER)
        for p, g, a, b in zip(expected, grads, em, ev, strict=True):
            g = g * 0.5
            a.mul_(0.9).add_(0.1 * g)
            b.mul_(0.95).add_(0.05 * g * g)
            p.mul_(1 - 0.01 * 0.1)
            p.sub_(0.01 * (a / (1 - 0.9**step)) / ((b / (1 - 0.95**step)).sqrt() + 1e-8))
    for a, b in zip((*params, *m, *v), (*expected, *em, *ev), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_equals_torch_over_many_steps():
    params, grads = draw()
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    reference = torch.optim.AdamW(theirs, lr=0.01, fused=True, **HYPER)
    m, v = moments(params)
    for step in range(1, 11):
        adamw_(params, grads, m, v, lr=0.01, step=torch.tensor(float(step)), impl="reference", **HYPER)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        reference.step()
    assert all(torch.equal(p, t) for p, t in zip(params, theirs, strict=True))


def test_nothing_is_written_where_the_flag_is_set():
    for masters in (False, True):
        params, grads = draw(torch.bfloat16)
        wide = [p.float() for p in params] if masters else None
        m, v = moments(params, torch.float32)
        before = [t.clone() for t in (*params, *m, *v, *(wide or []))]
        extra = dict(masters=wide) if masters else dict(seed=1, counter_starts=[0, 100, 200, 300])
        adamw_(params, grads, m, v, lr=0.1, step=1, found_nonfinite=torch.tensor(True), **extra, **HYPER)
        assert all(torch.equal(a, b) for a, b in zip((*params, *m, *v, *(wide or [])), before, strict=True))
        adamw_(params, grads, m, v, lr=0.1, step=1, found_nonfinite=torch.tensor(False), **extra, **HYPER)
        assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=False))


def test_masters_carry_what_bf16_cannot():
    params, grads = draw(torch.bfloat16)
    masters = [p.float() for p in params]
    exact = [p.double() for p in params]
    m, v = moments(params, torch.float32)
    em, ev = moments(exact)
    for step in range(1, 21):
        adamw_(params, grads, m, v, lr=1e-4, step=step, masters=masters, **HYPER)
        adamw_(exact, [g.double() for g in grads], em, ev, lr=1e-4, step=step, **HYPER)
    for p, w, e in zip(params, masters, exact, strict=True):
        torch.testing.assert_close(w.double(), e, rtol=1e-5, atol=1e-6)
        assert torch.equal(p, w.bfloat16())


def test_stochastic_rounding_follows_fp32_on_average():
    p = [torch.ones(20000, dtype=torch.bfloat16)]
    m, v = moments(p, torch.float32)
    for step in range(1, 11):  # each step is a 16th of a bf16 ulp: rounding to nearest would never move
        adamw_(
            p, [torch.ones_like(p[0])], m, v, lr=2.0**-12, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, step=step, seed=step, counter_starts=[0]
        )
    assert abs(float(p[0].float().mean()) - (1 - 10 * 2.0**-12)) < 1e-4


def test_bad_arguments_are_named():
    params, grads = draw()
    m, v = moments(params)
    with pytest.raises(ValueError, match="shapes of grads"):
        adamw_(params, grads[:-1], m, v, lr=0.1, step=1, **HYPER)
    narrow = [p.bfloat16() for p in params]
    with pytest.raises(ValueError, match="need masters"):
        adamw_(narrow, grads, m, v, lr=0.1, step=1, **HYPER)
    with pytest.raises(ValueError, match="3 counter_starts for 4 params"):
        adamw_(narrow, grads, m, v, lr=0.1, step=1, seed=1, counter_starts=[0, 1, 2], **HYPER)
    with pytest.raises(ValueError, match="different devices"):
        adamw_(params, [g.to("meta") for g in grads], m, v, lr=0.1, step=1, **HYPER)
