"""Rotary position embedding of queries and keys, half-split as in Hugging Face's Llama, alone or with the RMSNorm of each head before it.

    y[..., :r] = x[..., :r] * cos - x[..., r:2r] * sin        r = rotary / 2; channels past 2r pass through
    y[..., r:2r] = x[..., r:2r] * cos + x[..., :r] * sin
    qk_norm_rope:  x = q / sqrt(mean(q^2) + eps) * (weight + offset) over D, then as above; k with a weight of its own

Shapes: q (B, T, H, D), k (B, T, K, D), cos and sin (P, r) in fp32, positions (B, T) or None for 0..T-1, weights (D,).
Computed in fp32 (float64 for float64); Triton rounds the two steps of qk_norm_rope once, where the reference rounds after each.
Reads and writes q and k once: 2 * B * T * (H + K) * D * itemsize bytes each way, and 1.5 times that for the backward of qk_norm_rope,
which reads q and k beside the gradients. One launch serves q and k, and each token's angles are read once for its heads. The weights'
gradients need no atomics: each program sums its own tokens in fp32, a second pass adds the programs' sums in order.
Positions below 0 count from the tables' end, as indices do. Past either end a CPU raises IndexError; Triton, which can't without making the
host wait, reads nothing there and gives NaN.
Sources: Su et al. 2021 (arXiv 2104.09864); Qwen3 (arXiv 2505.09388) for the norm. Frequency scaling is done by the caller, in the tables.
"""

from __future__ import annotations

from functools import cache

import torch
from nanotrain.kernels.cpu import call, dense
from nanotrain.kernels.norm import rms_norm, rms_norm_reference
from nanotrain.kernels.runtime import choose, compute_dtype, has_kernel, jit, launch, multiprocessors, tl
from torch.autograd.function import once_differentiable

EXAMPLES = ((2, 7, 4, 2, 16), (1, 33, 6, 6, 80))
"""Shapes (B, T, H, K, D) that tests, the compile gate and benchmarks share."""

_TILE, _BACKWARD_TILE = 5120, 2560
"""Most elements of q and k in a program, 40 or 20 a thread with 4 warps: 32 + 8 heads of 128 channels, a whole token of many a model. The
backward of qk_norm_rope holds the gradients and its sums for the weights beside them."""

_PROGRAMS, _PARTIAL_PROGRAMS = 4, 2
"""Programs on a multiprocessor in the backward of qk_norm_rope, all to run at once: 128 registers a thread, or up to 255 where part of a head
passes through, which takes sums and layouts of its own."""


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


def qk_norm_rope_reference(q_BTHD, k_BTKD, q_weight, k_weight, cos, sin, *, positions=None, eps=1e-6, offset=0.0):
    """RMSNorm of each head, then rotary embedding, in plain PyTorch; returns (q, k) in their own dtypes."""
    q, k = (rms_norm_reference(x, weight, eps, offset=offset) for x, weight in ((q_BTHD, q_weight), (k_BTKD, k_weight)))
    return rope_reference(q, k, cos, sin, positions=positions)


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


@jit
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, T, H, K, P,
    q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, qo_b, qo_t, qo_h, qo_d, ko_b, ko_t, ko_h, ko_d,
    HALF: tl.constexpr, REST: tl.constexpr, HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """Q_HEADS heads of q and K_HEADS of k of one token. The backward is the same rotation the other way."""
    token = tl.program_id(0)
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    q_head = (tl.program_id(1) * Q_HEADS + tl.arange(0, Q_HEADS)[:, None]).to(tl.int64)
    k_head = (tl.program_id(1) * K_HEADS + tl.arange(0, K_HEADS)[:, None]).to(tl.int64)
    # All of q and k is read before the angles, whose addresses wait for the position, and before any write.
    q1, q2, q3 = _load(q_ptr + b * q_b + t * q_t + q_head * q_h, q_d, q_head < H, HALF, REST, HALF_PADDED, REST_PADDED)
    k1, k2, k3 = _load(k_ptr + b * k_b + t * k_t + k_head * k_h, k_d, k_head < K, HALF, REST, HALF_PADDED, REST_PADDED)
    cos, sin = _angles(cos_ptr, sin_ptr, positions_ptr, token, T, P, HALF, HALF_PADDED)
    if BACKWARD:
        sin = -sin
    q1, q2 = q1 * cos - q2 * sin, q2 * cos + q1 * sin
    k1, k2 = k1 * cos - k2 * sin, k2 * cos + k1 * sin
    _store(q_out_ptr + b * qo_b + t * qo_t + q_head * qo_h, qo_d, q_head < H, q1, q2, q3, HALF, REST, HALF_PADDED, REST_PADDED)
    _store(k_out_ptr + b * ko_b + t * ko_t + k_head * ko_h, ko_d, k_head < K, k1, k2, k3, HALF, REST, HALF_PADDED, REST_PADDED)


@jit
def _load(x_ptr, stride, mask, HALF: tl.constexpr, REST: tl.constexpr, HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr):
    """The halves of rows (heads, 1) that are rotated and the rest, which is a half again where there is none."""
    column = tl.arange(0, HALF_PADDED)[None, :].to(tl.int64)
    first = tl.load(x_ptr + column * stride, mask & (column < HALF), 0.0).to(tl.float32)
    second = tl.load(x_ptr + (HALF + column) * stride, mask & (column < HALF), 0.0).to(tl.float32)
    rest = first
    if REST > 0:
        column = tl.arange(0, REST_PADDED)[None, :].to(tl.int64)
        rest = tl.load(x_ptr + (2 * HALF + column) * stride, mask & (column < REST), 0.0).to(tl.float32)
    return first, second, rest


@jit
def _store(
    out_ptr, stride, mask, first, second, rest, HALF: tl.constexpr, REST: tl.constexpr, HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr
):  # fmt: skip
    """What `_load` reads."""
    column = tl.arange(0, HALF_PADDED)[None, :].to(tl.int64)
    tl.store(out_ptr + column * stride, first.to(out_ptr.dtype.element_ty), mask & (column < HALF))
    tl.store(out_ptr + (HALF + column) * stride, second.to(out_ptr.dtype.element_ty), mask & (column < HALF))
    if REST > 0:
        column = tl.arange(0, REST_PADDED)[None, :].to(tl.int64)
        tl.store(out_ptr + (2 * HALF + column) * stride, rest.to(out_ptr.dtype.element_ty), mask & (column < REST))


@jit
def _angles(cos_ptr, sin_ptr, positions_ptr, token, T, P, HALF: tl.constexpr, HALF_PADDED: tl.constexpr):
    """cos and sin (1, HALF_PADDED) of a token; NaN, and nothing read, where its position is not in the tables."""
    if positions_ptr is None:
        position = (token % T).to(tl.int64)
    else:
        position = tl.load(positions_ptr + token).to(tl.int64)
        position = tl.where(position < 0, position + P, position)
    column = tl.arange(0, HALF_PADDED)[None, :]
    inside = (position >= 0) & (position < P)
    place = position * HALF + column
    cos = tl.load(cos_ptr + place, inside & (column < HALF), 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + place, inside & (column < HALF), 0.0).to(tl.float32)
    return tl.where(inside, cos, float("nan")), tl.where(inside, sin, float("nan"))


@jit
def _qk_norm_rope_forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, T, H, K, P,
    q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, eps, offset,
    HALF: tl.constexpr, REST: tl.constexpr, HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
):  # fmt: skip
    """Q_HEADS heads of q and K_HEADS of k of one token."""
    token = tl.program_id(0)
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    q_head = (tl.program_id(1) * Q_HEADS + tl.arange(0, Q_HEADS)[:, None]).to(tl.int64)
    k_head = (tl.program_id(1) * K_HEADS + tl.arange(0, K_HEADS)[:, None]).to(tl.int64)
    q1, q2, q3 = _load(q_ptr + b * q_b + t * q_t + q_head * q_h, q_d, q_head < H, HALF, REST, HALF_PADDED, REST_PADDED)
    k1, k2, k3 = _load(k_ptr + b * k_b + t * k_t + k_head * k_h, k_d, k_head < K, HALF, REST, HALF_PADDED, REST_PADDED)
    cos, sin = _angles(cos_ptr, sin_ptr, positions_ptr, token, T, P, HALF, HALF_PADDED)
    q_out_ptr += (token.to(tl.int64) * H + q_head) * (2 * HALF + REST)
    k_out_ptr += (token.to(tl.int64) * K + k_head) * (2 * HALF + REST)
    _store_normed(q_out_ptr, q_head < H, q1, q2, q3, q_weight_ptr, cos, sin, eps, offset, HALF, REST, HALF_PADDED, REST_PADDED)
    _store_normed(k_out_ptr, k_head < K, k1, k2, k3, k_weight_ptr, cos, sin, eps, offset, HALF, REST, HALF_PADDED, REST_PADDED)


@jit
def _store_normed(
    out_ptr, mask, first, second, rest, weight_ptr, cos, sin, eps, offset,
    HALF: tl.constexpr, REST: tl.constexpr, HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr,
):  # fmt: skip
    """Heads as `_load` reads them, normalised, scaled and rotated."""
    inverse = _inverse(first, second, rest, mask, eps, HALF, REST)
    scale1, scale2, scale3 = _load(weight_ptr, 1, True, HALF, REST, HALF_PADDED, REST_PADDED)
    first *= inverse * (scale1 + offset)
    second *= inverse * (scale2 + offset)
    rest *= inverse * (scale3 + offset)
    first, second = first * cos - second * sin, second * cos + first * sin
    _store(out_ptr, 1, mask, first, second, rest, HALF, REST, HALF_PADDED, REST_PADDED)


@jit
def _inverse(first, second, rest, mask, eps, HALF: tl.constexpr, REST: tl.constexpr):
    """1 / sqrt(mean square + eps) of each head (heads, 1); finite whatever eps for the heads that there are not, which the mask is off for."""
    square = tl.sum(first * first + second * second, 1, keep_dims=True)
    if REST > 0:
        square += tl.sum(rest * rest, 1, keep_dims=True)
    return tl.rsqrt(tl.where(mask, square / (2 * HALF + REST) + eps, 1.0))


@jit
def _qk_norm_rope_backward_kernel(
    q_grad_ptr, k_grad_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, sums_ptr, cos_ptr, sin_ptr, positions_ptr,
    pieces, blocks, T, H, K, P, qg_b, qg_t, qg_h, qg_d, kg_b, kg_t, kg_h, kg_d, q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, eps, offset,
    HALF: tl.constexpr, REST: tl.constexpr, HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
):  # fmt: skip
    """Every so many pieces, each a block of heads of one token: their gradients, and this program's part of the weights', held in registers."""
    q_sum1 = tl.zeros((Q_HEADS, HALF_PADDED), tl.float32)
    q_sum2 = tl.zeros((Q_HEADS, HALF_PADDED), tl.float32)
    q_sum3 = tl.zeros((Q_HEADS, REST_PADDED), tl.float32)
    k_sum1 = tl.zeros((K_HEADS, HALF_PADDED), tl.float32)
    k_sum2 = tl.zeros((K_HEADS, HALF_PADDED), tl.float32)
    k_sum3 = tl.zeros((K_HEADS, REST_PADDED), tl.float32)
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        token = tl.cast(piece // blocks, tl.int32)
        b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
        q_head = (piece % blocks * Q_HEADS + tl.arange(0, Q_HEADS)[:, None]).to(tl.int64)
        k_head = (piece % blocks * K_HEADS + tl.arange(0, K_HEADS)[:, None]).to(tl.int64)
        q_grad, k_grad = q_grad_ptr + b * qg_b + t * qg_t + q_head * qg_h, k_grad_ptr + b * kg_b + t * kg_t + k_head * kg_h
        q, k = q_ptr + b * q_b + t * q_t + q_head * q_h, k_ptr + b * k_b + t * k_t + k_head * k_h
        qg1, qg2, qg3 = _load(q_grad, qg_d, q_head < H, HALF, REST, HALF_PADDED, REST_PADDED)
        q1, q2, q3 = _load(q, q_d, q_head < H, HALF, REST, HALF_PADDED, REST_PADDED)
        kg1, kg2, kg3 = _load(k_grad, kg_d, k_head < K, HALF, REST, HALF_PADDED, REST_PADDED)
        k1, k2, k3 = _load(k, k_d, k_head < K, HALF, REST, HALF_PADDED, REST_PADDED)
        cos, sin = _angles(cos_ptr, sin_ptr, positions_ptr, token, T, P, HALF, HALF_PADDED)
        q_out = q_out_ptr + (token.to(tl.int64) * H + q_head) * (2 * HALF + REST)
        k_out = k_out_ptr + (token.to(tl.int64) * K + k_head) * (2 * HALF + REST)
        qg1, qg2, qg3 = _store_gradient(
            q_out, q_head < H, qg1, qg2, qg3, q1, q2, q3, q_weight_ptr, cos, sin, eps, offset, HALF, REST, HALF_PADDED, REST_PADDED
        )
        kg1, kg2, kg3 = _store_gradient(
            k_out, k_head < K, kg1, kg2, kg3, k1, k2, k3, k_weight_ptr, cos, sin, eps, offset, HALF, REST, HALF_PADDED, REST_PADDED
        )
        q_sum1 += qg1
        q_sum2 += qg2
        k_sum1 += kg1
        k_sum2 += kg2
        if REST > 0:
            q_sum3 += qg3
            k_sum3 += kg3
    sums_ptr += tl.program_id(0).to(tl.int64) * 2 * (2 * HALF + REST)
    _store_sums(sums_ptr, q_sum1, q_sum2, q_sum3, HALF, REST, HALF_PADDED, REST_PADDED)
    _store_sums(sums_ptr + 2 * HALF + REST, k_sum1, k_sum2, k_sum3, HALF, REST, HALF_PADDED, REST_PADDED)


@jit
def _store_gradient(
    out_ptr, mask, grad1, grad2, grad3, x1, x2, x3, weight_ptr, cos, sin, eps, offset,
    HALF: tl.constexpr, REST: tl.constexpr, HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of heads x, whose upstream gradient is grad; returns what they add to the weight's."""
    grad1, grad2 = grad1 * cos + grad2 * sin, grad2 * cos - grad1 * sin
    inverse = _inverse(x1, x2, x3, mask, eps, HALF, REST)
    x1, x2, x3 = x1 * inverse, x2 * inverse, x3 * inverse
    part1, part2, part3 = grad1 * x1, grad2 * x2, grad3 * x3
    scale1, scale2, scale3 = _load(weight_ptr, 1, True, HALF, REST, HALF_PADDED, REST_PADDED)
    scale1, scale2, scale3 = scale1 + offset, scale2 + offset, scale3 + offset
    along = tl.sum(part1 * scale1 + part2 * scale2, 1, keep_dims=True)
    if REST > 0:
        along += tl.sum(part3 * scale3, 1, keep_dims=True)
    along /= 2 * HALF + REST
    grad1, grad2, grad3 = (grad1 * scale1 - x1 * along) * inverse, (grad2 * scale2 - x2 * along) * inverse, (grad3 * scale3 - x3 * along) * inverse
    _store(out_ptr, 1, mask, grad1, grad2, grad3, HALF, REST, HALF_PADDED, REST_PADDED)
    return part1, part2, part3


@jit
def _store_sums(
    out_ptr, first, second, rest, HALF: tl.constexpr, REST: tl.constexpr, HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr
):  # fmt: skip
    """A program's sums over its heads, one row."""
    first, second, rest = tl.sum(first, 0, keep_dims=True), tl.sum(second, 0, keep_dims=True), tl.sum(rest, 0, keep_dims=True)
    _store(out_ptr, 1, True, first, second, rest, HALF, REST, HALF_PADDED, REST_PADDED)


@cache
def _tiles(H: int, K: int, D: int, half: int, limit: int) -> tuple[int, dict[str, int]]:
    """(programs that share a token, the kernel's constants and warps): as few programs as `limit` elements in each allow."""
    rest = D - 2 * half
    half_padded, rest_padded = _power(half), _power(rest)
    width = 2 * half_padded + (rest_padded if rest else 0)
    for blocks in range(1, max(2, H + 1, K + 1)):
        q_heads, k_heads = _power(-(-H // blocks)), _power(-(-K // blocks))
        if (elements := (q_heads + k_heads) * width) <= limit:
            break
    warps = min(4, _power(-(-4 * elements // limit)))
    sizes = dict(HALF=half, REST=rest, HALF_PADDED=half_padded, REST_PADDED=rest_padded, Q_HEADS=q_heads, K_HEADS=k_heads)
    return blocks, sizes | dict(num_warps=warps)


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _turn(q, k, outs, cos, sin, positions, *, inplace=False, backward=False):
    """Rotate q and k into `outs`, which are they themselves where it is done in place, in one launch."""
    (B, T, H, D), K = q.shape, k.shape[2]
    blocks, sizes = _tiles(H, K, D, cos.shape[1], _TILE)
    if inplace:
        sizes = sizes | dict(REST=0)  # what passes through stays
    if B * T * (H + K):
        launch(
            _rope_kernel, (B * T, blocks), q, k, *outs, cos, sin, positions, T, H, K, len(cos),
            *q.stride(), *k.stride(), *outs[0].stride(), *outs[1].stride(), BACKWARD=backward, **sizes,
        )  # fmt: skip


def _plain(*tensors):
    """Tensors that a kernel reads one element after another."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _empty(*tensors):
    """Memory for results, contiguous, in the shapes and dtypes of these."""
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]


class _RopeTriton(torch.autograd.Function):
    """The rotation in one launch each way.

    In place, results are aliases of q and k of which autograd knows nothing: declared as changes of q and k they would be refused where both
    are views of one projection. The graph stays right, for neither the rotation nor what made q and k needs their values again; what does,
    and is no view (a view's count of changes is its whole storage's), is refused by autograd as ever.
    """

    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, inplace):
        cos, sin, positions = _plain(cos, sin, positions)
        ctx.save_for_backward(cos, sin, positions)
        if inplace:
            torch.autograd.graph.increment_version([x for x in (q, k) if not x._is_view()])
            outs = q.detach(), k.detach()
        else:
            outs = _empty(q, k)
        _turn(q, k, outs, cos, sin, positions, inplace=inplace)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        outs = _empty(*grads)
        _turn(*grads, outs, *ctx.saved_tensors, backward=True)
        return *outs, None, None, None, None


class _QKNormRopeTriton(torch.autograd.Function):
    """Norm and rotation in one launch each way; it keeps q and k as they lie, and computes the norm again."""

    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, positions, eps, offset):
        q_weight, k_weight, cos, sin, positions = _plain(q_weight, k_weight, cos, sin, positions)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, positions)
        ctx.eps, ctx.offset = eps, offset
        outs = _empty(q, k)
        (B, T, H, D), K = q.shape, k.shape[2]
        blocks, sizes = _tiles(H, K, D, cos.shape[1], _TILE)
        if B * T * (H + K):
            launch(
                _qk_norm_rope_forward_kernel, (B * T, blocks), q, k, q_weight, k_weight, *outs, cos, sin, positions, T, H, K, len(cos),
                *q.stride(), *k.stride(), eps, offset, **sizes,
            )  # fmt: skip
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, q_grad, k_grad):
        q, k, q_weight, k_weight, cos, sin, positions = ctx.saved_tensors
        outs = _empty(q, k)
        (B, T, H, D), K = q.shape, k.shape[2]
        blocks, sizes = _tiles(H, K, D, cos.shape[1], _BACKWARD_TILE)
        pieces = B * T * blocks if H + K else 0
        programs = min(pieces, (_PARTIAL_PROGRAMS if sizes["REST"] else _PROGRAMS) * multiprocessors(q.device))
        sums = torch.empty(programs, 2, D, dtype=torch.float32, device=q.device)
        if programs:
            launch(
                _qk_norm_rope_backward_kernel, (programs,), q_grad, k_grad, q, k, q_weight, k_weight, *outs, sums, cos, sin, positions,
                pieces, blocks, T, H, K, len(cos), *q_grad.stride(), *k_grad.stride(), *q.stride(), *k.stride(), ctx.eps, ctx.offset, **sizes,
            )  # fmt: skip
        q_sum, k_sum = sums.sum(0)
        return *outs, q_sum.to(q_weight.dtype), k_sum.to(k_weight.dtype), None, None, None, None, None


def _check(op, q, k, cos, sin, positions):
    if cos.shape != sin.shape or cos.dim() != 2 or 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(f"{op}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be (P, rotary/2 <= {q.shape[-1] // 2})")
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{op}: q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, T, H, D) and (B, T, K, D)")
    if positions is None and cos.shape[0] < q.shape[1]:
        raise ValueError(f"{op}: tables of {cos.shape[0]} positions, {q.shape[1]} needed")
    if positions is not None and positions.shape != q.shape[:2]:
        raise ValueError(f"{op}: positions {tuple(positions.shape)} must be {tuple(q.shape[:2])}")


def _choose(op, impl, q, k, cos, sin, positions, *weights):
    tensors = (q, k, cos, sin, *weights) if positions is None else (q, k, cos, sin, *weights, positions)
    counted = positions is None or positions.dtype == torch.int64
    native = counted and q.dtype == k.dtype != torch.int64 and cos.dtype == sin.dtype == torch.float32
    native = native and all(weight.dtype == q.dtype for weight in weights)
    triton = counted and has_kernel(q, k, cos, sin, *weights) and cos.shape[1] > 0
    return choose(op, impl, *tensors, triton=triton, native=native)


def rope(q_BTHD, k_BTKD, cos, sin, *, positions=None, inplace=False, impl="auto"):
    """Rotate q (B, T, H, D) and k (B, T, K, D) by the angles in cos, sin (P, rotary / 2) at `positions` (B, T), int64.

    `inplace` gives q and k up: their memory may become that of the results, so nothing may use them afterwards and they must not overlap;
    views of one projection may be given, and gradients flow as ever. Differentiable in q and k. Raises ValueError for shapes that do not
    match, a table too short for T, and `inplace` on a leaf that requires grad; IndexError on a CPU for positions outside of the tables.
    """
    _check("rope", q_BTHD, k_BTKD, cos, sin, positions)
    if inplace and torch.is_grad_enabled() and any(x.requires_grad and x.is_leaf for x in (q_BTHD, k_BTKD)):
        raise ValueError("rope: inplace=True would overwrite q or k, a leaf that requires grad")
    chosen = _choose("rope", impl, q_BTHD, k_BTKD, cos, sin, positions)
    if chosen == "triton":
        # Elements that share memory, as expanded ones do, can't be overwritten one by one.
        inplace = inplace and 0 not in q_BTHD.stride() and 0 not in k_BTKD.stride()
        return _RopeTriton.apply(q_BTHD, k_BTKD, cos, sin, positions, inplace)
    if chosen == "native":
        return _Native.apply(q_BTHD, k_BTKD, cos, sin, positions)
    return rope_reference(q_BTHD, k_BTKD, cos, sin, positions=positions)


def qk_norm_rope(q_BTHD, k_BTKD, q_weight, k_weight, cos, sin, *, positions=None, eps=1e-6, offset=0.0, impl="auto"):
    """RMSNorm over D of each head of q (B, T, H, D) and k (B, T, K, D), with weights (D,) to which `offset` is added, then `rope`.

    Returns (q, k) in their own dtypes. Differentiable in q, k and the weights. Raises as `rope` does, and ValueError for weights that do not
    match.
    """
    _check("qk_norm_rope", q_BTHD, k_BTKD, cos, sin, positions)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != q_BTHD.shape[-1:]:
            raise ValueError(f"qk_norm_rope: {name} {tuple(weight.shape)} must be {tuple(q_BTHD.shape[-1:])}")
    chosen = _choose("qk_norm_rope", impl, q_BTHD, k_BTKD, cos, sin, positions, q_weight, k_weight)
    if chosen == "triton":
        return _QKNormRopeTriton.apply(q_BTHD, k_BTKD, q_weight, k_weight, cos, sin, positions, eps, offset)
    if chosen == "native":
        q, k = (rms_norm(x, weight, eps, offset=offset, impl=impl) for x, weight in ((q_BTHD, q_weight), (k_BTKD, k_weight)))
        return rope(q, k, cos, sin, positions=positions, impl=impl)
    return qk_norm_rope_reference(q_BTHD, k_BTKD, q_weight, k_weight, cos, sin, positions=positions, eps=eps, offset=offset)


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one forward for shape (B, T, H, K, D): q and k in and out.

    The norm of qk_norm_rope moves no byte more, and its FLOPs (about 4 an element) are not counted.
    """
    B, T, H, K, D = shape
    elements = B * T * (H + K) * D
    return 2 * elements * dtype.itemsize, 3 * elements
