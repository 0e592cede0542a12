"""Schedules, every optimizer, clipping, accumulation in fp32, loss scaling, stochastic rounding, and steps that are refused."""

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nanotrain.kernels.native import library
from nanotrain.kernels.orthogonal import orthogonalize
from nanotrain.kernels.runtime import launches
from torch import nn

from nanotrain import optim
from nanotrain.model.build import build_model
from nanotrain.optim import OptimConfig, Optimizer, check_optim, schedule_factor
from tests.model.test_transformer import config

FINITE = torch.zeros(())
NAMES = ["muon", "adamw", "lion", "adafactor"]
KINDS = {
    "fp32": (torch.float32, {}),
    "masters": (torch.bfloat16, {}),
    "rounded": (torch.bfloat16, dict(masters=False)),
    "narrow": (torch.bfloat16, dict(masters=False, moments="bfloat16")),
    "fp16": (torch.float16, {}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
names = pytest.mark.parametrize("name", NAMES)


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


def make(dtype=torch.float32, **options):
    model = build_model(config(bias=True, norm="layer", qk_norm=True, tied=False), seed=0, dtype=dtype, device="cpu")
    return model, Optimizer(model, OptimConfig(**options))


def gradients(model, seed=0, scale=1.0):
    generators = (torch.Generator().manual_seed(1000 * seed + n) for n in itertools.count())
    return [(scale * torch.randn(p.shape, generator=g)).to(p.dtype) for p, g in zip(model.parameters(), generators, strict=False)]


def fill(model, seed=0, scale=1.0):
    for p, gradient in zip(model.parameters(), gradients(model, seed, scale), strict=True):
        p.grad = gradient


def snapshot(model, optimizer):
    return {**{n: p.detach().clone() for n, p in model.named_parameters()}, **{k: t.clone() for k, t in optimizer.state().items()}}


class Small(nn.Module):
    """An embedding, a hidden matrix, a bias and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(12, 16), nn.ModuleList([nn.Linear(16, 16)]), nn.Linear(16, 12, bias=False)
        for n, p in enumerate(self.parameters()):
            nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(n))

    def forward(self, tokens):
        return self.head(torch.tanh(self.blocks[0](self.embed(tokens))))


def fit(dtype, **options):
    """(first, last) loss of learning which token follows which."""
    model, tokens = Small().to(dtype), torch.arange(12)
    optimizer, losses = Optimizer(model, OptimConfig(**options)), []
    for step in range(60):
        loss = F.cross_entropy(model(tokens).float(), tokens * 5 % 12)
        loss.backward()
        optimizer.step(1.0 - step / 60, loss.detach())
        losses.append(loss.item())
    return losses[0], losses[-1]


@names
def test_every_optimizer_learns_and_bf16_without_masters_learns_as_well(name):
    rates = dict(muon=dict(lr=0.02), adamw=dict(lr=0.02), lion=dict(lr=0.02), adafactor=dict(lr=0.1))[name]
    first, fp32 = fit(torch.float32, name=name, **rates)
    results = {kind: fit(KINDS[kind][0], name=name, **rates, **KINDS[kind][1])[1] for kind in ("masters", "rounded", "narrow")}
    assert fp32 < 0.2 * first
    assert all(abs(last - fp32) < 0.01 * first for last in results.values()), (first, fp32, results)


@names
@kinds
def test_resumed_from_its_state_it_goes_on_bit_for_bit(name, kind):
    dtype, options = KINDS[kind]
    model, optimizer = make(dtype, name=name, weight_decay=0.1, **options)
    for seed in range(2):
        fill(model, seed)
        optimizer.step(1.0, FINITE)
    other, resumed = make(dtype, name=name, weight_decay=0.1, **options)
    with torch.no_grad():
        for target, source in zip([*other.parameters(), *resumed.state().values()], [*model.parameters(), *optimizer.state().values()], strict=True):
            target.copy_(source)
    for m, o in ((model, optimizer), (other, resumed)):
        fill(m, 2)
        o.step(0.5, FINITE)
    before, after = snapshot(model, optimizer), snapshot(other, resumed)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@names
@kinds
def test_a_factor_on_the_device_gives_the_same_bits_and_nothing_that_lasts_moves(name, kind):
    """As a captured graph needs it: state and weights stay at their addresses."""
    dtype, options = KINDS[kind]
    states = []
    for factor in (0.3, torch.tensor(0.3)):
        model, optimizer = make(dtype, name=name, weight_decay=0.1, **options)
        places = [t.data_ptr() for t in (*model.parameters(), *optimizer.state().values())]
        for seed in range(2):
            fill(model, seed)
            optimizer.step(factor, FINITE)
        assert places == [t.data_ptr() for t in (*model.parameters(), *optimizer.state().values())]
        states.append(snapshot(model, optimizer))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_gradients_kept_lie_where_they_lay_and_change_nothing():
    states = []
    for keep in (False, True):
        model, optimizer = make(torch.bfloat16)
        optimizer.keep_gradients, places = keep, set()
        for seed in range(6):
            fill(model, seed) if seed == 0 or not keep else [p.grad.add_(g) for p, g in zip(model.parameters(), gradients(model, seed), strict=True)]
            places.add(tuple(p.grad.data_ptr() for p in model.parameters()))
            optimizer.accumulate()
            if seed % 2:
                optimizer.step(1.0, FINITE)
            assert all((p.grad is not None and not p.grad.any()) if keep else p.grad is None for p in model.parameters())
        assert len(places) == 1 or not keep
        states.append(snapshot(model, optimizer))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_stochastic_rounding_is_keyed_on_seed_step_and_place():
    """The same step again rounds the same; another seed, step or place otherwise, masters not at all."""

    def weights(seed=0, steps=1):
        model = build_model(config(tied=False), seed=0, dtype=torch.bfloat16, device="cpu")
        optimizer = Optimizer(model, OptimConfig(masters=False, muon_lr=1e-3, lr=1e-4), seed)
        for p in model.parameters():
            p.data.fill_(1.0)
        fill(model)
        optimizer.steps += steps - 1
        optimizer.step(1.0, FINITE)
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    base = weights()
    assert all(torch.equal(a, b) for a, b in zip(base.values(), weights().values(), strict=True))
    for other in (weights(seed=1), weights(steps=2)):
        assert not any(torch.equal(base[n], other[n]) for n in ("blocks.0.mlp.up_proj.weight", "head.weight"))
    assert not torch.equal(base["blocks.0.mlp.up_proj.weight"] != 1, base["blocks.1.mlp.up_proj.weight"] != 1)
    assert 0.005 < float((base["head.weight"] != 1).float().mean()) < 0.05  # a step of 1e-4 beside spacings of 2^-8 under and 2^-7 over 1


@pytest.mark.skipif(library("train") is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_one_native_pass_on_a_cpu(dtype):
    model, optimizer = make(dtype, name="adamw", embedding_lr=0.1, weight_decay=0.1)
    fill(model)
    before = Counter(launches)
    optimizer.step(1.0, FINITE)
    assert launches - before == {"adamw": len(optimizer.rest)}


def test_muon_takes_hidden_matrices_one_by_one_and_adamw_the_rest():
    _, optimizer = make()
    assert set(optimizer.muon) == {
        f"blocks.{i}.{n}.weight"
        for i in range(2)
        for n in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert {"embed.weight", "head.weight", "head.norm.weight", "blocks.0.mlp.up_proj.bias"} <= set(optimizer.rest)
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
        results.append((len(list(optimizer.stacks())), snapshot(model, optimizer)))
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


def test_lion_moves_by_the_sign_at_the_rate_of_its_group():
    model, optimizer = make(torch.float64, name="lion", lr=0.01, embedding_lr=0.25, lion_beta1=0.6, lion_beta2=0.7)
    before = snapshot(model, optimizer)
    fill(model)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    norm = optimizer.step(0.5, FINITE).grad_norm
    for name, p in model.named_parameters():
        rate = 0.125 if name == "embed.weight" else 0.005
        torch.testing.assert_close(p.detach(), before[name] - rate * grads[name].sign(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.moments["exp_avg"][name], 0.3 * grads[name] / norm)


def test_adafactor_moves_by_a_share_of_each_tensor():
    model, optimizer = make(torch.float64, name="adafactor", lr=0.01, embedding_lr=0.25)
    before = snapshot(model, optimizer)
    fill(model)
    optimizer.step(0.5, FINITE)
    for name, p in model.named_parameters():
        share = float((p.detach() - before[name]).norm()) / max(float(before[name].norm()), 1e-3 * p.numel() ** 0.5)
        assert share == pytest.approx(0.125 if name == "embed.weight" else 0.005, rel=0.1), name
    assert optimizer.state()["row_var.embed.weight"].shape == (50,) and "variance.head.norm.weight" in optimizer.state()


def test_decay_spares_norms_biases_and_by_default_embeddings():
    for embeddings, kind in itertools.product((False, True), NAMES[1:]):
        model, optimizer = make(torch.float64, name=kind, lr=0.1, weight_decay=0.3, decay_embeddings=embeddings)
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
    for name, average in optimizer.moments["exp_avg"].items():
        torch.testing.assert_close(average, 0.1 * grads[name] * 0.5 / norm)
    fill(model, scale=1e-4)
    assert not bool(optimizer.step(1.0, FINITE).clipped)


@names
@kinds
@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_no_bit(name, kind, bad):
    dtype, options = KINDS[kind]
    model, optimizer = make(dtype, name=name, weight_decay=0.1, **options)
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
    assert all(torch.allclose(optimizer.moments["exp_avg"][n], exact[n], rtol=1e-6) for n in exact)
    assert all(p.grad is None for p in model.parameters()) and not optimizer.sums


@pytest.mark.parametrize("option", [
        dict(lr=-1.0), dict(embedding_lr=-1.0), dict(floor=2.0), dict(warmup=0.6, decay=0.6), dict(beta2=-0.1), dict(beta1=1.0), dict(clip=-1.0),
        dict(weight_decay=-1.0), dict(clip=math.nan), dict(muon_momentum=1.0), dict(tuned_batch=0), dict(lion_beta1=1.0), dict(lion_beta2=-0.1),
        dict(masters=False),
    ])
def test_bad_values_name_their_flag(option):
    with pytest.raises(ValueError, match=f"--optim.{next(iter(option))}"):
        check_optim(OptimConfig(**option), "float16")


def test_defaults_suit_every_dtype_and_masters_may_go_where_bf16_is():
    for name in NAMES:
        for dtype in ("bfloat16", "float16", "float32", "float64"):
            check_optim(OptimConfig(name=name), dtype)
        check_optim(OptimConfig(name=name, masters=False), "bfloat16")
