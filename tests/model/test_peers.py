"""Our model beside transformers' own, with the same weights: the same logits, so the architecture is what its name says."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from nanotrain.model.transformer import ModelConfig, rope_frequencies
from tests.model.test_transformer import build, logits, tokens_of

pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="extra: pip install -e '.[peers]'"),
]

SCALINGS = {
    "none": ({}, {"rope_type": "default"}),
    "linear": (dict(rope_scaling="linear", rope_factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        dict(rope_scaling="yarn", rope_factor=4.0, rope_original_context=8),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    ),
    "llama3": (
        dict(rope_scaling="llama3", rope_factor=8.0, rope_original_context=16),
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    ),
}


def copy(ours, theirs, names):
    """Copy our weights into their modules: `names` maps parts of our names to parts of theirs."""
    state = {}
    for name, p in ours.named_parameters():
        for mine, other in names:
            name = name.replace(mine, other)
        state[name] = p.detach()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(m in ("lm_head.weight",) or m.endswith(("attn.bias", "inv_freq")) for m in missing), (missing, unexpected)
    return theirs.double().eval()


LLAMA = [
    ("embed.", "model.embed_tokens."),
    ("blocks.", "model.layers."),
    ("attention.", "self_attn."),
    ("attention_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
    ("head.norm", "model.norm"),
    ("head.weight", "lm_head.weight"),
]


def agree(ours, theirs):
    tokens = tokens_of(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_llama(scaling):
    from transformers import LlamaConfig, LlamaForCausalLM

    options, rope = SCALINGS[scaling]
    ours = build(kv_heads=2, tied=False, **options)
    c = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        rope_parameters={"rope_theta": 10000.0, **rope},
        attn_implementation="eager",
    )
    agree(ours, copy(ours, LlamaForCausalLM(c), LLAMA))


@pytest.mark.parametrize("scaling", ["yarn", "llama3"])
def test_rope_frequencies_of_published_models(scaling):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original = 8192
    _, rope = SCALINGS[scaling]
    c = LlamaConfig(
        hidden_size=2048,
        num_attention_heads=32,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={**rope, "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": original},
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[scaling](c, "cpu")
    ours, our_factor = rope_frequencies(replace(ModelConfig(preset="llama3.2-1b").resolved(), rope_scaling=scaling))
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=0)
    assert our_factor == pytest.approx(factor)


def test_qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    ours = build(kv_heads=2, head_dim=6, qk_norm=True)
    c = Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-6,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        attn_implementation="eager",
    )
    agree(ours, copy(ours, Qwen3ForCausalLM(c), LLAMA))


def test_mistral_with_its_window():
    from transformers import MistralConfig, MistralForCausalLM

    ours = build(kv_heads=2, window=5, tied=False)
    c = MistralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        sliding_window=5,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        attn_implementation="eager",
    )
    agree(ours, copy(ours, MistralForCausalLM(c), LLAMA))


def test_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = build(positions="learned", norm="layer", norm_eps=1e-5, activation="gelu", bias=True)
    c = GPT2Config(vocab_size=50, n_embd=16, n_inner=24, n_layer=2, n_head=4, n_positions=32, attn_implementation="eager")
    theirs, p = GPT2LMHeadModel(c), dict(ours.named_parameters())
    state = {
        "transformer.wte.weight": p["embed.weight"],
        "transformer.wpe.weight": p["embed_positions.weight"],
        "transformer.ln_f.weight": p["head.norm.weight"],
        "transformer.ln_f.bias": p["head.norm.bias"],
    }
    for i in range(2):
        mine, other = f"blocks.{i}.", f"transformer.h.{i}."
        for kind in ("weight", "bias"):  # their Conv1D holds the transpose
            turn = (lambda t: t.T) if kind == "weight" else (lambda t: t)
            state[f"{other}attn.c_attn.{kind}"] = turn(torch.cat([p[f"{mine}attention.{x}_proj.{kind}"] for x in "qkv"]))
            for a, b in (("attention.o_proj", "attn.c_proj"), ("mlp.up_proj", "mlp.c_fc"), ("mlp.down_proj", "mlp.c_proj")):
                state[f"{other}{b}.{kind}"] = turn(p[f"{mine}{a}.{kind}"])
            for a, b in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
                state[f"{other}{b}.{kind}"] = p[f"{mine}{a}.{kind}"]
    missing, unexpected = theirs.load_state_dict({k: v.detach() for k, v in state.items()}, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"])
    agree(ours, theirs.double().eval())
