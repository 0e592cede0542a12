"""Hugging Face directories in and out: the same logits and bits as transformers itself, and one clear line for what does not fit."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanotrain.model import families
from nanotrain.model.build import build_model, parameter_count
from nanotrain.model.families import FAMILIES, canonical, hf_config, model_config
from nanotrain.model.hf import load_hf, save_hf
from nanotrain.model.presets import PRESETS
from nanotrain.model.transformer import ModelConfig
from tests.model.test_transformer import config, logits

extras = [
    pytest.mark.extras,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="extra: pip install -e '.[peers]'"),
]
GEMMA = dict(norm_position="sandwich", norm_offset=1.0, activation="geglu", scale_embedding=True)
LONGROPE = dict(rope_original_context=16, rope_short_factors=(1.0, 1.5, 2.0, 3.0), rope_long_factors=(1.5, 2.0, 4.0, 7.0))
OURS = {
    "plain": ("llama", {}),
    "ntk": ("llama", dict(rope_scaling="ntk", rope_factor=3.0)),
    "linear": ("llama", dict(rope_scaling="linear", rope_factor=4.0, tied=False)),
    "dynamic": ("llama", dict(rope_scaling="dynamic", rope_factor=2.0, rope_original_context=16)),
    "llama3": ("llama", dict(rope_scaling="llama3", rope_factor=8.0, rope_original_context=16, rope_low=0.5, rope_high=3.0)),
    "yarn": ("llama", dict(rope_scaling="yarn", rope_factor=4.0, rope_original_context=16)),
    "yarn_all": ("llama", dict(rope_scaling="yarn", rope_factor=4.0, rope_low=0.5, rope_high=4.0, rope_attention_factor=1.3, rope_untruncated=True)),
    "longrope": ("llama", dict(rope_scaling="longrope", rope_factor=4.0, **LONGROPE)),
    "longrope_factor": ("llama", dict(rope_scaling="longrope", rope_attention_factor=1.2, **LONGROPE)),
    "attention_biases": ("llama", dict(attention_bias=True, output_bias=True, kv_heads=1)),
    "biases": ("llama", dict(bias=True)),
    "mlp_bias": ("llama", dict(mlp_bias=True, head_dim=12)),
    "uneven_width": ("mistral", dict(heads=5, kv_heads=5)),
    "window": ("mistral", dict(window=5, tied=False)),
    "qkv_bias": ("qwen2", dict(attention_bias=True, head_dim=10)),
    "qkv_bias_late_windows": ("qwen2", dict(attention_bias=True, window=5, window_pattern="ffs")),
    "qk_norm": ("qwen3", dict(qk_norm=True, tied=False, norm_eps=1e-5)),
    "qk_norm_windows": ("qwen3", dict(qk_norm=True, window=5, window_pattern="sfs", attention_bias=True, output_bias=True)),
    "qk_norm_yarn": ("qwen3", dict(qk_norm=True, rope_scaling="yarn", rope_factor=2.0, kv_heads=1)),
    "gemma2": ("gemma2", dict(**GEMMA, window=5, window_pattern="sf", attention_softcap=5.0, logit_softcap=3.0, attention_scale=24**-0.5)),
    "gemma2_bare": ("gemma2", dict(**GEMMA, tied=False)),
    "gemma2_other_windows": ("gemma2", dict(**GEMMA, window=6, window_pattern="ffs", attention_bias=True, output_bias=True)),
    "gpt2": ("gpt2", dict(positions="learned", norm="layer", norm_eps=1e-5, activation="gelu", bias=True, kv_heads=4, head_dim=6)),
    "gpt2_untied": ("gpt2", dict(positions="learned", norm="layer", activation="gelu", bias=True, kv_heads=4, head_dim=6, ffn_width=96, tied=False)),
}  # fmt: skip
"""Every family and option: the family that a model of ours becomes, and its options."""


def build(dtype=torch.float32, **options):
    """A model of ours with values far from those it starts with, so that each of them matters."""
    shape = dict(width=24, layers=3, heads=4, kv_heads=2, head_dim=8, ffn_width=40, context=64)
    model = build_model(config(**(shape | options)), seed=0, dtype=dtype, device="cpu")
    return stirred(model)


@torch.no_grad()
def stirred(model):
    for n, p in enumerate(model.parameters()):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
        p.copy_(p + 0.3 * noise if p.dim() == 1 else 0.25 * noise)
    return model


def tokens_of(length=40):
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(7))


def same(ours, theirs):
    """Logits within 1e-4, beyond and within the original context of a stretched RoPE."""
    for tokens in (tokens_of(40), tokens_of(12)):
        with torch.no_grad():
            got, want = logits(ours, tokens), theirs(tokens).logits
        assert want.std() > 0.3
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def equal(a, b):
    a, b = dict(a), dict(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


# Without transformers


@pytest.mark.parametrize("option", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_comes_back_bit_for_bit(option, dtype, tmp_path):
    family, options = OURS[option]
    model = build(dtype, **options)
    save_hf(model, tmp_path / "whole")
    save_hf(model, tmp_path / "shards", max_shard_bytes=4000)
    assert json.loads((tmp_path / "whole/config.json").read_text())["model_type"] == family
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for folder in ("whole", "shards"):
        back = load_hf(tmp_path / folder)
        assert equal(model.named_parameters(), back.named_parameters())
        assert back.c == canonical(model.c) and torch.equal(logits(back, tokens_of()), logits(model, tokens_of()))
    wide = load_hf(tmp_path / "shards", dtype=torch.float64)
    assert equal(((n, p.double()) for n, p in model.named_parameters()), wide.named_parameters())


def test_longrope_names_its_original_context_where_transformers_4_looks():
    key, shape = "original_max_position_embeddings", dict(width=24, heads=4, kv_heads=2, head_dim=8)
    assert hf_config(config(**(shape | OURS["longrope"][1])))[key] == 16 and key not in hf_config(config(**(shape | OURS["yarn"][1])))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_can_be_written(preset):
    c = ModelConfig(preset=preset, vocab_size=PRESETS[preset].get("vocab_size", 512)).resolved()
    written = json.loads(json.dumps(hf_config(c)))
    assert model_config(written, "x") == ({"nano": "qwen3"}.get(preset, preset[:5].rstrip("-.") if preset[0] != "m" else "mistral"), canonical(c))


@pytest.mark.parametrize(
    "options,named",
    [
        (dict(positions="alibi"), "--model.positions=alibi"),
        (dict(positions="learned"), "--model.positions=learned"),
        (dict(norm_position="post"), "--model.norm_position=post"),
        (dict(norm="layer"), "--model.norm=layer"),
        (dict(activation="geglu"), "--model.activation=geglu"),
        (dict(activation="gelu"), "--model.activation=gelu"),
        (dict(norm_position="sandwich", norm_offset=1.0), "--model.norm_position=sandwich"),
        (dict(output_bias=True), "--model.output_bias=True"),
        (dict(attention_bias=True, qk_norm=True), "--model.qk_norm=True"),
        (dict(logit_softcap=3.0), "--model.logit_softcap=3.0"),
        (dict(attention_scale=0.3), "--model.attention_scale=0.3"),
        (dict(window=5, window_pattern="sf"), "--model.window_pattern=sf"),
        (dict(scale_embedding=True), "--model.scale_embedding=True"),
        (dict(GEMMA, heads=5, kv_heads=5), "--model.heads=5"),
        (dict(GEMMA, attention_scale=0.3), "--model.attention_scale=0.3"),
        (dict(positions="learned", norm="layer", activation="gelu", bias=True), "--model.kv_heads=2"),
    ],
)
def test_what_no_family_has_is_named_and_nothing_is_written(options, named, tmp_path):
    with pytest.raises(ValueError) as caught:
        save_hf(build(**options), tmp_path / "out")
    assert named in str(caught.value) and "\n" not in str(caught.value) and not list(tmp_path.iterdir())


PUBLISHED = {
    "Llama-2-7b-hf": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
         "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
         "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
         "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2},
        ModelConfig(preset="llama2-7b"), 6_738_415_616,
    ),
    "Llama-3.1-8B": (
        {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
         "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072,
         "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
         "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": False,
         "torch_dtype": "bfloat16", "vocab_size": 128256},
        ModelConfig(preset="llama3-8b", context=131072, rope_scaling="llama3", rope_factor=8.0, rope_original_context=8192), 8_030_261_248,
    ),
    "Llama-3.2-1B": (
        {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
         "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
         "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
         "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
         "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256},
        ModelConfig(preset="llama3.2-1b"), 1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
         "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
         "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
         "torch_dtype": "bfloat16", "vocab_size": 32000},
        ModelConfig(preset="mistral-7b"), 7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
         "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
         "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
         "torch_dtype": "bfloat16", "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936},
        ModelConfig(width=896, layers=24, heads=14, kv_heads=2, ffn_width=4864, context=32768, vocab_size=151936, rope_theta=1e6,
                    attention_bias=True),
        494_032_768,
    ),
    "Qwen2-7B": (
        {"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
         "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
         "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
         "use_sliding_window": False, "vocab_size": 152064},
        ModelConfig(width=3584, layers=28, heads=28, kv_heads=4, ffn_width=18944, context=131072, vocab_size=152064, rope_theta=1e6,
                    attention_bias=True, tied=False),
        7_615_616_512,
    ),
    "Qwen3-0.6B": (
        {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
         "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
         "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
         "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936},
        ModelConfig(preset="qwen3-0.6b"), 596_049_920,
    ),
    "gemma-2-2b": (
        {"architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation":
         "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation":
         "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
         "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
         "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32", "vocab_size": 256000},
        ModelConfig(**GEMMA, width=2304, layers=26, heads=8, kv_heads=4, head_dim=256, ffn_width=9216, context=8192, vocab_size=256000, window=4096,
                    window_pattern="sf", attention_softcap=50.0, logit_softcap=30.0),
        2_614_341_888,
    ),
    "gpt2": (
        {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1,
         "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
         "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_type": "cls_index", "vocab_size": 50257},
        ModelConfig(preset="gpt2-124m"), 124_439_808,
    ),
}  # fmt: skip
"""config.json as published, in the form of transformers 4."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_configs_are_their_models(model):
    content, c, parameters = PUBLISHED[model]
    given = frozenset() if c.preset != "nano" else frozenset(ModelConfig.__dataclass_fields__)
    if model == "Llama-3.1-8B":
        given = frozenset(["context", "rope_scaling", "rope_factor", "rope_original_context"])
    name, read = model_config(content, model)
    assert (name, read) == (content["model_type"], canonical(c.resolved(given))) and parameter_count(read) == parameters


TINY = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
LLAMA = dict(TINY, model_type="llama", architectures=["LlamaForCausalLM"], tie_word_embeddings=False)


@pytest.mark.parametrize(
    "changed,message",
    [
        (dict(model_type="mixtral"), "model_type 'mixtral': not a family that nanotrain reads; those are gpt2, llama, mistral, "),
        (dict(model_type=None), "model_type None"),
        (dict(architectures=["LlamaForSequenceClassification"]), "architectures ['LlamaForSequenceClassification']"),
        (dict(hidden_act="relu"), "hidden_act 'relu': nanotrain's model has it only as 'silu'"),
        (dict(quantization_config={"bits": 4}), "quantization_config {'bits': 4}"),
        (dict(is_encoder_decoder=True), "is_encoder_decoder True"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "rope_parameters partial_rotary_factor 0.5"),
        (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "must be one set of parameters for all layers"),
        (dict(rope_scaling={"type": "mrope"}), "rope_scaling rope_type 'mrope': not one of default, linear, dynamic, llama3, yarn, longrope"),
        (dict(rope_scaling={"type": "linear"}), "rope_scaling factor None: must be a positive number"),
        (dict(rope_scaling={"type": "longrope", "short_factor": [1.0] * 4}), "long_factor None: must be a list of numbers"),
        (dict(rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0]}), "longrope needs 4 of each"),
        (dict(rope_scaling={"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}), "high_freq_factor 4.0: must be above"),
        (dict(hidden_size="24"), "hidden_size '24': must be a positive integer"),
        (dict(hidden_size=None), "hidden_size None"),
        (dict(rms_norm_eps=True), "rms_norm_eps True: must be a positive number"),
        (dict(num_hidden_layers=0), "num_hidden_layers 0: must be a positive integer"),
        (dict(tie_word_embeddings=1), "tie_word_embeddings 1: must be true or false"),
        (dict(num_key_value_heads=3), "--model.kv_heads 3"),
        (dict(dtype="int8"), "dtype 'int8': not one of float64, float32, float16, bfloat16"),
        (dict(model_type="gpt2", architectures=None, activation_function="relu"), "activation_function 'relu'"),
        (dict(model_type="gpt2", architectures=None, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx True"),
        (dict(model_type="gpt2", architectures=None, scale_attn_weights=False), "scale_attn_weights False"),
        (dict(model_type="gpt2", architectures=None, reorder_and_upcast_attn=True), "reorder_and_upcast_attn True"),
        (dict(model_type="gpt2", architectures=None, add_cross_attention=True), "add_cross_attention True"),
        (dict(model_type="mistral", architectures=None, layer_types=["full_attention", "sliding_attention", "full_attention"]), "the same for all"),
        (dict(model_type="qwen2", architectures=None, layer_types=["sliding_attention"] * 3), "use_sliding_window false"),
        (dict(model_type="qwen3", architectures=None, layer_types=["chunked_attention"] * 3), "layer_types ['chunked_attention'"),
        (dict(model_type="qwen3", architectures=None, layer_types=["full_attention"]), "for each of 3 layers"),
        (dict(model_type="gemma2", architectures=None, use_bidirectional_attention=True), "use_bidirectional_attention True"),
        (dict(model_type="gemma2", architectures=None, hidden_activation="gelu"), "hidden_activation 'gelu'"),
    ],
)  # fmt: skip
def test_configs_that_our_model_has_not_name_file_key_and_value(changed, message, tmp_path):
    folder = tmp_path / "model"
    save_hf(build(tied=False), folder)
    (folder / "config.json").write_text(json.dumps(LLAMA | changed))
    with pytest.raises(ValueError) as caught:
        load_hf(folder)
    assert message in str(caught.value) and str(folder / "config.json") in str(caught.value) and "\n" not in str(caught.value)


JSON = st.one_of(st.none(), st.booleans(), st.integers(-2, 5), st.floats(), st.text(max_size=3), st.lists(st.integers(0, 3), max_size=4), st.just({}),
                 st.just({"factor": 2.0}))  # fmt: skip
ROPE_KEYS = {key for keys in families._ROPE.values() for key in keys.values()} | {"rope_theta", "mscale", "mscale_all_dim", "truncate"}
ROPE = st.dictionaries(st.sampled_from(sorted(ROPE_KEYS)), JSON)
ROPES = st.builds(lambda kind, rope: {"rope_type": kind, **rope}, JSON | st.sampled_from(sorted(families._ROPE)), ROPE)


@given(st.data())
def test_no_config_whatever_ends_in_anything_but_one_line(data):
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    known = sorted({*FAMILIES[family].keys, *FAMILIES[family].only, *families._EVERYWHERE, "layer_types", "sliding_window", "max_window_layers",
                    "use_sliding_window", "query_pre_attn_scalar", "rope_theta", "architectures", "model_type"})  # fmt: skip
    changed = data.draw(st.dictionaries(st.sampled_from(known), JSON, max_size=3) | st.builds(lambda r: {"rope_parameters": r}, ROPES))
    content = {"model_type": family, "num_hidden_layers": 3, "hidden_size": 24, "head_dim": 8, "use_sliding_window": True} | changed
    try:
        _, c = model_config(content, "config.json")
    except ValueError as error:
        assert str(error).startswith("config.json: ") and "\n" not in str(error)
        return
    assert canonical(c) == c
    try:
        written = hf_config(c)
    except ValueError as error:  # transformers has no room for a part of a head, nor for Gemma's scale where its key is no integer
        assert str(error).startswith(("--model.heads=", "--model.attention_scale=")) and "\n" not in str(error)
    else:
        assert model_config(written, "again") == (written["model_type"], c)


def rewrite(folder, change):
    """Change a directory's tensors as a dict."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("model.norm.weight"), "missing tensor model.norm.weight"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], "missing tensors model.layers.1.input_layernorm.weight, "),
        (lambda t: t.update({"model.norm.bias": torch.zeros(3)}), "unknown tensor model.norm.bias"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "model.safetensors: tensor model.norm.weight is (3,), config.json makes it (24"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(24, dtype=torch.int8)}), "tensor model.norm.weight is I8"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(24).to(torch.float8_e4m3fn)}), "tensor model.norm.weight is F8_E4M3; only F64, "),
        (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}), "lm_head.weight differs from model.embed_tokens.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    folder = tmp_path / "model"
    save_hf(build(), folder)
    rewrite(folder, change)
    with pytest.raises(ValueError) as caught:
        load_hf(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tied_head_and_old_buffers_may_be_stored(tmp_path):
    model = build()
    save_hf(model, tmp_path / "model")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone(), **more}))
    back = load_hf(tmp_path / "model")
    assert equal(model.named_parameters(), back.named_parameters()) and back.head.weight is back.embed.weight


def move_a_tensor(folder, index):
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00004.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def twice(folder, index):
    (folder / "model-00002-of-00004.safetensors").write_bytes((folder / "model-00001-of-00004.safetensors").read_bytes())


def outside(folder, index):
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda d, i: (d / "model-00002-of-00004.safetensors").unlink(), "names the file 'model-00002-of-00004.safetensors', which is not there"),
        (lambda d, i: [p.write_bytes(p.read_bytes()[:-4]) for p in d.glob("*3-of*")], "3-of-00004.safetensors: not a safetensors file, or damaged"),
        (lambda d, i: [p.write_bytes(b"\x80\x04pickle") for p in d.glob("*3-of*")], "model-00003-of-00004.safetensors: not a safetensors file"),
        (lambda d, i: [p.write_text("version https://git-lfs.github.com/spec/v1\n") for p in d.glob("*3-of*")], "a git-lfs pointer in its"),
        (move_a_tensor, "model-00001-of-00004.safetensors: tensor 'model.norm.weight' is missing, though"),
        (twice, "model-00002-of-00004.safetensors: tensor 'model.embed_tokens.weight' is in model-00001-of-00004.safetensors too"),
        (outside, "names the file '../model.safetensors'"),
        (lambda d, i: (d / "model.safetensors.index.json").write_text("{"), "model.safetensors.index.json: not valid JSON"),
        (lambda d, i: (d / "model.safetensors.index.json").write_text('{"weight_map": []}'), "weight_map []: must name a file for each tensor"),
        (lambda d, i: (d / "model.safetensors.index.json").unlink(), "index.json, only model-00001-of-00004.safetensors, "),
        (lambda d, i: (d / "config.json").unlink(), "config.json: No such file"),
        (lambda d, i: (d / "config.json").write_text("[]"), "config.json: must hold a JSON object"),
        (lambda d, i: [(d / "model.safetensors.index.json").rename(d / "x"), (d / "pytorch_model.bin").touch()], "pytorch_model.bin: a pickle"),
    ],
)  # fmt: skip
def test_damaged_directories_name_the_file(damage, message, tmp_path):
    folder = tmp_path / "model"
    save_hf(build(tied=False), folder, max_shard_bytes=20000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    damage(folder, index)
    with pytest.raises(ValueError) as caught:
        load_hf(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_dtype_is_what_is_stored_or_asked_for(tmp_path):
    model = build(torch.bfloat16)
    save_hf(model, tmp_path / "model")
    assert load_hf(tmp_path / "model").embed.weight.dtype == torch.bfloat16
    file = tmp_path / "model/config.json"
    content = json.loads(file.read_text())
    assert content["dtype"] == content["torch_dtype"] == "bfloat16"
    for key in ("dtype", "torch_dtype"):
        file.write_text(json.dumps({k: v for k, v in content.items() if "dtype" not in k} | {key: "float32"}))
        assert load_hf(tmp_path / "model").embed.weight.dtype == torch.float32
    file.write_text(json.dumps({k: v for k, v in content.items() if "dtype" not in k}))
    assert load_hf(tmp_path / "model").embed.weight.dtype == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device cuda: this machine has no usable NVIDIA GPU"):
            load_hf(tmp_path / "model", device="cuda")


@pytest.mark.parametrize("options", [{}, dict(positions="learned", norm="layer", activation="gelu", bias=True, kv_heads=4, head_dim=6)])
def test_values_that_a_narrower_dtype_cannot_hold_are_named(options, tmp_path):
    model = build(torch.bfloat16, **options)
    with torch.no_grad():
        model.blocks["1"].attention.k_proj.weight[3, 5] = -70000.0
    save_hf(model, tmp_path / "model")
    name = "transformer.h.1.attn.c_attn.weight" if options else "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=f"model.safetensors: tensor {name} goes beyond 65504, the largest of torch.float16; take another dtype"):
        load_hf(tmp_path / "model", dtype=torch.float16)
    assert load_hf(tmp_path / "model", dtype=torch.float32).blocks["1"].attention.k_proj.weight[3, 5] < -69000


def test_what_is_no_directory_says_what_to_do(tmp_path):
    save_hf(build(), tmp_path / "model")
    with pytest.raises(ValueError, match="^meta-llama/Llama-3.2-1B: no such directory; train a model first, or fetch one, as with `hf download "):
        load_hf("meta-llama/Llama-3.2-1B")
    with pytest.raises(ValueError, match="config.json: is a file; name the directory that holds it"):
        load_hf(tmp_path / "model/config.json")


def test_the_links_of_the_hub_cache_and_any_name_are_followed(tmp_path):
    model, snapshot = build(), tmp_path / "models--m\u00f6 \u4e16/snapshots/0123"
    save_hf(model, tmp_path / "model", max_shard_bytes=20000)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "model").iterdir())):
        blob = snapshot.parents[1] / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert equal(model.named_parameters(), load_hf(f"{snapshot}/").named_parameters())
    blob.unlink()
    with pytest.raises(ValueError, match="0123: has neither model.safetensors nor"):
        load_hf(snapshot)


def test_ids_that_the_model_has_not_are_not_written(tmp_path):
    class Larger:
        bos, eos, pad, stop_ids = 0, 49, 50, {49}

    save_hf(build(), tmp_path / "model", tokenizer=Larger)
    content = json.loads((tmp_path / "model/config.json").read_text())
    assert [content[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [0, 49, None]


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path, monkeypatch):
    model = build()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="mine: exists and is not an empty directory"):
        save_hf(model, tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    save_hf(model, tmp_path / "empty")

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.Tensor, "cpu", full)
    with pytest.raises(OSError) as caught:
        save_hf(model, tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out/model.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "mine"] and [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_model_with_more_on_it_is_refused(tmp_path):
    model = build()
    model.blocks["0"].attention.q_proj.register_parameter("lora_a", torch.nn.Parameter(torch.zeros(2)))
    model.blocks["0"].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="parameter 'blocks.0.extra.weight': a llama model has no such part"):
        save_hf(model, tmp_path / "out")


MEMORY = """
import sys, threading, torch
from nanotrain.model.hf import load_hf, save_hf
from nanotrain.model.build import empty_model
from nanotrain.model.transformer import ModelConfig

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def grown(work):
    peak, done, start = [0], threading.Event(), anonymous()
    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous() - start)
    thread = threading.Thread(target=watch)
    thread.start()
    result = work()
    done.set()
    thread.join()
    return result, max(peak[0], anonymous() - start)

c = ModelConfig(width=768, layers=4, heads=12, vocab_size=20000, tied=False, **eval_options).resolved(frozenset(ModelConfig.__dataclass_fields__))
model = empty_model(c, dtype=torch.float32, device="cpu")
with torch.no_grad():
    for p in model.parameters():
        p.fill_(0.5)
size = sum(p.numel() * 4 for p in model.parameters())
_, saving = grown(lambda: save_hf(model, sys.argv[1]))
del model
back, loading = grown(lambda: load_hf(sys.argv[1]))
assert all((p == 0.5).all() for p in back.parameters())
print(size, saving, loading)
"""


@pytest.mark.parametrize("options", ["", "positions='learned', norm='layer', activation='gelu', bias=True"])
def test_a_model_is_never_twice_in_memory(options, tmp_path):
    code = MEMORY.replace("**eval_options", options)
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, saving, loading = map(int, done.stdout.split())
    assert size > 200e6 and saving < 0.25 * size and 0.7 * size < loading < 1.1 * size, (saving / size, loading / size)


# Beside transformers

SCALINGS = {
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=4.0),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "yarn_all": dict(rope_type="yarn", factor=4.0, beta_fast=8.0, beta_slow=0.5, attention_factor=1.2, truncate=False,
                     original_max_position_embeddings=16),
    "yarn_mscale": dict(rope_type="yarn", factor=8.0, mscale=1.0, mscale_all_dim=0.5, original_max_position_embeddings=16),
    "yarn_no_factor": dict(rope_type="yarn", factor=None, original_max_position_embeddings=4),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=0.5, high_freq_factor=3.0, original_max_position_embeddings=12),
    "longrope": dict(rope_type="longrope", factor=4.0, short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[1.5, 2.0, 4.0, 7.0],
                     original_max_position_embeddings=16),
    "longrope_no_factor": dict(rope_type="longrope", short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[1.5, 2.0, 4.0, 7.0],
                               original_max_position_embeddings=8),
    "longrope_attention": dict(rope_type="longrope", factor=4.0, attention_factor=1.3, short_factor=[1.0, 1.5, 2.0, 3.0],
                               long_factor=[1.5, 2.0, 4.0, 7.0], original_max_position_embeddings=16),
}  # fmt: skip
S, F_ = "sliding_attention", "full_attention"
THEIRS = {
    **{f"llama_{name}": ("llama", dict(rope_parameters={"rope_theta": 1e4, **rope}, max_position_embeddings=16)) for name, rope in SCALINGS.items()},
    "llama_tied_biases": ("llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama_mha": ("llama", dict(num_key_value_heads=4, head_dim=None, rope_parameters={"rope_type": "default", "rope_theta": 300.0})),
    "mistral": ("mistral", dict(sliding_window=5)),
    "mistral_no_window": ("mistral", dict(sliding_window=None, tie_word_embeddings=True)),
    "qwen2": ("qwen2", dict()),
    "qwen2_windows": ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True)),
    "qwen2_layer_types": ("qwen2", dict(use_sliding_window=True, sliding_window=5, layer_types=[S, F_, S])),
    "qwen3": ("qwen3", dict(tie_word_embeddings=True)),
    "qwen3_windows_biases": ("qwen3", dict(use_sliding_window=True, sliding_window=5, max_window_layers=2, attention_bias=True)),
    "qwen3_yarn": ("qwen3", dict(rope_parameters={"rope_theta": 1e6, **SCALINGS["yarn"]}, num_key_value_heads=1)),
    "gemma2": ("gemma2", dict(sliding_window=5, query_pre_attn_scalar=20, attn_logit_softcapping=4.0, final_logit_softcapping=5.0)),
    "gemma2_bare": ("gemma2", dict(sliding_window=5, attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=False,
                                   attention_bias=True, layer_types=[F_, F_, S])),
    "gpt2": ("gpt2", dict()),
    "gpt2_inner_untied": ("gpt2", dict(n_inner=36, tie_word_embeddings=False, activation_function="gelu_pytorch_tanh", layer_norm_epsilon=1e-3)),
}  # fmt: skip


def theirs_of(family, options):
    import transformers

    kinds = {"gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2"}
    shape = dict(vocab_size=50, n_embd=24, n_layer=3, n_head=4, n_positions=64) if family == "gpt2" else dict(TINY, max_position_embeddings=64)
    tokens = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    c = getattr(transformers, f"{kinds[family]}Config")(**(shape | tokens | options), attn_implementation="eager")
    return stirred(getattr(transformers, FAMILIES[family].architecture)(c)).eval()


def from_pretrained(folder):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


@pytest.mark.parametrize("option", THEIRS)
class TestTheirsIn:
    pytestmark = extras

    def test_logits_and_bits(self, option, tmp_path):
        family, options = THEIRS[option]
        theirs = theirs_of(family, options)
        theirs.save_pretrained(tmp_path / "whole")
        theirs.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
        assert (tmp_path / "shards/model.safetensors.index.json").is_file()
        ours = load_hf(tmp_path / "whole")
        assert equal(ours.named_parameters(), load_hf(tmp_path / "shards").named_parameters())
        same(ours, theirs)
        save_hf(ours, tmp_path / "back")
        back = from_pretrained(tmp_path / "back")
        assert equal(theirs.state_dict(), back.state_dict())
        same(ours, back)

    def test_a_config_of_transformers_4_means_the_same(self, option, tmp_path):
        """As it was written then: rope_theta with rope_scaling and its `type`, no layer_types unless they say more, torch_dtype."""
        family, options = THEIRS[option]
        new = json.loads(theirs_of(family, options).config.to_json_string(use_diff=False))
        old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype", "layer_types")}
        if "layer_types" in options:
            old["layer_types"] = options["layer_types"]
        if rope := dict(new.get("rope_parameters") or {}):
            old["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
            old["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None
        assert model_config(old, "old") == model_config(new, "new")


@pytest.mark.parametrize("option", OURS)
class TestOursOut:
    pytestmark = extras

    def test_logits(self, option, tmp_path):
        _, options = OURS[option]
        ours = build(**options)
        save_hf(ours, tmp_path / "model", max_shard_bytes=20000)
        theirs = from_pretrained(tmp_path / "model")
        assert theirs.dtype == torch.float32
        same(ours, theirs)


class TestMore:
    pytestmark = extras

    @pytest.mark.parametrize("family", FAMILIES)
    def test_absent_keys_have_the_defaults_of_their_classes(self, family):
        """An empty config.json, and one in which transformers has written out its own defaults."""
        from transformers import AutoConfig

        written = json.loads(AutoConfig.for_model(family).to_json_string(use_diff=False))
        assert model_config({"model_type": family}, "empty") == model_config(written, "written")

    def test_gpt2_without_its_head(self, tmp_path):
        theirs = theirs_of("gpt2", {})
        theirs.transformer.save_pretrained(tmp_path / "base")
        same(load_hf(tmp_path / "base"), theirs)

    @pytest.mark.parametrize("option", ["gemma2", "qwen2_windows", "gpt2"])
    def test_greedy_continuations_are_theirs(self, option, tmp_path):
        theirs = theirs_of(*THEIRS[option])
        theirs.save_pretrained(tmp_path / "model")
        ours, tokens = load_hf(tmp_path / "model"), tokens_of(10)
        want = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=20, pad_token_id=0)
        for _ in range(20):
            tokens = torch.cat([tokens, logits(ours, tokens)[:, -1:].argmax(-1)], 1)
        assert torch.equal(tokens, want)

    @pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "llama3", "longrope"])
    def test_rope_frequencies_at_published_sizes(self, kind):
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        from nanotrain.model.positions import rope_frequencies

        length = 40000
        factors = dict(short_factor=[1 + i / 64 for i in range(32)], long_factor=[1.0 + i for i in range(32)])
        rope = SCALINGS[kind] | (factors if kind == "longrope" else {}) | {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
        c = LlamaConfig(hidden_size=2048, num_attention_heads=32, head_dim=64, max_position_embeddings=32768, rope_parameters=dict(rope))
        _, ours = model_config(json.loads(c.to_json_string(use_diff=False)), "published")
        got, factor = rope_frequencies(ours, length)
        if kind == "default":
            want, their_factor = 1 / 5e5 ** (torch.arange(0, 64, 2) / 64), 1.0
        else:
            want, their_factor = ROPE_INIT_FUNCTIONS[kind](c, "cpu", seq_len=length)
        torch.testing.assert_close(got.float(), want, rtol=1e-5, atol=0)
        assert factor == pytest.approx(their_factor) and ours.rope_scaling == ("none" if kind == "default" else kind)
