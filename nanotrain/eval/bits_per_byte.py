"""How well a model predicts held-out text, in bits per byte of the original text, whatever its tokenizer.

    bits per byte = sum over documents of -log2 p(tokens of the document, eos included) / bytes of their text

Each document is scored from its own start: the first window holds its first `length` tokens, each later one moves on by
`stride` and scores only the tokens not scored before, so a token past the first window sees at least length - stride others.
"""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from nanotrain.data.loader import permuted
from nanotrain.data.shards import TokenShards


@dataclass(frozen=True)
class Score:
    """Sums over scored documents."""

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def nats_per_token(self) -> float:
        """Mean loss of a predicted token."""
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the documents' text."""
        return self.nats / math.log(2) / max(1, self.bytes)


@torch.no_grad()
def score(
    model, shards: TokenShards, *, length: int, stride: int, device: torch.device, max_tokens: int = 0, batch_tokens: int = 8192,
    stop: Callable[[], bool] = lambda: False,
) -> Score | None:  # fmt: skip
    """Score whole documents of a split, all of them or, in a fixed shuffled order, until `max_tokens` are reached.

    Returns None where `stop()` came true on the way.
    """
    documents = len(shards.document_starts)
    order = permuted(np.arange(documents), documents, 0, 0) if max_tokens else np.arange(documents)
    total_tokens = total_bytes = count = 0
    nats = 0.0
    windows: list[tuple[np.ndarray, int]] = []
    held = 0
    for number in order:
        if stop():
            return None
        ids = shards.document(int(number))
        total_tokens += len(ids) - 1
        total_bytes += int(shards.document_bytes[number])
        count += 1
        scored = 1  # the bos is given
        start = 0
        while scored < len(ids):
            end = min(start + length, len(ids) - 1)  # inputs start..end-1 predict start+1..end
            if held and held + end - start > batch_tokens:
                nats += _score_windows(model, windows, device)
                windows, held = [], 0
            windows.append((ids[start : end + 1], scored - start))
            held += end - start
            scored = end + 1
            start += stride
        if max_tokens and total_tokens >= max_tokens:
            break
    nats += _score_windows(model, windows, device)
    return Score(nats, total_tokens, total_bytes, count)


def _score_windows(model, windows: list[tuple[np.ndarray, int]], device: torch.device) -> float:
    """Summed loss of windows (ids, first position to score), packed as documents of one batch."""
    if not windows:
        return 0.0
    lengths = [len(ids) - 1 for ids, _ in windows]
    starts = np.cumsum([0, *lengths])
    tokens = torch.from_numpy(np.concatenate([ids[:-1] for ids, _ in windows]))[None].to(device)
    labels = torch.from_numpy(np.concatenate([ids[1:] for ids, _ in windows]))[None].to(device)
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None].to(device)
    rows = torch.from_numpy(np.concatenate([np.arange(s + first - 1, s + n) for (_, first), s, n in zip(windows, starts, lengths, strict=False)]))
    cu_seqlens = torch.from_numpy(starts.astype(np.int32)).to(device)
    hidden = model(tokens, positions, cu_seqlens=cu_seqlens, lengths=lengths, max_position=max(lengths))
    return float(model.head(hidden, labels, rows=rows.to(device))[0].double().sum())


def compressed_bits_per_byte(texts: list[bytes]) -> dict[str, float]:
    """What general compressors reach on the same documents: each alone with zlib and xz, and xz over all of them at once."""
    total = max(1, sum(map(len, texts)))
    return {
        "zlib -9, each document": 8 * sum(len(zlib.compress(t, 9)) for t in texts) / total,
        "xz -9, each document": 8 * sum(len(lzma.compress(t, preset=9)) for t in texts) / total,
        "xz -9, all documents at once": 8 * len(lzma.compress(b"".join(texts), preset=9)) / total,
    }
