"""Rotary position embedding of queries and keys, half-split as in Hugging Face's Llama.

    y[..., :r] = x[..., :r] * cos - x[..., r:2r] * sin        r = rotary / 2; channels past 2r pass through
    y[..., r:2r] = x[..., r:2r] * cos + x[..., :r] * sin

Shapes: q (B, T, H, D), k (B, T, K, D), cos and sin (P, r) in fp32, positions (B, T) or None for 0..T-1.
Computed in fp32 (float64 for float64). Reads and writes q and k once.
Source: Su et al. 2021 (arXiv 2104.09864). Frequency scaling is done by the caller, in the tables.
"""

from __future__ import annotations

import torch
from nanotrain.kernels.cpu import call, dense
from nanotrain.kernels.runtime import choose, compute_dtype
from torch.autograd.function import once_differentiable

EXAMPLES = ((2, 7, 4, 2, 16), (1, 33, 6, 6, 80))
"""Shapes (B, T, H, K, D) that tests and benchmarks share."""


class _Rotate(torch.autograd.Function):
    """Rotation of q and k by angles; their gradient is the upstream one rotated back, where autograd would pad and add halves.

    For the backward it keeps the tables, which all layers share, and not the angles of each token.
    """

    @staticmethod
    def forward(ctx, q, k, cos, sin, positions):
        ctx.save_for_backward(cos, sin, positions)
        return _rotate((q, k), cos, sin, positions, 1)

    @staticmethod
    def backward(ctx, *grads):
        return *_rotate(grads, *ctx.saved_tensors, -1), None, None, None


def _rotate(tensors, cos, sin, positions, direction):
    dtype, half = compute_dtype(tensors[0]), cos.shape[-1]
    cos, sin = (t[: tensors[0].shape[1]] if positions is None else t[positions] for t in (cos, sin))
    cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    outs = []
    for x in tensors:
        first, second, rest = x.to(dtype).split((half, half, x.shape[-1] - 2 * half), -1)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        for part, a, b, sign in ((out[..., :half], first, second, -direction), (out[..., half : 2 * half], second, first, direction)):
            torch.mul(a, cos, out=part).addcmul_(b, sin, value=sign)
        out[..., 2 * half :] = rest
        outs.append(out.to(x.dtype))
    return tuple(outs)


def rope_reference(q_BTHD, k_BTKD, cos, sin, *, positions=None):
    """Rotary embedding in plain PyTorch; returns (q, k) in their own dtypes. Angles get no gradient."""
    return _Rotate.apply(q_BTHD, k_BTKD, cos, sin, positions)


class _Native(torch.autograd.Function):
    """The rotation in one pass over memory. Results lie head by head, (H, B, T, D), as attention multiplies them; gradients token by token."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, positions):
        cos, sin, positions = dense(cos), dense(sin), dense(positions)
        ctx.save_for_backward(cos, sin, positions)
        outs = [torch.empty(x.shape[2], *x.shape[:2], x.shape[3], dtype=x.dtype, device=x.device).permute(1, 2, 0, 3) for x in (q, k)]
        return _rotate_native((q, k), outs, cos, sin, positions, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        outs = [torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) for grad in grads]
        return *_rotate_native(grads, outs, *ctx.saved_tensors, -1.0), None, None, None


def _rotate_native(tensors, outs, cos, sin, positions, direction):
    for x, out in zip(tensors, outs, strict=True):
        x = x.resolve_neg()
        x = x if x.stride(-1) == 1 else x.contiguous()
        if not call("rope", x.dtype, x, *x.stride()[:3], out, *out.stride()[:3], cos, sin, positions, *x.shape, *cos.shape, direction):
            raise IndexError(f"rope: positions lie between {int(positions.min())} and {int(positions.max())}, tables have {len(cos)} rows")
    return tuple(outs)


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
    tensors = (q_BTHD, k_BTKD, cos, sin) if positions is None else (q_BTHD, k_BTKD, cos, sin, positions)
    native = q_BTHD.dtype == k_BTKD.dtype != torch.int64 and cos.dtype == sin.dtype == torch.float32
    native = native and (positions is None or positions.dtype == torch.int64)
    if choose("rope", impl, *tensors, native=native) == "native":
        return _Native.apply(q_BTHD, k_BTKD, cos, sin, positions)
    return rope_reference(q_BTHD, k_BTKD, cos, sin, positions=positions)


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one forward for shape (B, T, H, K, D): q and k in and out."""
    B, T, H, K, D = shape
    elements = B * T * (H + K) * D
    return 2 * elements * dtype.itemsize, 3 * elements
