"""The memory plan counts what the path that will run keeps and holds."""

import pytest
import torch
from nanotrain.kernels.native import library

from nanotrain import memory
from nanotrain.model.build import build_model
from nanotrain.model.transformer import ModelConfig
from nanotrain.optim import OptimConfig, Optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"kv_heads": 1, "qk_norm": True}, {"activation": "geglu", "norm_position": "sandwich"}], ids=str)
def test_activations_counted_are_those_kept(shape, dtype):
    shape = dict(width=32, layers=2, heads=2, vocab_size=100, context=64) | shape
    c = ModelConfig(**shape).resolved(frozenset(shape))
    model, kept = build_model(c, seed=0, dtype=dtype, device="cpu"), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.zeros(3, 40, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.head(model(tokens, tokens, max_position=40), tokens, token_weight_N=torch.ones(120))[0]
    assert memory.activation_bytes(c, dtype=dtype, length=40, rows=3) == sum(s.nbytes() for s in kept.values() if s.nbytes())
    loss.backward()


@pytest.mark.skipif(library("train") is None, reason="no C++ compiler")
def test_what_works_in_place_needs_less_room(monkeypatch):
    c = ModelConfig(vocab_size=100).resolved(frozenset({"vocab_size"}))
    arguments = dict(optim=OptimConfig(name="adamw"), dtype=torch.bfloat16, length=64, rows=2, accumulate=1, device=torch.device("cpu"))
    native = memory.plan(c, **arguments)
    capped = memory.plan(ModelConfig(vocab_size=100, logit_softcap=3.0).resolved(frozenset({"vocab_size", "logit_softcap"})), **arguments)
    monkeypatch.setattr(memory, "has_native", lambda dtype, device: False)
    plain = memory.plan(c, **arguments)
    assert native.workspace < capped.workspace < plain.workspace and native.activations_per_row < plain.activations_per_row
    assert native.optimizer == plain.optimizer and native.gradients == plain.gradients


def planned(optim, dtype=torch.bfloat16, device="cpu"):
    shape = dict(width=32, layers=2, heads=2, vocab_size=100, context=64)
    c = ModelConfig(**shape).resolved(frozenset(shape))
    return c, memory.plan(c, optim, dtype=dtype, length=64, rows=2, accumulate=1, device=torch.device(device))


@pytest.mark.parametrize("name", ["muon", "adamw", "lion", "adafactor"])
def test_the_optimizer_planned_is_the_one_made(name):
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, dict(moments="bfloat16"), dict(masters=False)):
            optim = OptimConfig(name=name, **options)
            c, plan = planned(optim, dtype)
            made = Optimizer(build_model(c, seed=0, dtype=dtype, device="cpu"), optim)
            assert plan.optimizer == sum(t.nbytes for t in made.state().values())
            sizes[dtype, *options] = plan.optimizer
    count = sum(p.numel() for p in made.params.values())
    assert sizes[torch.bfloat16,] - sizes[torch.bfloat16, "masters"] == 4 * count
    assert sizes[torch.float32,] == sizes[torch.float32, "masters"] == sizes[torch.bfloat16, "masters"]
    moments = {"muon": 1, "adamw": 2, "lion": 1, "adafactor": 0}[name]
    saved = sizes[torch.float32,] - sizes[torch.float32, "moments"]
    assert saved == 0 if name == "adafactor" else 2 * count * moments <= saved < 2.5 * count * moments


@pytest.mark.skipif(library("train") is None or memory.triton is None, reason="no C++ compiler, or no Triton")
def test_what_an_update_holds_for_a_moment_follows_how_it_is_done(monkeypatch):
    """Copies where a step is not one pass; on a GPU every optimizer's is."""
    monkeypatch.setattr(memory, "available_memory", lambda device: 0)
    others = [dict(name="adamw", masters=False), dict(name="adamw", moments="bfloat16"), dict(name="lion"), dict(name="adafactor")]
    for device, more in (("cpu", True), ("cuda", False)):
        one_pass = planned(OptimConfig(name="adamw"), device=device)[1].workspace
        assert all((planned(OptimConfig(**other), device=device)[1].workspace > one_pass) == more for other in others)
    muon = [planned(OptimConfig(masters=masters), device="cuda")[1].workspace for masters in (True, False)]
    assert one_pass < muon[0] < muon[1]  # stacks of momenta, and the bits of rounding


def test_rungs_of_the_ladder_that_are_taken_are_left_out():
    def ladder(**options):
        return memory.ladder(micro_batch=1, accumulate=1, recompute="full", optim=OptimConfig(**options), dtype="bfloat16")

    assert ladder(name="adamw").startswith("--optim.name=muon (one moment in place of two); then --optim.moments=bfloat16")
    assert "--optim.masters=false" in ladder() and "--optim.name=muon" not in ladder()
    assert ladder(name="adafactor", masters=False) == "a shorter --train.length or a smaller --model.preset"
