"""How models of Hugging Face map to ours: FAMILIES has for each kind what its config.json and its tensors' names mean here.

Reading and writing both follow it. Whatever a family has and our model has not is an error, never a guess: reading refuses it, and
a model is written as the first family whose config.json reads back as the very same ModelConfig.

Defaults of absent keys are those of the configuration classes of transformers 5 (models/<family>/configuration_<family>.py); both
its rope_parameters and the older rope_theta with rope_scaling are read and written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nanotrain.model.transformer import ModelConfig

_LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "blocks.*.attention_norm": "model.layers.*.input_layernorm",
    "blocks.*.attention.q_proj": "model.layers.*.self_attn.q_proj",
    "blocks.*.attention.k_proj": "model.layers.*.self_attn.k_proj",
    "blocks.*.attention.v_proj": "model.layers.*.self_attn.v_proj",
    "blocks.*.attention.o_proj": "model.layers.*.self_attn.o_proj",
    "blocks.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
    "blocks.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
    "blocks.*.mlp_norm": "model.layers.*.post_attention_layernorm",
    "blocks.*.mlp.gate_proj": "model.layers.*.mlp.gate_proj",
    "blocks.*.mlp.up_proj": "model.layers.*.mlp.up_proj",
    "blocks.*.mlp.down_proj": "model.layers.*.mlp.down_proj",
    "head.norm": "model.norm",
    "head": "lm_head",
}
_GEMMA2_NAMES = _LLAMA_NAMES | {
    "blocks.*.attention_post_norm": "model.layers.*.post_attention_layernorm",
    "blocks.*.mlp_norm": "model.layers.*.pre_feedforward_layernorm",
    "blocks.*.mlp_post_norm": "model.layers.*.post_feedforward_layernorm",
}
_GPT2_NAMES = {
    "embed": "transformer.wte",
    "embed_positions": "transformer.wpe",
    "blocks.*.attention_norm": "transformer.h.*.ln_1",
    "blocks.*.attention.q_proj": "transformer.h.*.attn.c_attn",  # q, k and v in one, side by side
    "blocks.*.attention.k_proj": "transformer.h.*.attn.c_attn",
    "blocks.*.attention.v_proj": "transformer.h.*.attn.c_attn",
    "blocks.*.attention.o_proj": "transformer.h.*.attn.c_proj",
    "blocks.*.mlp_norm": "transformer.h.*.ln_2",
    "blocks.*.mlp.up_proj": "transformer.h.*.mlp.c_fc",
    "blocks.*.mlp.down_proj": "transformer.h.*.mlp.c_proj",
    "head.norm": "transformer.ln_f",
    "head": "lm_head",
}


@dataclass(frozen=True)
class Family:
    """How one kind of model is written by Hugging Face."""

    architecture: str
    names: dict[str, str]
    """Our module -> theirs; * is a layer's number."""
    keys: dict[str, tuple[str, Any]]
    """Key of config.json -> our keys that take its value, and the value where it is absent."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Our keys, away from their defaults, that are the same in every model of the family."""
    only: dict[str, tuple] = field(default_factory=dict)
    """Key of config.json -> the values of it that our model has; the first where it is absent."""
    window: str = ""
    """Which layers have the sliding window where layer_types does not say: none (empty), "all", "alternate" or "late" ones."""
    whole_heads: bool = False
    """transformers refuses a width that the number of heads does not divide."""
    transposed: bool = False
    """Matrices of the blocks are stored (in, out)."""


def _keys(vocab_size, width, ffn_width, layers, heads, kv_heads, head_dim, context, tied=False, biases=True) -> dict[str, tuple[str, Any]]:
    return {
        "vocab_size": ("vocab_size", vocab_size),
        "hidden_size": ("width", width),
        "intermediate_size": ("ffn_width", ffn_width),
        "num_hidden_layers": ("layers", layers),
        "num_attention_heads": ("heads", heads),
        "num_key_value_heads": ("kv_heads", kv_heads),
        "head_dim": ("head_dim", head_dim),
        "max_position_embeddings": ("context", context),
        "rms_norm_eps": ("norm_eps", 1e-6),
        "tie_word_embeddings": ("tied", tied),
    } | ({"attention_bias": ("attention_bias output_bias", False)} if biases else {})


_SILU = {"hidden_act": ("silu", "swish")}
FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", _GPT2_NAMES,
        {
            "vocab_size": ("vocab_size", 50257), "n_embd": ("width", 768), "n_inner": ("ffn_width", None), "n_layer": ("layers", 12),
            "n_head": ("heads", 12), "n_positions": ("context", 1024), "layer_norm_epsilon": ("norm_eps", 1e-5),
            "tie_word_embeddings": ("tied", True),
        },
        dict(positions="learned", norm="layer", activation="gelu", bias=True),
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,), "add_cross_attention": (False,),
            "architectures": (["GPT2LMHeadModel"], ["GPT2Model"], None),
        },
        whole_heads=True, transposed=True,
    ),
    "llama": Family(
        "LlamaForCausalLM", _LLAMA_NAMES, _keys(32000, 4096, 11008, 32, 32, None, None, 2048) | {"mlp_bias": ("mlp_bias", False)}, only=_SILU,
        whole_heads=True,
    ),
    "mistral": Family(
        "MistralForCausalLM", _LLAMA_NAMES, _keys(32000, 4096, 14336, 32, 32, 8, None, 131072, biases=False), only=_SILU, window="all",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", _LLAMA_NAMES, _keys(151936, 4096, 22016, 32, 32, 32, None, 32768, biases=False), dict(attention_bias=True),
        _SILU | {"use_mrope": (False, None)}, window="late",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", _LLAMA_NAMES, _keys(151936, 4096, 22016, 32, 32, 32, 128, 32768), dict(qk_norm=True), _SILU, window="late",
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", _GEMMA2_NAMES,
        _keys(256000, 2304, 9216, 26, 8, 4, 256, 8192, tied=True)
        | {"attn_logit_softcapping": ("attention_softcap", 50.0), "final_logit_softcapping": ("logit_softcap", 30.0)},
        dict(activation="geglu", norm_position="sandwich", norm_offset=1.0, scale_embedding=True),
        {"hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (None, False)}, window="alternate", whole_heads=True,
    ),
}  # fmt: skip
"""By model_type. A model of ours is written as the first of them that can say all of it."""

_EVERYWHERE = {"quantization_config": (None,), "is_encoder_decoder": (False,), "partial_rotary_factor": (1.0, None)}
"""What `only` holds for every family."""
_NULLABLE = ("num_key_value_heads", "head_dim", "n_inner", "attn_logit_softcapping", "final_logit_softcapping")
"""Keys of config.json that may be null: our 0."""

_ORIGINAL = {"rope_original_context": "original_max_position_embeddings"}
_ROPE = {
    "none": {},
    "linear": {"rope_factor": "factor"},
    "dynamic": {"rope_factor": "factor"},  # beyond max_position_embeddings
    "llama3": {"rope_factor": "factor", "rope_low": "low_freq_factor", "rope_high": "high_freq_factor", **_ORIGINAL},
    "yarn": {
        "rope_factor": "factor", "rope_low": "beta_slow", "rope_high": "beta_fast", "rope_attention_factor": "attention_factor", **_ORIGINAL,
    },
    "longrope": {
        "rope_factor": "factor", "rope_short_factors": "short_factor", "rope_long_factors": "long_factor",
        "rope_attention_factor": "attention_factor", **_ORIGINAL,
    },
}  # fmt: skip
"""rope_scaling, theirs by the same name as rope_type (our none is their default): our keys -> theirs."""
_OPTIONAL = ("beta_slow", "beta_fast", "attention_factor")
"""Of those, the ones that may be absent: the method's own."""


def model_config(config: dict[str, Any], where: str) -> tuple[str, ModelConfig]:
    """Family and resolved ModelConfig of a config.json's content. ValueError naming `where`, key and value for what our model has not."""
    name = config.get("model_type")
    if str(name) not in FAMILIES:
        raise ValueError(f"{where}: model_type {name!r}: not a family that nanotrain reads; those are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    only = _EVERYWHERE | {"architectures": ([family.architecture], None)} | family.only
    for key, allowed in only.items():
        if (value := config.get(key, allowed[0])) not in allowed:
            raise ValueError(f"{where}: {key} {value!r:.80}: nanotrain's model has it only as {' or '.join(map(repr, allowed))}")
    values = dict(family.fixed)
    for key, (ours, default) in family.keys.items():
        first, *others = ours.split()
        value = _typed(config.get(key, default), type(getattr(ModelConfig(), first)), f"{where}: {key}", key in _NULLABLE)
        values |= dict.fromkeys([first, *others], value)
    values["ffn_width"] = values["ffn_width"] or 4 * values["width"]
    if name == "gemma2":
        values["attention_scale"] = _typed(config.get("query_pre_attn_scalar", 256), float, f"{where}: query_pre_attn_scalar") ** -0.5
    if family.window:
        values |= _read_windows(config, family.window, values["layers"], where)
    if name != "gpt2":
        values |= _read_rope(config, values["context"], where)
    try:
        return name, canonical(ModelConfig(**values).resolved(_EVERY_KEY))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def hf_config(c: ModelConfig) -> dict[str, Any]:
    """The content of config.json for a resolved ModelConfig. ValueError naming the options where no family has them all."""
    wanted, lost = canonical(c), {}
    for name, family in FAMILIES.items():
        config = {"architectures": [family.architecture], "model_type": name}
        for key, (ours, _) in family.keys.items():
            value = getattr(wanted, ours.split()[0])
            config[key] = None if value == 0 and key in _NULLABLE else value
        config |= {key: allowed[0] for key, allowed in family.only.items()}
        if name == "gemma2":
            config["query_pre_attn_scalar"] = round((wanted.attention_scale or wanted.head_dim**-0.5) ** -2)
        if family.window:
            config |= _write_windows(wanted, family.window)
        if name != "gpt2":
            config |= _write_rope(wanted)
        try:
            read = model_config(config, name)[1]
        except ValueError:
            continue
        lost[name] = [key for key in sorted(_EVERY_KEY) if getattr(read, key) != getattr(wanted, key)]
        if family.whole_heads and wanted.width % wanted.heads:
            lost[name].append("heads")
        if not lost[name]:
            return config
    nearest = min(lost, key=lambda name: len(lost[name]))
    options = " ".join(f"--model.{key}={getattr(wanted, key)}" for key in lost[nearest])
    raise ValueError(f"{options}: no Hugging Face family has a model with that (the nearest is {nearest}); only one without can be written")


def canonical(c: ModelConfig) -> ModelConfig:
    """The resolved config of the same function in which every key that plays no part has its default, so that equal models are equal.

    Keys of training (initial weights, dropout, recomputation) play none; `ntk` is another base.
    """
    default = ModelConfig()
    idle = {"preset", "init_std", "dropout", "embedding_dropout", "recompute"} | ({"norm_offset"} if c.norm == "layer" else {"bias"})
    if c.positions == "rope" and c.rope_scaling == "ntk":
        c = replace(c, rope_theta=c.rope_theta * c.rope_factor ** (c.head_dim / (c.head_dim - 2)), rope_scaling="none")
    if c.positions == "rope" and c.rope_scaling == "dynamic":
        c = replace(c, context=c.rope_original_context)
    rope = {key for key in _EVERY_KEY if key.startswith("rope_")}
    if c.positions == "rope":
        rope -= {"rope_theta", "rope_scaling", *_ROPE[c.rope_scaling], *(["rope_untruncated"] if c.rope_scaling == "yarn" else [])}
    c = replace(c, **{key: getattr(default, key) for key in idle | rope})
    letters = (c.window_pattern * c.layers)[: c.layers]
    pattern = next(letters[:n] for n in range(1, len(letters) + 1) if (letters[:n] * c.layers)[: c.layers] == letters)
    window, pattern = (c.window, pattern) if c.window and pattern != "f" else (0, default.window_pattern)
    return replace(
        c,
        window=window,
        window_pattern=pattern,
        attention_scale=0.0 if c.attention_scale == c.head_dim**-0.5 else c.attention_scale,
        rope_original_context=c.rope_original_context or c.context,
        rope_high=c.rope_high or {"yarn": 32.0, "llama3": 4.0}.get(c.rope_scaling, 0.0),
    )


_EVERY_KEY = frozenset(f.name for f in fields(ModelConfig))


def _typed(value, kind: type, where: str, nullable: bool = False):
    """A value of config.json as bool, int, float or tuple of floats; numbers are positive, and null is 0 where it may be."""
    if value is None and nullable:
        return kind(0)
    if kind is tuple and isinstance(value, list):
        return tuple(_typed(item, float, where) for item in value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 < value < math.inf:
        return kind(value)
    expected = {bool: "true or false", int: "a positive integer", float: "a positive number", tuple: "a list of numbers"}[kind]
    raise ValueError(f"{where} {value!r}: must be {expected}")


def _read_windows(config, window: str, layers: int, where: str) -> dict[str, Any]:
    size = config.get("sliding_window", 4096)
    if window == "late" and not config.get("use_sliding_window", False):
        size = None
    if size is not None:
        size = _typed(size, int, f"{where}: sliding_window")
    first = config.get("max_window_layers", 28) if window == "late" else 0
    if not isinstance(first, int):
        raise ValueError(f"{where}: max_window_layers {first!r}: must be an integer")
    full = [size is None or layer < first or (window == "alternate" and layer % 2) for layer in range(layers)]
    types = config.get("layer_types") or ["full_attention" if f else "sliding_attention" for f in full]
    counts = [types.count(kind) for kind in ("sliding_attention", "full_attention")] if isinstance(types, list) else []
    if sum(counts) != layers or len(types) != layers or (window == "all" and all(counts)):
        same = ", the same for all" if window == "all" else ""
        raise ValueError(f"{where}: layer_types {types!r}: must be sliding_attention or full_attention for each of {layers} layers{same}")
    if size is None and counts[0]:
        raise ValueError(f"{where}: layer_types has sliding_attention, but sliding_window is null or use_sliding_window false")
    return dict(window=size or 0, window_pattern="".join(kind[0] for kind in types))


def _write_windows(c: ModelConfig, window: str) -> dict[str, Any]:
    letters = (c.window_pattern * c.layers)[: c.layers] if c.window else "f" * c.layers
    types = {"layer_types": ["sliding_attention" if letter == "s" else "full_attention" for letter in letters]}
    if window == "all":
        return {"sliding_window": c.window or None}
    if window == "alternate":  # with no sliding layer transformers wants a size all the same
        return {"sliding_window": c.window or c.context, **types}
    return {"use_sliding_window": bool(c.window), "sliding_window": c.window or None, "max_window_layers": (letters + "s").index("s"), **types}


def _read_rope(config, context: int, where: str) -> dict[str, Any]:
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    where = f"{where}: {key}"
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{where} {rope!r}: must be one set of parameters for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = "none" if kind == "default" else str(kind)
    if kind == "none" or scaling not in _ROPE:
        raise ValueError(f"{where} rope_type {kind!r}: not one of default, {', '.join(list(_ROPE)[1:])}")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(f"{where} partial_rotary_factor {rope['partial_rotary_factor']!r}: nanotrain's model turns whole heads")
    rope = {"rope_theta": config.get("rope_theta", 10000.0)} | rope
    if "rope_original_context" in _ROPE[scaling]:
        name = "original_max_position_embeddings"
        original = _typed(config.get(name) or rope.get(name) or context, int, f"{where} {name}")
        rope |= {name: original, "factor": rope.get("factor") or (context / original if kind != "llama3" else None)}
    values = {"rope_theta": _typed(rope["rope_theta"], float, f"{where} rope_theta"), "rope_scaling": scaling}
    for ours, theirs in _ROPE[scaling].items():
        if rope.get(theirs) is not None or theirs not in _OPTIONAL:
            values[ours] = _typed(rope.get(theirs), type(getattr(ModelConfig(), ours)), f"{where} {theirs}")
    if kind == "llama3" and values["rope_high"] <= values["rope_low"]:
        raise ValueError(f"{where} high_freq_factor {values['rope_high']}: must be above low_freq_factor {values['rope_low']}")
    if kind == "yarn":
        values["rope_untruncated"] = not rope.get("truncate", True)
        if rope.get("attention_factor") is None and rope.get("mscale") and rope.get("mscale_all_dim"):
            stretch = 0.1 * math.log(max(1.0, values["rope_factor"]))
            over, under = (1 + stretch * _typed(rope[name], float, f"{where} {name}") for name in ("mscale", "mscale_all_dim"))
            values["rope_attention_factor"] = over / under
    return values


def _write_rope(c: ModelConfig) -> dict[str, Any]:
    scaling = {theirs: getattr(c, ours) for ours, theirs in _ROPE[c.rope_scaling].items()}
    if not scaling.get("attention_factor", True):
        del scaling["attention_factor"]
    if c.rope_scaling == "yarn":
        scaling["truncate"] = not c.rope_untruncated
    scaling = {"rope_type": c.rope_scaling if scaling else "default"} | {k: list(v) if isinstance(v, tuple) else v for k, v in scaling.items()}
    older = None if c.rope_scaling == "none" else scaling
    beside = {"original_max_position_embeddings": c.rope_original_context} if c.rope_scaling == "longrope" else {}  # where transformers 4 looks
    return {"rope_theta": c.rope_theta, "rope_scaling": older, "rope_parameters": {"rope_theta": c.rope_theta, **scaling}, **beside}
