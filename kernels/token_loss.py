"""Cross-entropy per token, from logits or straight from hidden states without ever holding [N, V] logits.

    z = softcap(h W^T) / temperature        logprob = z_y - lse(z)        entropy = lse(z) - sum_v p_v z_v
    loss = (1 - e) * -logprob + e * (lse(z) - mean_v z_v) + z_loss * lse(z)^2          e = label_smoothing

Shapes: hidden (N, C), weight (V, C), labels (N,) int64; results (N,) in fp32 (float64 for float64). Rows with
labels == ignore_index give zeros.

Matrix products run in the inputs' dtype, accumulate in fp32 inside and round their results: the logits, each row's gradient of
hidden, each chunk's gradient of the weight. On a CPU a bf16 product is several times faster than an fp32 one, and fp32 and float64
inputs, the oracle, lose nothing. Softmax statistics, losses, gradients of logits until they are multiplied, and the sum of the
weight's gradient over chunks are in fp32 (float64 for float64). A logit too large for fp16 counts as its largest number.

Between the products a kernel reads a chunk's logits once for the sums that losses are made of, and one reads them again and writes their
gradient in their place: 3 passes over N V elements, 2 where a backward has the sums of its forward.
GEMM FLOPs: 2 * N * C * V each, 3 of them with `token_weight_N` (gradients made in the forward), 4 without (the backward
recomputes each chunk's logits). Memory beyond the results: a chunk of logits (1 GiB on a GPU), and of the weight's gradient its sum in fp32
and one chunk's part.
Sources: chunking as in Wijmans et al. 2024 (arXiv 2411.09009) and Hsu et al. 2024 (arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from nanotrain.kernels.attention_tiles import LOG2E, tanh
from nanotrain.kernels.cpu import call, dense
from nanotrain.kernels.runtime import choose, compute_dtype, has_kernel, jit, launch, tl, triton
from torch.autograd.function import once_differentiable

EXAMPLES = ((6, 16, 50), (33, 8, 131), (1, 4, 3))
"""Shapes (N, C, V) that tests and benchmarks share."""

_CHUNK = 1 << 21
"""Logits of a chunk that stay near a CPU: 8 MB of fp32."""

_GPU_CHUNK = 1 << 30
"""Bytes of a chunk's logits on a GPU. Its matrix products want thousands of rows, for each chunk reads the whole weight and adds to the whole
sum of its gradient: of 4096 channels in bf16, 3500 rows of 151,936 logits take twice as long to multiply as the sum takes to be read and written."""

_SUMS_BLOCK, _GRADIENT_BLOCK = 2048, 4096
"""Logits that a program has in flight, with 8 warps: 8 and 16 a thread, of bf16 one and two accesses of 16 bytes; with 16 sums would spill."""


class _Options(NamedTuple):
    """What a chunk needs to know besides its tensors."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    temperature: float = 1.0
    vocab_start: int = 0
    vocab_size: int | torch.Tensor = 0
    """Of the whole vocabulary; a 0-d tensor where it is summed over a group."""
    reduce: Callable[[torch.Tensor, str], torch.Tensor] | None = None
    entropy: bool = False
    impl: str = "reference"


def _capped(logits, o):
    """(what the softmax takes, tanh of the soft cap or None) of raw logits, in fp32 at least."""
    z, bent = logits.to(compute_dtype(logits)), None
    if logits.dtype == torch.float16:
        z = z.clamp(-65504.0, 65504.0)
    if o.softcap is not None:
        bent = torch.tanh(z / o.softcap)
        z = o.softcap * bent
    return z if o.temperature == 1.0 else z / o.temperature, bent


def _own(labels, columns, o):
    """(column of each label, clamped into this part of the vocabulary; whether it lies in it)."""
    column = labels - o.vocab_start
    return column.clamp(0, columns - 1), (column >= 0) & (column < columns) & (labels != o.ignore_index)


def _sums_reference(z, labels, o):
    """Of each row, over this part of the vocabulary, (5, N): the largest logit, the sum of exponentials of logits less it, the label's logit,
    the sum of logits, and that of those exponentials times their exponents; 0 what is not asked for."""
    column, here = _own(labels, z.shape[1], o)
    peak = z.amax(1)
    below = z - peak[:, None]
    e = below.exp() if o.entropy else below.exp_()
    none = torch.zeros_like(peak)
    target = z.gather(1, column[:, None]).squeeze(1).masked_fill(~here, 0.0)
    return torch.stack([peak, e.sum(1), target, z.sum(1) if o.label_smoothing else none, below.mul_(e).sum(1) if o.entropy else none])


def _gradient_reference(z, bent, labels, peak, middle, factors, o, dtype):
    """Of each raw logit e * a, + b at the label, - c, + e * d * (z - peak - middle), in `dtype`, where e = exp(z - peak); `factors` are a, b, c, d
    (N,), which are 0 of ignored rows."""
    a, b, c, d = factors
    column, here = _own(labels, z.shape[1], o)
    gradient = z - peak[:, None]
    slope = a[:, None] if d is None else a[:, None] + d[:, None] * (gradient - middle[:, None])
    gradient.exp_().mul_(slope)
    gradient.scatter_add_(1, column[:, None], (b * here)[:, None])
    if c is not None:
        gradient.sub_(c[:, None])
    if o.temperature != 1.0:
        gradient.div_(o.temperature)
    if bent is not None:
        gradient.mul_(1.0 - bent.square())
    return gradient.to(dtype)


@jit
def _capped_tile(x, softcap, temperature):
    """(what the softmax takes, its derivative by the raw logit) of raw logits."""
    z = x.to(tl.float32)
    slope = 1.0
    if x.dtype == tl.float16:  # NaN stays what it is
        z = tl.where(z == float("inf"), 65504.0, tl.where(z == float("-inf"), -65504.0, z))
    if softcap is not None:
        ratio = z / softcap
        e = tl.exp2(tl.abs(ratio) * (-2.0 * LOG2E))
        z, slope = tanh(ratio) * softcap, 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - tanh^2, of which nothing cancels
    if temperature is not None:
        z, slope = z / temperature, slope / temperature
    return z, slope


@jit
def _exp(x, dtype):
    """e^x; of logits in fp32 as exact as PyTorch's: rounding x log2(e) would cost 2^-24 |x| of it, so its whole part is taken off first."""
    if dtype == tl.float32:
        x = tl.where(x < -150.0, -150.0, x)  # of which nothing is left
        whole = tl.floor(x * LOG2E + 0.5)
        rest = x - whole * 0.693359375 + whole * 2.12194440e-4  # ln 2 in two parts; the first product is exact
        return tl.exp2(rest * LOG2E) * tl.exp2(whole)
    else:
        return tl.exp2(x * LOG2E)


@jit
def _loaded(pointers, inside, WHOLE: tl.constexpr):
    """Elements, all of which lie inside where they are WHOLE."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, inside, 0.0)


@jit
def _token_sums_kernel(
    logits, labels, sums, stride, column_stride, columns, vocab_start, ignore_index, softcap, temperature, SMOOTHED: tl.constexpr,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The five sums of a row, 0 and a total of 1 of an ignored one, none of whose logits is read."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    label = tl.load(labels + row)
    logits += row * stride
    end = tl.where(label == ignore_index, 0, columns)
    peak = float("-inf")
    total, plain, weighted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    # Whole blocks, which no mask keeps from being read by vectors, and the rest.
    for PART in tl.static_range(2):
        for at in range(0 if PART == 0 else end // BLOCK * BLOCK, end // BLOCK * BLOCK if PART == 0 else end, BLOCK):
            column = at + tl.arange(0, BLOCK)
            inside = column < columns
            x = _loaded(logits + column.to(tl.int64) * column_stride, inside, PART == 0)
            z, _slope = _capped_tile(x, softcap, temperature)
            above = tl.maximum(peak, tl.max(z if PART == 0 else tl.where(inside, z, float("-inf")), 0))
            base = tl.where(above == float("-inf"), 0.0, above)  # logits may be -inf
            e = _exp(z - base, x.dtype)
            if PART == 1:
                e = tl.where(inside, e, 0.0)
            shrink = _exp(peak - base, x.dtype)
            if SMOOTHED:
                plain += z
            if ENTROPY:
                weighted = (weighted + total * tl.where(peak == float("-inf"), 0.0, peak - base)) * shrink + e * (z - base)
            total = total * shrink + e
            peak = above
    column = label - vocab_start
    here = (column >= 0) & (column < end)
    target, _slope = _capped_tile(tl.load(logits + column * column_stride, here, 0.0), softcap, temperature)
    tl.store(sums + row, tl.where(end == 0, 0.0, peak))
    tl.store(sums + rows + row, tl.where(end == 0, 1.0, tl.sum(total, 0)))
    tl.store(sums + 2 * rows + row, tl.where(here, target, 0.0))
    tl.store(sums + 3 * rows + row, tl.sum(plain, 0))
    tl.store(sums + 4 * rows + row, tl.sum(weighted, 0))


@jit
def _gradient_block(logits, gradient, column, own_column, columns, numbers, d, softcap, temperature, WHOLE: tl.constexpr):
    level, factor, own, share, by_entropy, middle = numbers
    inside = column < columns
    x = _loaded(logits, inside, WHOLE)
    z, slope = _capped_tile(x, softcap, temperature)
    if d is not None:
        factor += by_entropy * (z - level - middle)
    value = _exp(z - level, x.dtype) * factor - share
    value = (value + tl.where(column == own_column, own, 0.0)) * slope
    if WHOLE:
        tl.store(gradient, value.to(gradient.dtype.element_ty))
    else:
        tl.store(gradient, value.to(gradient.dtype.element_ty), inside)


@jit
def _token_gradient_kernel(
    logits, gradient, labels, peak, middle, a, b, c, d, stride, column_stride, gradient_stride, columns, blocks, vocab_start, ignore_index,
    softcap, temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK logits' gradients of a row; `gradient` may be `logits`. Of an ignored row 0, and no logit is read."""
    row, at = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK
    label = tl.load(labels + row)
    column = at + tl.arange(0, BLOCK)
    logits += row * stride + column.to(tl.int64) * column_stride
    gradient += row * gradient_stride + column
    level, factor, own = tl.load(peak + row), tl.load(a + row), tl.load(b + row)
    share = 0.0 if c is None else tl.load(c + row)
    by_entropy = 0.0 if d is None else tl.load(d + row)
    numbers = (level, factor, own, share, by_entropy, 0.0 if d is None else tl.load(middle + row))
    if label == ignore_index:
        tl.store(gradient, tl.zeros((BLOCK,), gradient.dtype.element_ty), column < columns)
    elif at + BLOCK <= columns:
        _gradient_block(logits, gradient, column, label - vocab_start, columns, numbers, d, softcap, temperature, True)
    else:
        _gradient_block(logits, gradient, column, label - vocab_start, columns, numbers, d, softcap, temperature, False)


class _Logits(NamedTuple):
    """A chunk's, as they are worked on."""

    raw: torch.Tensor
    z: torch.Tensor | None
    """What the softmax takes, of references, in fp32 at least."""
    bent: torch.Tensor | None
    """Their tanh, where there is a soft cap."""


def _sums(work, labels, o):
    if o.impl != "triton":
        return _sums_reference(work.z, labels, o)
    logits = work.raw
    sums = torch.empty(5, len(labels), dtype=torch.float32, device=logits.device)
    if len(labels):
        launch(
            _token_sums_kernel, (len(labels),), logits, labels.contiguous(), sums, *logits.stride(), logits.shape[1], o.vocab_start,
            o.ignore_index, o.softcap, None if o.temperature == 1.0 else o.temperature, SMOOTHED=bool(o.label_smoothing), ENTROPY=o.entropy,
            BLOCK=_SUMS_BLOCK, num_warps=8,
        )  # fmt: skip
    return sums


def _gradient(work, labels, peak, middle, factors, o, *, inplace=True):
    """The gradient of logits, in their place where the kernel makes it and they may be overwritten."""
    logits = work.raw
    if o.impl != "triton":
        return _gradient_reference(work.z, work.bent, labels, peak, middle, factors, o, logits.dtype)
    gradient = logits if inplace and logits.stride(1) == 1 else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    blocks = triton.cdiv(logits.shape[1], _GRADIENT_BLOCK)
    if len(labels):
        launch(
            _token_gradient_kernel, (len(labels) * blocks,), logits, gradient, labels.contiguous(), peak, middle, *factors, *logits.stride(),
            gradient.stride(0), logits.shape[1], blocks, o.vocab_start, o.ignore_index, o.softcap,
            None if o.temperature == 1.0 else o.temperature, BLOCK=_GRADIENT_BLOCK, num_warps=8,
        )  # fmt: skip
    return gradient


def _work(raw, o):
    return _Logits(raw, None, None) if o.impl == "triton" else _Logits(raw, *_capped(raw, o))


def _at(work, column, o):
    """(what the softmax takes, tanh of the soft cap or None) at columns (n, K)."""
    return _capped(work.raw.gather(1, column), o)


def _native_chunk(z, labels, factors, logprob, o):
    """Write the log-probabilities of a chunk of rows; turn its logits into the gradient of sum(factors * loss) where factors are given."""
    call("cross_entropy", z.dtype, z, dense(labels), dense(factors), logprob, o.ignore_index, *z.shape)
    return z


def _whole(sums, o):
    """The sums of each row over the whole vocabulary."""
    if o.reduce is None:
        return sums
    peak, total, target, plain, weighted = sums
    most = o.reduce(peak.clone(), "max")
    share = (peak - most).exp()
    parts = torch.stack([total * share, target, plain, (weighted + (peak - most) * total) * share])
    return torch.stack([most, *o.reduce(parts, "sum")])


def _results(sums, labels, o):
    """(loss, logprob, entropy or None, peak, total) of each row; the first three are 0 where it is ignored.

    The log-sum-exp, peak + log(total), is not taken from a logit: rounded as coarsely as large logits are, it would leave nothing of a small loss.
    """
    peak, total, target, plain, weighted = _whole(sums, o)
    ignored, log_total = labels == o.ignore_index, total.log()
    logprob = target - peak - log_total
    loss = -(1.0 - o.label_smoothing) * logprob
    if o.label_smoothing:
        loss = loss + o.label_smoothing * (peak - plain / o.vocab_size + log_total)
    if o.z_loss:
        loss = loss + o.z_loss * (peak + log_total).square()
    entropy = (log_total - weighted / total).masked_fill(ignored, 0.0) if o.entropy else None
    return loss.masked_fill(ignored, 0.0), logprob.masked_fill(ignored, 0.0), entropy, peak, total


def _factors(labels, peak, total, grad_loss, grad_logprob, grad_entropy, o):
    """What `_gradient` multiplies for upstream gradients (N,) of the three results, of which the last two may be None."""
    ignored = labels == o.ignore_index
    grad_loss, grad_logprob, grad_entropy = (
        None if g is None else g.to(peak.dtype).masked_fill(ignored, 0.0) for g in (grad_loss, grad_logprob, grad_entropy)
    )
    a = grad_loss if grad_logprob is None else grad_loss - grad_logprob
    b = -(1.0 - o.label_smoothing) * grad_loss
    b = b if grad_logprob is None else b + grad_logprob
    if o.z_loss:
        a = a + (2.0 * o.z_loss) * grad_loss * (peak + total.log())
    c = grad_loss * o.label_smoothing / o.vocab_size if o.label_smoothing else None
    return a / total, b, c, None if grad_entropy is None else -grad_entropy / total


def _chunks(hidden: torch.Tensor, weight: torch.Tensor, o: _Options) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, their raw logits) of as few chunks as may be, of like size, each in the place of the one before.

    Rows for kernels begin 64 elements apart or a multiple, so that vectors are read from each.
    """
    rows, columns = len(hidden), len(weight)
    most = _chunk_rows(*weight.shape, hidden.dtype, hidden.device, o.impl)
    step = max(1, -(-rows // max(1, -(-rows // most))))
    apart = -(-columns // 64) * 64 if o.impl == "triton" else columns
    held = torch.empty(min(step, rows), apart, dtype=hidden.dtype, device=hidden.device)[:, :columns]
    for first in range(0, rows, step):
        part = slice(first, min(rows, first + step))
        yield part, torch.mm(hidden[part], weight.T, out=held[: part.stop - first])


def _chunk_rows(V: int, C: int, dtype: torch.dtype, device: torch.device, impl: str) -> int:
    """Most rows of a chunk, 16 at the least.

    On a CPU half as many as there are channels, where that is more than stays near the processor: to multiply them takes longer than to add to
    the sum of the weight's gradient, and their logits take half the memory of that sum.
    """
    if device.type == "cpu":
        return max(16, _CHUNK // V, C // 2)
    # References hold a few tensors of as many elements, in fp32 at least.
    return max(16, _GPU_CHUNK // (8 if impl != "triton" else 1) // (V * dtype.itemsize))


class _WeightGradient:
    """Sum over chunks of gradient^T hidden: each product in the inputs' dtype, their sum in fp32 at least."""

    def __init__(self, weight):
        self.sum = torch.zeros_like(weight, dtype=compute_dtype(weight))

    def add(self, gradient, hidden):
        if gradient.dtype == self.sum.dtype:
            self.sum.addmm_(gradient.T, hidden)
        else:
            self.sum += gradient.T @ hidden


class _General(torch.autograd.Function):
    """Per-token upstream gradients: the backward recomputes each chunk's logits."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, o):
        dtype = compute_dtype(hidden)
        loss, logprob, peak, total = (torch.empty(len(labels), dtype=dtype, device=hidden.device) for _ in range(4))
        entropy = torch.empty_like(loss) if o.entropy else None
        for part, raw in _chunks(hidden, weight, o):
            if o.impl == "native":
                _native_chunk(raw, labels[part], None, logprob[part], o)
                torch.neg(logprob[part], out=loss[part])
                continue
            loss[part], logprob[part], e, peak[part], total[part] = _results(_sums(_work(raw, o), labels[part], o), labels[part], o)
            if o.entropy:
                entropy[part] = e
        ctx.save_for_backward(hidden, weight, labels, peak, total, entropy)
        ctx.o = o
        return loss, logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        hidden, weight, labels, peak, total, entropy = ctx.saved_tensors
        o, grad_hidden = ctx.o, torch.empty_like(hidden)
        grad_weight = _WeightGradient(weight)
        for part, raw in _chunks(hidden, weight, o):
            grads = [None if g is None else g[part] for g in upstream]
            if o.impl == "native":
                factors = grads[0] - grads[1]
                gradient = _native_chunk(raw, labels[part], factors, torch.empty_like(factors), o)
            else:
                factors = _factors(labels[part], peak[part], total[part], *grads, o)
                middle = None if entropy is None else total[part].log() - entropy[part]
                gradient = _gradient(_work(raw, o), labels[part], peak[part], middle, factors, o)
            torch.mm(gradient, weight, out=grad_hidden[part])
            grad_weight.add(gradient, hidden[part])
        return o.reduce(grad_hidden, "sum") if o.reduce else grad_hidden, grad_weight.sum.to(weight.dtype), None, None


class _Weighted(torch.autograd.Function):
    """One scalar, sum of token_weight * loss: its gradients are made in the forward, no logits are recomputed.

    The backward scales them in fp32 before it rounds, for an upstream gradient may lie outside the range of the inputs' dtype, and in their
    place, so that there is no second backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, o, token_weight, needs):
        dtype = compute_dtype(hidden)
        result = torch.zeros((), dtype=dtype, device=hidden.device)
        logprob = torch.empty(len(labels), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(logprob) if o.entropy else None
        ctx.dtype = hidden.dtype
        grad_hidden = torch.empty_like(hidden) if needs else None
        grad_weight = _WeightGradient(weight) if needs else None
        for part, raw in _chunks(hidden, weight, o):
            own = token_weight[part].to(dtype).masked_fill(labels[part] == o.ignore_index, 0.0)
            if o.impl == "native":
                gradient = _native_chunk(raw, labels[part], own if needs else None, logprob[part], o)
                result -= (logprob[part] * own).sum()
            else:
                z = _work(raw, o)
                loss, logprob[part], e, peak, total = _results(_sums(z, labels[part], o), labels[part], o)
                result += (loss * own).sum()
                if o.entropy:
                    entropy[part] = e
                factors = _factors(labels[part], peak, total, own, None, None, o)
                gradient = _gradient(z, labels[part], peak, None, factors, o) if needs else None
            if needs:
                torch.mm(gradient, weight, out=grad_hidden[part])
                grad_weight.add(gradient, hidden[part])
        if needs:
            ctx.save_for_backward(o.reduce(grad_hidden, "sum") if o.reduce else grad_hidden)
        ctx.grad_weight = grad_weight.sum if needs else None
        ctx.mark_non_differentiable(logprob, *([entropy] if o.entropy else []))
        return result, logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, *_):
        if ctx.grad_weight is None:
            raise RuntimeError("linear_cross_entropy: a second backward with token_weight_N, whose gradients were made once, in the forward")
        (grad_hidden,), grad_weight, ctx.grad_weight = ctx.saved_tensors, ctx.grad_weight, None
        if ctx.dtype == grad_weight.dtype:
            return grad_hidden.mul_(grad_total), grad_weight.mul_(grad_total), None, None, None, None
        grad_hidden = (grad_hidden.to(grad_total.dtype) * grad_total).to(ctx.dtype)
        return grad_hidden, torch.mul(grad_weight, grad_total, out=torch.empty_like(grad_weight, dtype=ctx.dtype)), None, None, None, None


class _OfLogits(torch.autograd.Function):
    """Cross-entropy on logits that exist."""

    @staticmethod
    def forward(ctx, logits, labels, o, inplace):
        loss, _logprob, _entropy, peak, total = _results(_sums(_work(logits, o), labels, o), labels, o)
        ctx.save_for_backward(logits, labels, peak, total)
        ctx.o, ctx.inplace = o, inplace
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.inplace is None:
            raise RuntimeError("cross_entropy: a second backward, but inplace=True has overwritten the logits with the first's gradient")
        logits, labels, peak, total = ctx.saved_tensors
        factors = _factors(labels, peak, total, grad, None, None, ctx.o)
        gradient = _gradient(_work(logits, ctx.o), labels, peak, None, factors, ctx.o, inplace=ctx.inplace)
        if ctx.inplace:
            if gradient is not logits:
                logits.copy_(gradient)
            torch.autograd.graph.increment_version(logits)  # whoever else kept them is told
            gradient, ctx.inplace = logits.detach(), None
        return gradient, None, None, None


class _OfTokens(torch.autograd.Function):
    """Log-probabilities (N, K) of K tokens of each row; the backward recomputes each chunk's logits."""

    @staticmethod
    def forward(ctx, hidden, weight, tokens, o):
        logprobs = torch.empty(tokens.shape, dtype=compute_dtype(hidden), device=hidden.device)
        peak, total = logprobs.new_empty(2, len(tokens))
        for part, raw in _chunks(hidden, weight, o):
            z = _work(raw, o)
            peak[part], total[part] = _whole(_sums(z, tokens[part, 0], o), o)[:2]
            column, here = _own(tokens[part], len(weight), o)
            own = _at(z, column, o)[0].masked_fill(~here, 0.0)
            own = o.reduce(own, "sum") if o.reduce else own
            logprobs[part] = own - peak[part, None] - total[part, None].log()
        ctx.save_for_backward(hidden, weight, tokens, peak, total)
        ctx.o = o
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, tokens, peak, total = ctx.saved_tensors
        o, grad_hidden = ctx.o, torch.empty_like(hidden)
        grad_weight = _WeightGradient(weight)
        for part, raw in _chunks(hidden, weight, o):
            z = _work(raw, o)
            column, here = _own(tokens[part], len(weight), o)
            _, bent = _at(z, column, o)
            own = grad[part] * here / o.temperature * (1.0 if bent is None else 1.0 - bent.square())
            factors = -grad[part].sum(1) / total[part], torch.zeros_like(peak[part]), None, None
            gradient = _gradient(z, tokens[part, 0], peak[part], None, factors, o).scatter_add_(1, column, own.to(hidden.dtype))
            torch.mm(gradient, weight, out=grad_hidden[part])
            grad_weight.add(gradient, hidden[part])
        return o.reduce(grad_hidden, "sum") if o.reduce else grad_hidden, grad_weight.sum.to(weight.dtype), None, None


def _run(hidden, weight, labels, o, rows, token_weight):
    """The three results, of the rows given; rows that were dropped get zeros."""
    N = len(labels)
    if rows is not None:
        hidden, labels = hidden[rows], labels[rows]
        token_weight = None if token_weight is None else token_weight[rows]
    if token_weight is None:
        results = _General.apply(hidden, weight, labels, o)
    else:
        needs = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        results = _Weighted.apply(hidden, weight, labels, o, token_weight.detach(), needs)
    if rows is None:
        return results
    return tuple(x if x is None or x.dim() == 0 else x.new_zeros(N).index_put((rows,), x) for x in results)


def _options(weight, *, label_smoothing=0.0, reduce=None, **given) -> _Options:
    size = len(weight)
    if reduce is not None and label_smoothing:  # not to be read here, where that would wait for a device
        size = reduce(torch.full((), size, dtype=torch.int64, device=weight.device), "sum")
    return _Options(label_smoothing=label_smoothing, reduce=reduce, vocab_size=size, **given)


@torch.no_grad()
def _top(hidden, weight, k, o):
    N, dtype = len(hidden), compute_dtype(hidden)
    logprobs, tokens = torch.empty(N, k, dtype=dtype, device=hidden.device), torch.empty(N, k, dtype=torch.int64, device=hidden.device)
    for part, raw in _chunks(hidden, weight, o):
        z = _work(raw, o)
        likeliest, tokens[part] = z.raw.topk(k)
        peak, total = _whole(_sums(z, tokens[part, 0], o), o)[:2, :, None]
        logprobs[part] = _capped(likeliest, o)[0] - peak - total.log()
    return logprobs, tokens


def linear_cross_entropy_reference(hidden_NC, weight_VC, labels_N, *, rows=None, token_weight_N=None, return_entropy=False, **options):
    """Chunked linear cross-entropy in plain PyTorch: memory beyond the gradients is one chunk of logits."""
    return _run(hidden_NC, weight_VC, labels_N, _options(weight_VC, entropy=return_entropy, **options), rows, token_weight_N)


def cross_entropy_reference(logits_NV, labels_N, *, inplace=False, **options):
    """Cross-entropy on logits in plain PyTorch."""
    return _OfLogits.apply(logits_NV, labels_N, _Options(vocab_size=logits_NV.shape[1], **options), inplace)


def token_logprobs_reference(hidden_NC, weight_VC, tokens_NK, **options):
    """Log-probabilities of given tokens in plain PyTorch, a chunk of rows at a time."""
    # No label is to be ignored, whatever its number.
    return _OfTokens.apply(hidden_NC, weight_VC, tokens_NK, _options(weight_VC, ignore_index=-1, **options))


def top_logprobs_reference(hidden_NC, weight_VC, k, **options):
    """The likeliest tokens in plain PyTorch, a chunk of rows at a time."""
    return _top(hidden_NC, weight_VC, k, _options(weight_VC, ignore_index=-1, **options))


def _check_numbers(op, softcap, temperature=1.0):
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap={softcap} must be positive; None is no cap")
    if not temperature > 0:
        raise ValueError(f"{op}: temperature={temperature} must be positive")


def _check_head(op, hidden, weight):
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{op}: hidden {hidden.dtype} and weight {weight.dtype} differ")


def _check_labels(op, labels, ignore_index, first, size):
    """Refuse labels outside [first, first + size), where reading them waits for no device and they have values (FakeTensor's have none)."""
    if labels.device.type != "cpu" or type(labels) is not torch.Tensor:
        return
    wrong = (labels < first) | (labels >= first + size)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        index = wrong.nonzero()[0].tolist()
        at = index[0] if len(index) == 1 else index
        nor = "" if ignore_index is None else f", nor ignore_index={ignore_index}"
        raise ValueError(f"{op}: label {int(labels[tuple(index)])} at index {at} is not in [{first}, {first + size}){nor}")


def linear_cross_entropy(
    hidden_NC, weight_VC, labels_N, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, token_weight_N=None, rows=None,
    temperature=1.0, vocab_start=0, reduce=None, return_entropy=False, impl="auto",
):  # fmt: skip
    """Per-token cross-entropy of hidden (N, C) through the output matrix weight (V, C): (loss_N, logprob_N, entropy_N or None).

    All three are differentiable with a true per-token upstream gradient. Labels are int64 in [0, V) or ignore_index; on a CPU
    any other is refused, on a GPU, where to look is to wait, and with `reduce` it must not occur.

    token_weight_N  (N,): the first result is then the scalar sum of token_weight * loss, its gradients made in the forward (3 GEMMs in
                    place of 4) for one backward, and the other two are detached. The weights get no gradient. Gradients of fp16 logits
                    are rounded with these weights in them, so a loss scale belongs in here, not in the upstream gradient alone
    rows            int64 indices of the rows that are not ignored, where the host knows them: only these are multiplied
    temperature     divides the (soft-capped) logits
    vocab_start, reduce   vocabulary-parallel: this weight holds rows vocab_start.. of the whole, and reduce(tensor, "max" | "sum")
                    combines over the group, twice for each chunk; the gradient of hidden is summed over it

    Raises ValueError for shapes, dtypes or labels that do not fit.
    """
    _check_head("linear_cross_entropy", hidden_NC, weight_VC)
    if labels_N.shape != hidden_NC.shape[:1] or labels_N.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: labels {tuple(labels_N.shape)} {labels_N.dtype} must be ({hidden_NC.shape[0]},) torch.int64")
    if token_weight_N is not None and token_weight_N.shape != labels_N.shape:
        raise ValueError(f"linear_cross_entropy: token_weight {tuple(token_weight_N.shape)} must be {tuple(labels_N.shape)}")
    _check_numbers("linear_cross_entropy", softcap, temperature)
    tensors = (hidden_NC, weight_VC, labels_N) if token_weight_N is None else (hidden_NC, weight_VC, labels_N, token_weight_N)
    plain = not (label_smoothing or z_loss or vocab_start or return_entropy) and softcap is reduce is None and temperature == 1.0
    chosen = choose("linear_cross_entropy", impl, *tensors, triton=has_kernel(hidden_NC), native=plain and hidden_NC.is_floating_point())
    if reduce is None:
        _check_labels("linear_cross_entropy", labels_N, ignore_index, vocab_start, weight_VC.shape[0])
    o = _options(
        weight_VC, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, temperature=temperature,
        vocab_start=vocab_start, reduce=reduce, entropy=return_entropy, impl=chosen,
    )  # fmt: skip
    return _run(hidden_NC, weight_VC, labels_N, o, rows, token_weight_N)


def cross_entropy(logits_NV, labels_N, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, inplace=False, impl="auto"):
    """Losses (N,) in fp32 (float64 for float64) of logits (N, V) against labels (N,) int64; ignored rows give 0. Differentiable per token.

    inplace  the backward may write the gradient over the logits, which spares their memory once more: nothing else may need them then, and
             there can be no second backward

    Raises ValueError for shapes or dtypes that do not fit and, on a CPU, for labels outside [0, V).
    """
    if logits_NV.dim() != 2 or labels_N.shape != logits_NV.shape[:1] or labels_N.dtype != torch.int64:
        raise ValueError(f"cross_entropy: logits {tuple(logits_NV.shape)} and labels {tuple(labels_N.shape)} {labels_N.dtype} do not fit")
    _check_numbers("cross_entropy", softcap)
    if inplace and any(stride == 0 and size > 1 for size, stride in zip(logits_NV.shape, logits_NV.stride(), strict=True)):
        raise ValueError("cross_entropy: inplace=True needs logits of their own memory, these are expanded; leave it out, or clone them")
    chosen = choose("cross_entropy", impl, logits_NV, labels_N, triton=has_kernel(logits_NV))
    _check_labels("cross_entropy", labels_N, ignore_index, 0, logits_NV.shape[1])
    o = _Options(ignore_index, label_smoothing, z_loss, softcap, vocab_size=logits_NV.shape[1], impl=chosen)
    return _OfLogits.apply(logits_NV, labels_N, o, inplace)


def token_logprobs(
    hidden_NC, weight_VC, tokens_NK, *, softcap=None, temperature=1.0, vocab_start=0, reduce=None, impl="auto"
):  # fmt: skip
    """Log-probabilities (N, K) in fp32 (float64 for float64) of K tokens (int64) of each row: of those that were sampled, or of those that a
    teacher found likely. Differentiable for each; options and errors are those of `linear_cross_entropy`.
    """
    _check_head("token_logprobs", hidden_NC, weight_VC)
    if tokens_NK.dim() != 2 or tokens_NK.shape[0] != hidden_NC.shape[0] or not tokens_NK.shape[1] or tokens_NK.dtype != torch.int64:
        raise ValueError(f"token_logprobs: tokens {tuple(tokens_NK.shape)} {tokens_NK.dtype} must be ({hidden_NC.shape[0]}, K) torch.int64, K >= 1")
    _check_numbers("token_logprobs", softcap, temperature)
    chosen = choose("token_logprobs", impl, hidden_NC, weight_VC, tokens_NK, triton=has_kernel(hidden_NC))
    if reduce is None:
        _check_labels("token_logprobs", tokens_NK, None, vocab_start, weight_VC.shape[0])
    o = _options(weight_VC, ignore_index=-1, softcap=softcap, temperature=temperature, vocab_start=vocab_start, reduce=reduce, impl=chosen)
    return _OfTokens.apply(hidden_NC, weight_VC, tokens_NK, o)


def top_logprobs(hidden_NC, weight_VC, k, *, softcap=None, temperature=1.0, impl="auto"):
    """(log-probabilities (N, k) in fp32 (float64 for float64), tokens (N, k) int64) of the k likeliest tokens of each row, likeliest first.

    What a teacher hands to a student, whose own of the same tokens `token_logprobs` gives; there is no gradient. Raises ValueError for
    shapes and dtypes that do not fit, and for k outside [1, V].
    """
    _check_head("top_logprobs", hidden_NC, weight_VC)
    if not 1 <= k <= weight_VC.shape[0]:
        raise ValueError(f"top_logprobs: k={k} is not in [1, {weight_VC.shape[0]}]")
    _check_numbers("top_logprobs", softcap, temperature)
    chosen = choose("top_logprobs", impl, hidden_NC, weight_VC, triton=has_kernel(hidden_NC))
    return _top(hidden_NC, weight_VC, k, _options(weight_VC, ignore_index=-1, softcap=softcap, temperature=temperature, impl=chosen))


def cost(shape, dtype, *, weighted=True) -> tuple[int, int]:
    """(bytes moved, FLOPs) of forward and backward for shape (N, C, V): hidden, weight and both gradients once."""
    N, C, V = shape
    return 2 * (N * C + V * C) * dtype.itemsize, (3 if weighted else 4) * 2 * N * C * V
