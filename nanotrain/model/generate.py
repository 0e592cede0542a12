"""Generation: many prompts at once, each writing on as if it were alone.

Prompts are packed end to end and filled into the cache in one forward; then every row takes a token a step, rows that end make
room, and waiting prompts take their place. A row draws from a generator seeded by its own seed, so what it draws does not
depend on what else is in the batch. Nor do its logits: to the bit where native steps serve (a CPU), elsewhere but for the rounding
of a matrix product of another size.

With a draft model, several tokens are proposed by it and checked by one forward of the model; what is accepted has exactly the
distribution of the model alone. Sources: continuous batching: Orca (OSDI 2022); speculative sampling: arXiv 2211.17192, 2302.01318.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from nanotrain.model.cache import Cache, make_cache
from nanotrain.model.native_decode import decoder
from nanotrain.model.sampling import SamplingConfig, check_sampling, distribution, draw, penalised
from nanotrain.model.transformer import Transformer
from nanotrain.tokenizer import StreamDecoder

_PREFILL = 8192
"""Prompt tokens of a forward at most, but for a longer single prompt: they take memory as a training batch does."""


@dataclass
class Completion:
    """What was written after a prompt."""

    tokens: list[int] = field(default_factory=list)
    """A stop token, where one ended it, is the last."""
    logprobs: list[float] = field(default_factory=list)
    """Of each token by the model itself [nats], before temperature and filters: what the training head gives."""
    text: str = ""
    """Where a tokenizer was given: without stop token, and cut before a stop string."""
    reason: str = ""
    """Why it ended: `stop` (a token), `text` (a stop string) or `length`."""


@dataclass(frozen=True)
class Written:
    """One more token of a row, as it comes."""

    prompt: int
    token: int
    logprob: float
    text: str
    """What can be shown now: half a character, or what may become a stop string, is held back."""
    reason: str
    """Why the row ends here, or nothing."""


def generate(model: Transformer, prompts: list[list[int]], c: SamplingConfig, *, seeds: list[int] | None = None, **options) -> list[Completion]:
    """Completions of token-id prompts, in their order; `options` are those of `Generator`, `seeds` (one a prompt) of its `run`."""
    done = [Completion() for _ in prompts]
    for written in Generator(model, c, **options).run(prompts, seeds):
        completion = done[written.prompt]
        completion.tokens.append(written.token)
        completion.logprobs.append(written.logprob)
        completion.text += written.text
        completion.reason = written.reason
    return done


class Row:
    """A text being written: `limit` is where it ends at the latest [tokens, prompt included]."""

    def __init__(self, number: int, prompt: list[int], limit: int, seed: int):
        self.number, self.tokens, self.limit = number, prompt, limit
        self.random = torch.Generator().manual_seed(seed & (2**63 - 1))
        self.uniforms: list[float] = []
        self.seen: torch.Tensor | None = None
        self.decoder: StreamDecoder | None = None
        self.held = ""

    def uniform(self) -> float:
        if not self.uniforms:
            self.uniforms = torch.rand(64, generator=self.random, dtype=torch.float64).tolist()[::-1]
        return self.uniforms.pop()


class Generator:
    """A model with a cache of `rows` rows; one run of it at a time.

    stop         token ids that end a row
    stop_text    strings that end a row; needs a tokenizer
    tokenizer    makes text of tokens
    draft        a smaller model of the same vocabulary that proposes `lookahead` tokens a step; `proposed` and `accepted` count them

    Raises ValueError for settings that make no sense.
    """

    def __init__(
        self, model: Transformer, c: SamplingConfig, *, rows: int = 16, stop: frozenset[int] = frozenset(), stop_text: tuple[str, ...] = (),
        tokenizer=None, draft: Transformer | None = None, lookahead: int = 4,
    ):  # fmt: skip
        check_sampling(c)
        if rows < 1 or lookahead < 1:
            raise ValueError(f"generate: rows {rows}, lookahead {lookahead}: each must be at least 1")
        if stop_text and tokenizer is None:
            raise ValueError("generate: stop_text needs a tokenizer")
        if draft is not None and draft.c.vocab_size != model.c.vocab_size:
            raise ValueError(f"the draft model has {draft.c.vocab_size} tokens, the model {model.c.vocab_size}; they must share a tokenizer")
        self.device = model.head.weight.device
        if draft is not None and draft.head.weight.device != self.device:
            raise ValueError(f"the draft model is on {draft.head.weight.device}, the model on {self.device}; put both on one device")
        self.model, self.c, self.rows = model, c, rows
        self.stop, self.stop_text, self.tokenizer = stop, tuple(s for s in stop_text if s), tokenizer
        self.draft, self.lookahead = draft, lookahead if draft is not None else 0
        self.proposed = self.accepted = 0

    def run(self, prompts: list[list[int]], seeds: list[int] | None = None) -> Iterator[Written]:
        """Tokens written after the prompts, as they come, `rows` prompts at a time.

        Raises ValueError for an empty prompt, for token ids that the model does not have, for a prompt that leaves no room in a model of
        learned positions, and where the model's logits are no numbers.
        """
        seeds = [self.c.seed + number for number in range(len(prompts))] if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise ValueError(f"generate: {len(seeds)} seeds for {len(prompts)} prompts; give one each")
        # Where RoPE's frequencies follow the length, prompts of one reach run together: no prompt's frequencies are another's.
        groups: dict[int, list[Row]] = {}
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            row = Row(number, list(prompt), self._limit(prompt), seed)
            groups.setdefault(self._reach(row.limit), []).append(row)
        for reach, rows in groups.items():
            yield from self._run(rows, reach)

    def _limit(self, prompt: list[int]) -> int:
        if not prompt:
            raise ValueError("the prompt holds no token; begin it with bos")
        if not 0 <= min(prompt) <= max(prompt) < self.model.c.vocab_size:
            raise ValueError(f"the prompt's token ids go from {min(prompt)} to {max(prompt)}, the model's from 0 to {self.model.c.vocab_size - 1};"
                             " use the model's own tokenizer")  # fmt: skip
        limit, context = len(prompt) + self.c.max_tokens, self.model.c.context
        if self.model.c.positions == "learned":
            limit = min(limit, context)
            if len(prompt) >= limit:
                raise ValueError(f"the prompt has {len(prompt)} tokens, the model's learned positions end at {context}; shorten it")
        return limit

    def _reach(self, limit: int) -> int:
        """The length that RoPE's frequencies are for, where they follow it (in the draft, perhaps); else 0."""
        configs = [model.c for model in (self.model, self.draft) if model is not None]
        scaled = [c for c in configs if c.positions == "rope" and c.rope_scaling in ("dynamic", "longrope")]
        return max(limit, self.model.c.context) if any(limit > c.rope_original_context for c in scaled) else 0

    def _run(self, requests: list[Row], reach: int) -> Iterator[Written]:
        waiting, self.reach = deque(requests), reach
        count, self.limit = min(self.rows, len(requests)), max(row.limit for row in requests)
        room = count, self.limit + self.lookahead
        self.cache, self.draft_cache = (make_cache(self.device, *room, width=1 + self.lookahead) for _ in range(2))
        self.native = {model: decoder(model) for model in (self.model, self.draft) if model is not None}
        active: list[Row] = []
        while waiting or active:
            if waiting and len(active) < count:
                admitted = [waiting.popleft()]
                tokens = len(admitted[0].tokens)
                # Beside native steps, whose bits do not depend on the batch, each prompt is filled in alone: no sample does then, at all.
                together = count if self.native[self.model] is None else 1
                while waiting and len(admitted) < min(together, count - len(active)) and (tokens := tokens + len(waiting[0].tokens)) <= _PREFILL:
                    admitted.append(waiting.popleft())
                first, work, rows = len(active), self._admit, admitted
                active += admitted
            else:
                first, work, rows = 0, self._decode if self.draft is None else self._speculate, active
            with torch.no_grad():
                written = work(rows)
            ended = []
            for index, events in enumerate(written, first):
                for token, logprob in events:
                    event = self._take(active[index], token, logprob)
                    yield event
                    if event.reason:
                        ended.append(index)
                        break
            for index in reversed(ended):  # the last row takes the place of one that ended, in the caches too
                active[index] = active[-1]
                active.pop()
                self.cache.release(index)
                if self.draft is not None:
                    self.draft_cache.release(index)

    def _take(self, row: Row, token: int, logprob: float) -> Written:
        """Add a token to its row: what can be shown of it, and whether the row ends."""
        if not math.isfinite(logprob):
            raise ValueError(f"the model's logits after {len(row.tokens)} tokens are infinite or no numbers; its weights are damaged or overflow")
        row.tokens.append(token)
        if row.seen is not None:
            row.seen[token] = True
        reason = "stop" if token in self.stop else "length" if len(row.tokens) >= row.limit else ""
        text = ""
        if self.tokenizer is not None:
            row.held += row.decoder.finish() if reason == "stop" else row.decoder.add(token, last=bool(reason))
            found = [at for at in map(row.held.find, self.stop_text) if at >= 0]
            if found:
                text, reason = row.held[: min(found)], "text"
            else:
                keep = 0 if reason else max((_overlap(row.held, s) for s in self.stop_text), default=0)
                text, row.held = row.held[: len(row.held) - keep], row.held[len(row.held) - keep :]
        return Written(row.number, token, logprob, text, reason)

    def _admit(self, rows: list[Row]) -> list[list[tuple[int, float]]]:
        """Fill the prompts of new rows into the cache; their first tokens."""
        tokens = torch.tensor([t for row in rows for t in row.tokens], device=self.device)[None]
        for row in rows:
            if self.c.repetition_penalty != 1.0:
                row.seen = torch.zeros(self.model.c.vocab_size, dtype=torch.bool, device=self.device)
                row.seen[row.tokens] = True
            if self.tokenizer is not None:
                row.decoder = StreamDecoder(self.tokenizer)
        lengths = [len(row.tokens) for row in rows]
        if self.draft is not None:
            self._hidden(self.draft, self.draft_cache.prefill(lengths, self.device), tokens)
        step = self.cache.prefill(lengths, self.device)
        return self._draw(rows, self._wide(self.model.head.logits(self._hidden(self.model, step, tokens)[0, step.ends - 1])))

    def _decode(self, rows: list[Row]) -> list[list[tuple[int, float]]]:
        """The next token of every row."""
        native = self.native[self.model]
        if native is not None and self.c.repetition_penalty == 1.0:
            step, uniforms = self.cache.decode(1, self.device), [row.uniform() for row in rows] if self.c.temperature > 0 else []
            chosen = native.draw(step, [row.tokens[-1] for row in rows], self._positions(step), self.c, uniforms)
            return [[pair] for pair in zip(*chosen, strict=True)]
        tokens = torch.tensor([row.tokens[-1] for row in rows], device=self.device)[:, None]
        return self._draw(rows, self._logits(self.model, self.cache, tokens)[:, 0])

    def _logits(self, model: Transformer, cache: Cache, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V), in fp32 or float64, after each of the next tokens of every row."""
        step = cache.decode(tokens_BT.shape[1], self.device)
        if self.native[model] is not None:
            return self.native[model].step(step, tokens_BT, self._positions(step))
        return self._wide(model.head.logits(self._hidden(model, step, tokens_BT)))

    def _hidden(self, model: Transformer, step, tokens_BT: torch.Tensor) -> torch.Tensor:
        reach, positions = self._positions(step), step.positions
        if self.lookahead:  # proposals past the limit are dropped; a draft may guess beyond its own positions
            positions = positions.clamp(max=(model.c.context if model.c.positions == "learned" else reach) - 1)
        return model(tokens_BT, positions, cache=step, max_position=reach)

    def _positions(self, step) -> int:
        """How many positions RoPE's tables must hold: no more than the cache has room for now, however far the limit is."""
        return self.reach or min(self.limit, step.cache.cells)

    def _wide(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _draw(self, rows: list[Row], logits: torch.Tensor) -> list[list[tuple[int, float]]]:
        """A token for every row by its logits (B, V)."""
        seen = self._seen(rows)
        if self.c.temperature == 0:
            tokens = penalised(logits, seen, self.c).argmax(-1)
        else:
            tokens = draw(distribution(logits, seen, self.c), self._uniforms(rows))
        logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)
        return [[pair] for pair in zip(tokens.tolist(), logprobs.tolist(), strict=True)]

    def _seen(self, rows: list[Row]) -> torch.Tensor | None:
        return torch.stack([row.seen for row in rows]) if self.c.repetition_penalty != 1.0 else None

    def _uniforms(self, rows: list[Row]) -> torch.Tensor:
        return torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=self.device)

    def _speculate(self, rows: list[Row]) -> list[list[tuple[int, float]]]:
        """Tokens that the draft proposes and the model accepts, and one more of the model's own."""
        target, drafts = self.cache, self.draft_cache
        last = torch.tensor([row.tokens[-2:] for row in rows], device=self.device)
        drafts.lengths = [len(row.tokens) - 2 for row in rows]  # it has not seen its last proposal where all were accepted
        seen, proposals, q = self._seen(rows), [], []
        tokens = last
        for _ in range(self.lookahead):
            q.append(distribution(self._logits(self.draft, drafts, tokens)[:, -1], seen, self.c))
            tokens = draw(q[-1], self._uniforms(rows))[:, None]
            proposals.append(tokens)
            if seen is not None:
                seen = seen.scatter(1, tokens, True)
        proposals = torch.cat(proposals, 1)
        logits = self._logits(self.model, target, torch.cat([last[:, 1:], proposals], 1))
        seen, live, written = self._seen(rows), [True] * len(rows), [[] for _ in rows]
        for place in range(self.lookahead + 1):
            p = distribution(logits[:, place], seen, self.c)
            if place < self.lookahead:
                proposal = proposals[:, place : place + 1]
                taken = self._uniforms(rows) * q[place].gather(1, proposal)[:, 0] < p.gather(1, proposal)[:, 0]
                rest = (p - q[place]).clamp(min=0)
                rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
                chosen = torch.where(taken, proposal[:, 0], draw(rest, self._uniforms(rows)))
            else:
                taken, chosen = torch.zeros(len(rows), dtype=torch.bool), draw(p, self._uniforms(rows))
            logprobs = logits[:, place].gather(-1, chosen[:, None]).squeeze(-1) - logits[:, place].logsumexp(-1)
            for index, (token, logprob, go_on) in enumerate(zip(chosen.tolist(), logprobs.tolist(), taken.tolist(), strict=True)):
                if live[index]:
                    written[index].append((token, logprob))
                    self.proposed += place < self.lookahead
                    self.accepted += go_on
                    live[index] = go_on
            if seen is not None and place < self.lookahead:
                seen = seen.scatter(1, proposals[:, place : place + 1], True)
        target.lengths = [len(row.tokens) - 1 + len(new) for row, new in zip(rows, written, strict=True)]
        return written


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
