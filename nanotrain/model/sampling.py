"""Drawing the next token: what each setting does to the distribution, and an exact draw from it by one uniform number.

Order: repetition penalty, temperature, top-k, top-p, min-p, each on what the one before left, as in transformers.
Sources: top-p arXiv 1904.09751; min-p arXiv 2407.01082; repetition penalty arXiv 1909.05858.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanotrain.config import at_least


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    temperature: float = 0.8
    """Divides the logits [ratio]; 0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Draw only from so many of the most likely [tokens]; 0 is all."""
    top_p: float = 1.0
    """Draw only from the fewest tokens whose probabilities reach p [probability]."""
    min_p: float = 0.0
    """Draw only from tokens at least so likely beside the most likely one [ratio]; 0 is all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already in the text [ratio]; 1 is none."""
    max_tokens: int = 200
    """To write at most [tokens]."""
    seed: int = 0
    """Seed of the draws [any integer]; prompt number n of several has seed + n."""


def check_sampling(c: SamplingConfig) -> None:
    """Raise ValueError naming the flag for values that make no sense."""
    at_least(c, "sampling", 0, "temperature", "top_k")
    at_least(c, "sampling", 1, "max_tokens")
    if not 0 < c.top_p <= 1:
        raise ValueError(f"--sampling.top_p {c.top_p}: must lie in (0, 1]")
    if not 0 <= c.min_p <= 1:
        raise ValueError(f"--sampling.min_p {c.min_p}: must lie in [0, 1]")
    if not c.repetition_penalty > 0:
        raise ValueError(f"--sampling.repetition_penalty {c.repetition_penalty}: must be positive")


def penalised(logits_BV: torch.Tensor, seen_BV: torch.Tensor | None, c: SamplingConfig) -> torch.Tensor:
    """Logits with the repetition penalty on tokens marked in `seen_BV` (bool; None where there is no penalty)."""
    if c.repetition_penalty == 1.0:
        return logits_BV
    held = torch.where(logits_BV > 0, logits_BV / c.repetition_penalty, logits_BV * c.repetition_penalty)
    return torch.where(seen_BV, held, logits_BV)


_LIKELY = 256
"""Tokens looked at first for top-p: nearly always enough, and ten times cheaper than sorting a vocabulary."""


def distribution(logits_BV: torch.Tensor, seen_BV: torch.Tensor | None, c: SamplingConfig) -> torch.Tensor:
    """Probabilities (B, V) of the next token from logits in fp32 or float64, after every setting of `c`."""
    logits = penalised(logits_BV, seen_BV, c)
    if c.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    logits = (logits - logits.amax(-1, keepdim=True)) / c.temperature
    if 0 < c.top_k < logits.shape[-1]:
        values, indices = logits.topk(c.top_k)
        logits = torch.full_like(logits, -torch.inf).scatter_(1, indices, values)
    p = torch.softmax(logits, -1)
    if c.top_p < 1:
        ordered, indices = p.topk(min(_LIKELY, p.shape[-1]))
        if not bool((ordered.sum(-1) >= c.top_p).all()):
            ordered, indices = p.sort(descending=True)
        kept = ordered.cumsum(-1) - ordered < c.top_p  # the token that crosses p stays
        p = torch.zeros_like(p).scatter_(1, indices, ordered * kept)
    if c.min_p > 0:
        p = p * (p >= c.min_p * p.amax(-1, keepdim=True))
    return p / p.sum(-1, keepdim=True) if c.top_p < 1 or c.min_p > 0 else p


def draw(p_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """A token (B,) of each row's distribution by inverting its sum at a float64 uniform in [0, 1); never one of probability 0.

    Of probabilities that are no numbers, some token of the vocabulary.
    """
    sums = p_BV.cumsum(-1, dtype=torch.float64)
    at = (uniform_B.unsqueeze(-1) * sums[:, -1:]).clamp(max=torch.nextafter(sums[:, -1:], torch.zeros_like(sums[:, -1:])))
    return torch.searchsorted(sums, at, right=True).squeeze(-1).clamp(max=p_BV.shape[-1] - 1)
