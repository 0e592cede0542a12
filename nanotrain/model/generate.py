"""Writing on from a prompt, a token at a time, with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nanotrain.config import at_least
from nanotrain.model.transformer import Cache, Transformer


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    temperature: float = 0.8
    """Divides the logits [ratio]; 0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Draw only from so many of the most likely [tokens]; 0 is all."""
    top_p: float = 1.0
    """Draw only from the fewest tokens whose probabilities reach p [probability]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already in the text [ratio]; 1 is none."""
    max_tokens: int = 200
    """To write at most [tokens]."""
    seed: int = 0
    """Seed of the draws [any integer]."""


def check_sampling(c: SamplingConfig) -> None:
    """Raise ValueError naming the flag for values that make no sense."""
    if c.temperature < 0:
        raise ValueError(f"--sampling.temperature {c.temperature}: must be 0 (greedy) or more")
    if c.top_k < 0:
        raise ValueError(f"--sampling.top_k {c.top_k}: must be 0 (all) or more")
    if not 0 < c.top_p <= 1:
        raise ValueError(f"--sampling.top_p {c.top_p}: must lie in (0, 1]")
    if c.repetition_penalty <= 0:
        raise ValueError(f"--sampling.repetition_penalty {c.repetition_penalty}: must be positive")
    at_least(c, "sampling", 1, "max_tokens")


def next_token_probabilities(logits_V: torch.Tensor, seen: torch.Tensor, c: SamplingConfig) -> torch.Tensor:
    """Probabilities (V,) in fp32 of the next token given its logits and the token ids `seen` so far."""
    logits = logits_V.float()
    if c.repetition_penalty != 1.0:
        held = logits[seen]
        logits = logits.index_put((seen,), torch.where(held > 0, held / c.repetition_penalty, held * c.repetition_penalty))
    if c.temperature == 0:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1.0)
    logits = (logits - logits.max()) / c.temperature
    if 0 < c.top_k < len(logits):
        logits = torch.full_like(logits, -torch.inf).scatter(0, *reversed(logits.topk(c.top_k)))
    probabilities = torch.softmax(logits, 0)
    if c.top_p < 1:
        ordered, indices = probabilities.sort(descending=True)
        kept = ordered.cumsum(0) - ordered < c.top_p  # the token that crosses p stays
        probabilities = torch.zeros_like(probabilities).scatter(0, indices, ordered * kept)
        probabilities = probabilities / probabilities.sum()
    return probabilities


@torch.no_grad()
def generate(model: Transformer, prompt: list[int], c: SamplingConfig, *, stop: frozenset[int]) -> Iterator[int]:
    """Yield new tokens after `prompt` until one of `stop` (which is yielded too) or `max_tokens`.

    Raises ValueError for an empty prompt, or one that leaves no room in a model of learned positions.
    """
    check_sampling(c)
    if not prompt:
        raise ValueError("the prompt holds no token; begin it with bos")
    device = model.head.weight.device
    room = c.max_tokens
    if model.c.positions == "learned":
        room = min(room, model.c.context - len(prompt))
        if room < 1:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the model's learned positions end at {model.c.context}; shorten it")
    capacity = len(prompt) + room
    cache = Cache(capacity)
    draws = torch.Generator().manual_seed(c.seed)
    seen = list(prompt)
    new = prompt
    for _ in range(room):
        tokens = torch.tensor([new], device=device)
        positions = torch.arange(len(seen) - len(new), len(seen), device=device)[None]
        hidden = model(tokens, positions, cache=cache, max_position=capacity)
        probabilities = next_token_probabilities(model.head.logits(hidden[:, -1:])[0, 0], torch.tensor(sorted(set(seen)), device=device), c)
        token = int(probabilities.argmax()) if c.temperature == 0 else int(torch.multinomial(probabilities.cpu(), 1, generator=draws))
        yield token
        if token in stop:
            return
        new = [token]
        seen.append(token)
