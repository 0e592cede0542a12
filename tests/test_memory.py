"""The memory plan counts what the path that will run keeps and holds."""

import pytest
import torch
from nanotrain.kernels.native import library

from nanotrain import memory
from nanotrain.model.transformer import ModelConfig, build_model


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
    arguments = dict(dtype=torch.bfloat16, length=64, rows=2, accumulate=1, muon=False, device=torch.device("cpu"))
    native = memory.plan(c, **arguments)
    capped = memory.plan(ModelConfig(vocab_size=100, logit_softcap=3.0).resolved(frozenset({"vocab_size", "logit_softcap"})), **arguments)
    monkeypatch.setattr(memory, "has_native", lambda dtype, device: False)
    plain = memory.plan(c, **arguments)
    assert native.workspace < capped.workspace < plain.workspace and native.activations_per_row < plain.activations_per_row
    assert native.optimizer == plain.optimizer and native.gradients == plain.gradients
