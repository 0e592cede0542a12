"""Rotary position embedding of queries and keys, half-split as in Hugging Face's Llama.

    y[..., :r] = x[..., :r] * cos - x[..., r:2r] * sin        r = rotary / 2; channels past 2r pass through
    y[..., r:2r] = x[..., r:2r] * cos + x[..., :r] * sin

Shapes: q (B, T, H, D), k (B, T, K, D), cos and sin (P, r) in fp32, positions (B, T) or None for 0..T-1.
Computed in fp32 (float64 for float64). Reads and writes q and k once.
Source: Su et al. 2021 (arXiv 2104.09864). Frequency scaling is done by the caller, in the tables.
"""

from __future__ import annotations

import torch
from nanotrain.kernels.runtime import choose, compute_dtype

EXAMPLES = ((2, 7, 4, 2, 16), (1, 33, 6, 6, 80))
"""Shapes (B, T, H, K, D) that tests and benchmarks share."""


class _Rotate(torch.autograd.Function):
    """Rotation of x (B, T, H, D) by angles; its gradient is the upstream one rotated back, where autograd would pad and add halves."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x, cos, sin):
    half = cos.shape[-1]
    first, second, rest = x.to(cos.dtype).split((half, half, x.shape[-1] - 2 * half), -1)
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    for part, a, b, sign in ((out[..., :half], first, second, -1), (out[..., half : 2 * half], second, first, 1)):
        torch.mul(a, cos, out=part).addcmul_(b, sin, value=sign)
    out[..., 2 * half :] = rest
    return out.to(x.dtype)


def rope_reference(q_BTHD, k_BTKD, cos, sin, *, positions=None):
    """Rotary embedding in plain PyTorch; returns (q, k) in their own dtypes. Angles get no gradient."""
    T = q_BTHD.shape[1]
    dtype = compute_dtype(q_BTHD)
    cos, sin = (t[:T] if positions is None else t[positions] for t in (cos, sin))
    cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    return _Rotate.apply(q_BTHD, cos, sin), _Rotate.apply(k_BTKD, cos, sin)


def rope(q_BTHD, k_BTKD, cos, sin, *, positions=None, impl="auto"):
    """Rotate q (B, T, H, D) and k (B, T, K, D) by the angles in cos, sin (P, rotary / 2) at `positions` (B, T).

    Differentiable in q and k. Raises ValueError for shapes that do not match or a table too short for T.
    """
    if cos.shape != sin.shape or cos.dim() != 2 or 2 * cos.shape[1] > q_BTHD.shape[-1]:
        raise ValueError(f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be (P, rotary/2 <= {q_BTHD.shape[-1] // 2})")
    if q_BTHD.dim() != 4 or k_BTKD.dim() != 4 or q_BTHD.shape[:2] != k_BTKD.shape[:2] or q_BTHD.shape[-1] != k_BTKD.shape[-1]:
        raise ValueError(f"rope: q {tuple(q_BTHD.shape)} and k {tuple(k_BTKD.shape)} must be (B, T, H, D) and (B, T, K, D)")
    if positions is None and cos.shape[0] < q_BTHD.shape[1]:
        raise ValueError(f"rope: tables of {cos.shape[0]} positions, {q_BTHD.shape[1]} needed")
    if positions is not None and positions.shape != q_BTHD.shape[:2]:
        raise ValueError(f"rope: positions {tuple(positions.shape)} must be {tuple(q_BTHD.shape[:2])}")
    choose("rope", impl, q_BTHD, k_BTKD, cos)
    return rope_reference(q_BTHD, k_BTKD, cos, sin, positions=positions)


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one forward for shape (B, T, H, K, D): q and k in and out."""
    B, T, H, K, D = shape
    elements = B * T * (H + K) * D
    return 2 * elements * dtype.itemsize, 3 * elements
