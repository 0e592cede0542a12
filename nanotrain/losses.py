"""Objectives: different weightings of the one vector of per-token log-probabilities that the model's head returns.

Each names its denominator, a count over the whole step (all micro-batches and ranks) that is known before the first backward.
"""

from __future__ import annotations

import torch

IGNORED = -100
"""Label of a token that no objective counts."""


def token_weights(labels_BT: torch.Tensor, denominator: int) -> torch.Tensor:
    """Weights (N,) of next-token prediction: 1 / denominator where the label counts, 0 elsewhere; denominator in tokens."""
    return (labels_BT.flatten() != IGNORED).to(torch.float32) / max(1, denominator)


def next_token(head, hidden_BTC: torch.Tensor, labels_BT: torch.Tensor, denominator: int, *, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Scalar sum over counted tokens of -log p(label) / denominator; `rows` are their indices where the host knows them.

    Summed over the micro-batches of a step it is the mean over all its counted tokens.
    """
    return head(hidden_BTC, labels_BT, token_weight_N=token_weights(labels_BT, denominator), rows=rows)[0]
