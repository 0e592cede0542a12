"""Named shapes of the model: values of ModelConfig's keys. Parameter counts equal the published ones."""

from __future__ import annotations

_LLAMA = dict(activation="swiglu", norm="rms", positions="rope", tied=False, norm_eps=1e-5)
_GPT2 = dict(vocab_size=50257, context=1024, positions="learned", norm="layer", norm_eps=1e-5, activation="gelu", bias=True, tied=True)
_QWEN3 = dict(_LLAMA, vocab_size=151936, head_dim=128, kv_heads=8, context=40960, rope_theta=1e6, norm_eps=1e-6, qk_norm=True)
PRESETS: dict[str, dict] = {
    "nano": dict(width=256, layers=2, heads=4, context=512, qk_norm=True, tied=False),
    "gpt2-124m": dict(_GPT2, width=768, layers=12, heads=12),
    "gpt2-1558m": dict(_GPT2, width=1600, layers=48, heads=25),
    "llama2-7b": dict(_LLAMA, vocab_size=32000, width=4096, layers=32, heads=32, ffn_width=11008, context=4096),
    "llama2-70b": dict(_LLAMA, vocab_size=32000, width=8192, layers=80, heads=64, kv_heads=8, ffn_width=28672, context=4096),
    "llama3.2-1b": dict(_LLAMA, vocab_size=128256, width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn_width=8192, context=131072,
                        rope_theta=5e5, rope_scaling="llama3", rope_factor=32.0, rope_original_context=8192, tied=True),
    "llama3-8b": dict(_LLAMA, vocab_size=128256, width=4096, layers=32, heads=32, kv_heads=8, ffn_width=14336, context=8192, rope_theta=5e5),
    "mistral-7b": dict(_LLAMA, vocab_size=32000, width=4096, layers=32, heads=32, kv_heads=8, ffn_width=14336, context=32768, window=4096),
    "qwen3-0.6b": dict(_QWEN3, width=1024, layers=28, heads=16, ffn_width=3072, tied=True),
    "qwen3-8b": dict(_QWEN3, width=4096, layers=36, heads=32, ffn_width=12288),
}  # fmt: skip
