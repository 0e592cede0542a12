"""Schedules, Muon, clipping, accumulation in fp32, loss scaling, and steps that are refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanotrain import optim
from nanotrain.model.transformer import build_model
from nanotrain.optim import OptimConfig, Optimizer, check_optim, orthogonalize, schedule_factor
from tests.model.test_transformer import config

FINITE = torch.zeros(())


def test_schedules_at_their_corners():
    def at(progress, **options):
        return schedule_factor(OptimConfig(**(dict(warmup=0.1, decay=0.5, floor=0.2) | options)), progress)

    for name in ("wsd", "cosine", "linear", "constant"):
        assert at(0.05, schedule=name) == 0.5 and at(0.1, schedule=name) == 1.0
        assert math.isclose(at(1.0, schedule=name), 1.0 if name == "constant" else 0.2)
    assert at(0.5, schedule="wsd") == 1.0 and math.isclose(at(0.75, schedule="wsd"), 0.6)
    assert math.isclose(at(0.55, schedule="cosine"), 0.6) and math.isclose(at(0.55, schedule="linear"), 0.6)
    assert at(0.2, schedule="cosine") > at(0.2, schedule="linear")


@given(st.sampled_from(["wsd", "cosine", "linear", "constant"]), st.floats(0, 1.5), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1))
def test_rate_stays_between_nothing_and_the_peak(schedule, progress, warmup, decay, floor):
    assert 0 <= schedule_factor(OptimConfig(schedule=schedule, warmup=warmup, decay=decay, floor=floor), progress) <= 1


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions(shape, dtype):
    matrices = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices).double()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    cosine = (result * (u @ v)).sum((1, 2)) / (result.norm(dim=(1, 2)) * (u @ v).norm(dim=(1, 2)))
    assert (cosine > 0.97).all()


def make(dtype=torch.float32, **options):
    model = build_model(config(bias=True, norm="layer", qk_norm=True, tied=False), seed=0, dtype=dtype, device="cpu")
    return model, Optimizer(model, OptimConfig(**options))


def fill(model, seed=0, scale=1.0):
    for n, p in enumerate(model.parameters()):
        p.grad = (scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * seed + n))).to(p.dtype)


def snapshot(model, optimizer):
    return {**{n: p.detach().clone() for n, p in model.named_parameters()}, **{k: t.clone() for k, t in optimizer.state().items()}}


def test_muon_takes_hidden_matrices_one_by_one_and_adamw_the_rest():
    _, optimizer = make()
    assert set(optimizer.muon) == {
        f"blocks.{i}.{n}.weight"
        for i in range(2)
        for n in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert {"embed.weight", "head.weight", "head.norm.weight", "blocks.0.mlp.up_proj.bias"} <= set(optimizer.adamw)
    assert make(name="adamw")[1].muon == []


def test_muon_moves_by_the_orthogonalised_nesterov_momentum():
    model, optimizer = make(torch.float64, muon_lr=0.1, muon_momentum=0.9, clip=0.0, weight_decay=0.5)
    name = "blocks.0.mlp.gate_proj.weight"  # 24 x 16: taller than wide
    weight = model.get_parameter(name)
    expected, momentum = weight.detach().clone(), torch.zeros_like(weight)
    for seed in range(3):
        fill(model, seed)
        gradient = weight.grad.clone()
        optimizer.step(0.5, FINITE)
        momentum = 0.9 * momentum + 0.1 * gradient
        update = orthogonalize((0.1 * gradient + 0.9 * momentum)[None])[0]
        expected = expected - 0.05 * math.sqrt(24 / 16) * (update + 0.5 * expected)
        torch.testing.assert_close(weight.detach(), expected)


def test_matrices_too_many_for_one_stack_are_updated_in_parts(monkeypatch):
    results = []
    for stacked in (1 << 24, 700, 1):
        monkeypatch.setattr(optim, "STACKED", stacked)
        model, optimizer = make(torch.float64)
        for seed in range(2):
            fill(model, seed)
            optimizer.step(1.0, FINITE)
        results.append((len(list(optimizer._stacks())), snapshot(model, optimizer)))
    counts, states = zip(*results, strict=True)
    assert counts[0] < counts[1] < counts[2] == len(optimizer.muon)
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=1e-10, atol=1e-12)


def test_embeddings_have_a_rate_of_their_own():
    model, optimizer = make(torch.float64, lr=0.01, embedding_lr=0.25)
    before = snapshot(model, optimizer)
    fill(model)
    optimizer.step(1.0, FINITE)
    for name, rate in (("embed.weight", 0.25), ("head.weight", 0.01), ("head.norm.weight", 0.01)):
        moved = (model.get_parameter(name).detach() - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-5, atol=0)  # Adam's first step has the size of the rate


def test_decay_spares_norms_biases_and_by_default_embeddings():
    for embeddings in (False, True):
        model, optimizer = make(torch.float64, name="adamw", lr=0.1, weight_decay=0.3, decay_embeddings=embeddings)
        before = snapshot(model, optimizer)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step(1.0, FINITE)
        for name, p in model.named_parameters():
            decays = p.dim() == 2 and (embeddings or name.startswith("blocks."))
            torch.testing.assert_close(p.detach(), before[name] * (1 - 0.03 if decays else 1.0), rtol=1e-7, atol=0)


def test_clipping_scales_the_whole_gradient():
    model, optimizer = make(torch.float64, name="adamw", clip=0.5, beta1=0.9)
    fill(model)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    result = optimizer.step(1.0, FINITE)
    assert math.isclose(float(result.grad_norm), norm, rel_tol=1e-12) and bool(result.clipped)
    for name, average in optimizer.exp_avgs.items():
        torch.testing.assert_close(average, 0.1 * grads[name] * 0.5 / norm)
    fill(model, scale=1e-4)
    assert not bool(optimizer.step(1.0, FINITE).clipped)


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_no_bit(name, dtype, bad):
    model, optimizer = make(dtype, name=name, weight_decay=0.1)
    fill(model)
    optimizer.step(1.0, FINITE)
    before = snapshot(model, optimizer)
    fill(model, 1)
    if bad == "gradient":
        next(model.parameters()).grad[0] = math.nan
    result = optimizer.step(1.0, torch.tensor(math.inf) if bad == "loss" else FINITE)
    assert bool(result.skipped)
    after = snapshot(model, optimizer)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed <= ({"loss_scale", "good_steps"} if dtype == torch.float16 else set())
    assert float(after["loss_scale"]) == float(before["loss_scale"]) / (2 if dtype == torch.float16 else 1)
    fill(model, 2)
    assert not bool(optimizer.step(1.0, FINITE).skipped) and not torch.equal(snapshot(model, optimizer)["embed.weight"], before["embed.weight"])


def test_loss_scale_grows_after_a_thousand_good_steps():
    model, optimizer = make(torch.float16)
    optimizer.good_steps += 998
    for expected in (2.0**16, 2.0**17):
        fill(model, scale=1e-3)
        optimizer.step(1.0, FINITE)
        assert float(optimizer.loss_scale) == expected
    assert float(optimizer.good_steps) == 0


def test_micro_batches_are_summed_in_fp32():
    model, optimizer = make(torch.bfloat16, name="adamw", clip=0.0, beta1=0.0)
    exact = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in model.named_parameters()}
    for seed in range(64):
        fill(model, seed)
        for n, p in model.named_parameters():
            exact[n] += p.grad.float()
        optimizer.accumulate()
    optimizer.step(1.0, FINITE)
    assert all(torch.allclose(optimizer.exp_avgs[n], exact[n], rtol=1e-6) for n in exact)
    assert all(p.grad is None for p in model.parameters()) and not optimizer.sums


@pytest.mark.parametrize("option", [
        dict(lr=-1.0), dict(embedding_lr=-1.0), dict(floor=2.0), dict(warmup=0.6, decay=0.6), dict(beta2=-0.1), dict(beta1=1.0), dict(clip=-1.0),
        dict(weight_decay=-1.0), dict(clip=math.nan), dict(muon_momentum=1.0), dict(tuned_batch=0),
    ])
def test_bad_values_name_their_flag(option):
    with pytest.raises(ValueError, match=f"--optim.{next(iter(option))}"):
        check_optim(OptimConfig(**option))
