"""The deterministic loader: which tokens make up sample n is a pure function of the seed and n, never of the topology.

The split's tokens are cut into rows of T; an epoch visits all rows in an order that a keyed permutation gives. The
cursor, a count of rows consumed, is all the state there is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from nanotrain.data.shards import TokenShards
from nanotrain.kernels.runtime import sent
from nanotrain.losses import IGNORED


@dataclass
class Batch:
    """Rows laid end to end as packed documents; N = rows * T."""

    tokens_BT: torch.Tensor
    """(1, N) int64."""
    labels_BT: torch.Tensor
    """(1, N) int64: the next token, or -100 where it belongs to another document."""
    positions_BT: torch.Tensor
    """(1, N) int64, from each document's start in its row."""
    cu_seqlens: torch.Tensor
    """(documents + 1,) int32: where documents (and rows) start."""
    counters_BT: torch.Tensor
    """(1, N) int64: index of each token in the whole run, which dropout draws from."""
    rows: torch.Tensor | None
    """Indices of the counted labels; None where masking the others is as well: on a GPU, and where they are few."""
    counted: int
    """Labels that count."""
    max_position: int
    """More than any position: the length of a row, in every batch, so that RoPE's tables and their stretch are the same in all steps."""
    lengths: tuple[int, ...] | None = None
    """Of the documents [tokens], where the host is to know them too."""


def permuted(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a keyed permutation of range(size) sends each of `index`: a Feistel network, walked until it falls inside.

    Needs no memory for the permutation, and any cursor can be asked directly.
    """
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.frombuffer(hashlib.sha256(f"{seed}:{epoch}".encode()).digest(), dtype=np.uint64)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & mask
        for key in (*keys, *keys[::-1]):
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        value[outside] = (left << np.uint64(half)) | right
        outside = value >= size
    return value.astype(np.int64)


class Loader:
    """Batches of rows of `length` tokens from one split."""

    def __init__(self, shards: TokenShards, *, length: int, seed: int, device: torch.device):
        """Raises ValueError where the split holds less than one row."""
        self.shards, self.length, self.seed, self.device = shards, length, seed, device
        self.rows = (shards.tokens - 1) // length
        if self.rows < 1:
            raise ValueError(f"--train.length {length}: the training split has only {shards.tokens} tokens; shorten the rows or prepare more text")

    def batch(self, cursor: int, rows: int) -> Batch:
        """The `rows` rows that follow when `cursor` rows have been consumed since the run began."""
        numbers = np.arange(cursor, cursor + rows)
        epochs = numbers // self.rows
        places = np.empty(rows, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            places[chosen] = permuted(numbers[chosen] % self.rows, self.rows, self.seed, int(epoch))
        length, starts_of_documents = self.length, self.shards.document_starts
        tokens, labels = np.empty((2, rows, length), dtype=np.int64)
        starts = []
        for i, place in enumerate(places):
            first = int(place) * length
            span = self.shards.read(first, first + length + 1)
            tokens[i], labels[i] = span[:-1], span[1:]
            low, high = np.searchsorted(starts_of_documents, (first, first + length), "right")
            inner = starts_of_documents[low:high] - first  # documents that start after the row's first token, up to its last label
            labels[i, inner - 1] = IGNORED
            starts.append(np.concatenate([[0], inner[inner < length]]) + i * length)
        cu_seqlens = np.concatenate([*starts, [rows * length]])
        lengths = np.diff(cu_seqlens)
        positions = np.arange(rows * length) - np.repeat(cu_seqlens[:-1], lengths)
        counters = numbers[:, None] * length + np.arange(length)
        labels = labels.reshape(1, -1)
        counted = np.flatnonzero(labels[0] != IGNORED)
        on_host = self.device.type == "cpu"

        def tensor(array, dtype=torch.int64):
            return sent(torch.from_numpy(np.ascontiguousarray(array)).to(dtype), self.device)

        return Batch(
            tensor(tokens.reshape(1, -1)), tensor(labels), tensor(positions[None]), tensor(cu_seqlens, torch.int32),
            tensor(counters.reshape(1, -1)), tensor(counted) if on_host and len(counted) < 0.9 * labels.size else None,
            len(counted), length, tuple(lengths.tolist()),
        )  # fmt: skip
