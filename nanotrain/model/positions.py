"""Constants by which attention knows order: rotary frequencies with every way of stretching them, and ALiBi's slopes.

Sources: RoPE arXiv 2104.09864; linear arXiv 2306.15595; NTK-aware: a change of base by the factor (ntk), or by how far the
sequence goes beyond the original context (dynamic); YaRN arXiv 2309.00071; llama3 as in Llama 3.1; LongRoPE arXiv 2402.13753;
ALiBi arXiv 2108.12409.
"""

from __future__ import annotations

import math
from functools import cache

import torch


def rope_frequencies(c, length: int = 0) -> tuple[torch.Tensor, float]:
    """Rotary frequencies (D / 2,) in float64 [radians per token] of a resolved ModelConfig, and the factor on cos and sin.

    `length` [tokens], the longest sequence they are for, decides with `dynamic` and `longrope` only.
    """
    D, base, factor, original = c.head_dim, c.rope_theta, c.rope_factor, c.rope_original_context
    if c.rope_scaling == "dynamic":
        factor = max(1.0, factor * length / original - (factor - 1))
    if c.rope_scaling in ("ntk", "dynamic"):
        base = base * factor ** (D / (D - 2))
    exponent = torch.arange(0, D, 2, dtype=torch.float64) / D
    frequencies = base**-exponent
    if c.rope_scaling == "linear":
        return frequencies / factor, 1.0
    if c.rope_scaling == "llama3":
        turns, high = original * frequencies / (2 * math.pi), c.rope_high or 4.0
        keep = ((turns - c.rope_low) / (high - c.rope_low)).clamp(0, 1)
        return frequencies * keep + frequencies / factor * (1 - keep), 1.0
    if c.rope_scaling == "yarn":

        def channel(turns):
            return D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        first, last = channel(c.rope_high or 32.0), channel(c.rope_low)
        if not c.rope_untruncated:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, D - 1)
        ramp = ((torch.arange(D // 2, dtype=torch.float64) - first) / (last - first or 0.001)).clamp(0, 1)
        attention_factor = 1.0 if factor <= 1.0 else 0.1 * math.log(factor) + 1.0
        return frequencies / factor * ramp + frequencies * (1 - ramp), c.rope_attention_factor or attention_factor
    if c.rope_scaling == "longrope":
        divisors = c.rope_long_factors if length > original else c.rope_short_factors
        attention_factor = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
        return frequencies / torch.tensor(divisors, dtype=torch.float64), c.rope_attention_factor or attention_factor
    return frequencies, 1.0


@cache
def alibi_slopes(heads: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """ALiBi's slope of each head (H,): powers of 2^(-8/n) for n heads a power of two, else interleaved with the next power's."""
    n = 2 ** math.floor(math.log2(heads))
    i = torch.arange(heads, device=device, dtype=torch.float64)  # made where they are used: to copy a list there, the host would wait
    return torch.exp2(torch.where(i < n, -8 * (i + 1) / n, -4 * (2 * (i - n) + 1) / n)).float()
