"""Objectives: different weightings of the one vector of per-token log-probabilities that the model's head returns.

Each names its denominator, a count over the whole step (all micro-batches and ranks) that is known before the first backward.
"""

from __future__ import annotations

import torch

IGNORED = -100
"""Label of a token that no objective counts."""


def token_weights(labels_BT: torch.Tensor, denominator: int | torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights (N,) of next-token prediction: 1 / denominator where the label counts, 0 elsewhere; denominator in tokens."""
    denominator = denominator.clamp(min=1) if isinstance(denominator, torch.Tensor) else max(1, denominator)
    return (labels_BT.flatten() != IGNORED).to(dtype) / denominator


def next_token(
    head, hidden_BTC: torch.Tensor, labels_BT: torch.Tensor, denominator: int | torch.Tensor, *, rows: torch.Tensor | None = None,
    scale: torch.Tensor | float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Scalar sum over counted tokens of -log p(label) * scale / denominator; `rows` are their indices where the host knows them.

    Summed over the micro-batches of a step it is the mean over all its counted tokens. A loss scale must come in here: the
    head makes gradients in its forward, and in fp16 those of an unscaled mean vanish.
    """
    weights = token_weights(labels_BT, denominator, torch.promote_types(hidden_BTC.dtype, torch.float32)) * scale
    return head(hidden_BTC, labels_BT, token_weight_N=weights, rows=rows)[0]
