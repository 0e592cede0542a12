"""Cross-entropy per token, from logits or straight from hidden states without ever holding [N, V] logits.

    z = softcap(h W^T) / temperature        logprob = z_y - lse(z)        entropy = lse(z) - sum_v p_v z_v
    loss = (1 - e) * -logprob + e * (lse(z) - mean_v z_v) + z_loss * lse(z)^2          e = label_smoothing

Shapes: hidden (N, C), weight (V, C), labels (N,) int64; results (N,) in fp32 (float64 for float64). Rows with
labels == ignore_index give zeros.

Matrix products run in the inputs' dtype, accumulate in fp32 inside and round their results: the logits, each row's gradient of
hidden, each chunk's gradient of the weight. On a CPU a bf16 product is several times faster than an fp32 one, and fp32 and float64
inputs, the oracle, lose nothing. Softmax statistics, losses, gradients of logits until they are multiplied, and the sum of the
weight's gradient over chunks are in fp32 (float64 for float64).

GEMM FLOPs: 2 * N * C * V each, 3 of them with `token_weight_N` (gradients made in the forward), 4 without (the backward
recomputes each chunk's logits).
Sources: chunking as in Wijmans et al. 2024 (arXiv 2411.09009) and Hsu et al. 2024 (arXiv 2410.10989).
"""

from __future__ import annotations

import torch
from nanotrain.kernels.cpu import call, dense
from nanotrain.kernels.runtime import choose, compute_dtype
from torch.autograd.function import once_differentiable

EXAMPLES = ((6, 16, 50), (33, 8, 131), (1, 4, 3))
"""Shapes (N, C, V) that tests and benchmarks share."""

_CHUNK = 1 << 21
"""Logits of a chunk in the reference: 8 MB of fp32, few enough to stay near the processor, rows enough for its matrix products."""

_GPU_CHUNK = 1 << 27
"""The same on a GPU, whose matrix products want thousands of rows: each chunk reads the whole weight and its gradient."""


class _Options:
    """What a chunk needs to know besides its tensors."""

    def __init__(self, ignore_index, label_smoothing, z_loss, softcap, temperature, vocab_start, vocab_size, reduce, native):
        self.ignore_index, self.label_smoothing, self.z_loss = ignore_index, label_smoothing, z_loss
        self.softcap, self.temperature = softcap, temperature
        self.vocab_start, self.vocab_size = vocab_start, vocab_size
        self.reduce = reduce or (lambda tensor, op: tensor)
        self.native = native


def _forward_chunk(hidden, weight, labels, o, want_entropy, want_gradient):
    """(loss, logprob, entropy or None) of a chunk of rows, and the parts its gradient is made of."""
    z, tanh = (hidden @ weight.T).to(compute_dtype(hidden)), None
    if o.softcap is not None:
        tanh = torch.tanh(z / o.softcap)
        z = o.softcap * tanh
    if o.temperature != 1.0:
        z = z / o.temperature
    ignored = labels == o.ignore_index
    local = labels - o.vocab_start
    here = (local >= 0) & (local < z.shape[1]) & ~ignored
    local = local.clamp(0, z.shape[1] - 1)
    target = o.reduce(z.gather(1, local[:, None]).squeeze(1).masked_fill(~here, 0.0), "sum")
    mean = o.reduce(z.sum(1), "sum") / o.vocab_size if o.label_smoothing else None
    peak = o.reduce(z.amax(1), "max")
    p = (z.clone() if want_entropy else z).sub_(peak[:, None]).exp_()
    total = o.reduce(p.sum(1), "sum")
    lse = total.log() + peak
    entropy = (lse - o.reduce((p * z).sum(1), "sum") / total).masked_fill(ignored, 0.0) if want_entropy else None
    logprob = target - lse
    loss = -(1.0 - o.label_smoothing) * logprob
    if o.label_smoothing:
        loss = loss + o.label_smoothing * (lse - mean)
    if o.z_loss:
        loss = loss + o.z_loss * lse.square()
    if want_gradient:
        p.mul_(total.reciprocal()[:, None])
    parts = (p, z, tanh, local, here, lse, ignored)
    return loss.masked_fill(ignored, 0.0), logprob.masked_fill(ignored, 0.0), entropy, parts


def _logit_gradient(parts, entropy, grad_loss, grad_logprob, grad_entropy, o):
    """d(sum of upstream * result)/d(raw logits) of a chunk, made in place of its probabilities."""
    p, z, tanh, local, here, lse, ignored = parts
    keep = ~ignored
    grad_loss = grad_loss * keep
    grad_logprob = grad_logprob * keep if grad_logprob is not None else 0.0
    p_factor = grad_loss - grad_logprob
    if o.z_loss:
        p_factor = p_factor + grad_loss * (2.0 * o.z_loss) * lse
    onehot = (grad_logprob - (1.0 - o.label_smoothing) * grad_loss) * here
    if grad_entropy is not None:
        slope = p_factor[:, None] - (grad_entropy * keep)[:, None] * (z - lse[:, None] + entropy[:, None])
        gradient = p.mul_(slope)
    else:
        gradient = p.mul_(p_factor[:, None])
    gradient.scatter_add_(1, local[:, None], onehot[:, None])
    if o.label_smoothing:
        gradient.sub_((grad_loss * (o.label_smoothing / o.vocab_size))[:, None])
    if o.temperature != 1.0:
        gradient.div_(o.temperature)
    if tanh is not None:
        gradient.mul_(1.0 - tanh.square())
    return gradient


def _native_chunk(hidden, weight, labels, factors, logprob, o):
    """Write the log-probabilities of a chunk of rows; returns its logits, turned into the gradient of sum(factors * loss) where factors are given."""
    z = hidden @ weight.T
    call("cross_entropy", z.dtype, z, dense(labels), dense(factors), logprob, o.ignore_index, *z.shape)
    return z


def _chunk_logits(device: torch.device) -> int:
    """Logits of a chunk on the device, of 16 rows at the least."""
    return _CHUNK if device.type == "cpu" else _GPU_CHUNK


def _chunks(rows, columns, device):
    step = max(16, _chunk_logits(device) // max(1, columns))
    return [slice(i, min(rows, i + step)) for i in range(0, rows, step)]


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
    def forward(ctx, hidden, weight, labels, o, want_entropy):
        dtype = compute_dtype(hidden)
        loss, logprob = (torch.empty(len(labels), dtype=dtype, device=hidden.device) for _ in range(2))
        entropy = torch.empty_like(loss) if want_entropy else None
        for part in _chunks(len(labels), weight.shape[0], weight.device):
            if o.native:
                _native_chunk(hidden[part], weight, labels[part], None, logprob[part], o)
                torch.neg(logprob[part], out=loss[part])
                continue
            loss[part], logprob[part], e, _ = _forward_chunk(hidden[part], weight, labels[part], o, want_entropy, False)
            if want_entropy:
                entropy[part] = e
        ctx.save_for_backward(hidden, weight, labels)
        ctx.o, ctx.want_entropy = o, want_entropy
        return loss, logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, grad_logprob, grad_entropy):
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = _WeightGradient(weight)
        for part in _chunks(len(labels), weight.shape[0], weight.device):
            if ctx.o.native:
                factors = grad_loss[part] - grad_logprob[part]
                gradient = _native_chunk(hidden[part], weight, labels[part], factors, torch.empty_like(factors), ctx.o)
            else:
                _, _, entropy, parts = _forward_chunk(hidden[part], weight, labels[part], ctx.o, ctx.want_entropy, True)
                upstream = (g if g is None else g[part] for g in (grad_loss, grad_logprob, grad_entropy))
                gradient = _logit_gradient(parts, entropy, *upstream, ctx.o).to(hidden.dtype)
            torch.mm(gradient, weight, out=grad_hidden[part])
            grad_weight.add(gradient, hidden[part])
        return ctx.o.reduce(grad_hidden, "sum"), grad_weight.sum.to(weight.dtype), None, None, None


class _Weighted(torch.autograd.Function):
    """One scalar, sum of token_weight * loss: its gradients are made in the forward, no logits are recomputed.

    The backward scales them in fp32 before it rounds: an upstream gradient may lie outside the range of the inputs' dtype.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, o, want_entropy, token_weight):
        dtype = compute_dtype(hidden)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        logprob = torch.empty(len(labels), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(logprob) if want_entropy else None
        ctx.dtype, needs = hidden.dtype, any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if needs else None
        grad_weight = _WeightGradient(weight) if needs else None
        for part in _chunks(len(labels), weight.shape[0], weight.device):
            factors = token_weight[part].to(dtype)
            if o.native:
                gradient = _native_chunk(hidden[part], weight, labels[part], factors if needs else None, logprob[part], o)
                total -= (logprob[part] * factors).sum()
            else:
                loss, logprob[part], e, parts = _forward_chunk(hidden[part], weight, labels[part], o, want_entropy, needs)
                total += (loss * factors).sum()
                if want_entropy:
                    entropy[part] = e
                gradient = _logit_gradient(parts, None, factors, None, None, o).to(hidden.dtype) if needs else None
            if needs:
                torch.mm(gradient, weight, out=grad_hidden[part])
                grad_weight.add(gradient, hidden[part])
        if needs:
            ctx.save_for_backward(o.reduce(grad_hidden, "sum"), grad_weight.sum)
        ctx.mark_non_differentiable(logprob, *([entropy] if want_entropy else []))
        return total, logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, *_):
        grad_hidden, grad_weight = ((g.to(grad_total.dtype) * grad_total).to(ctx.dtype) for g in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None, None, None


def linear_cross_entropy_reference(
    hidden_NC, weight_VC, labels_N, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, token_weight_N=None, rows=None,
    temperature=1.0, vocab_start=0, reduce=None, return_entropy=False, native=False,
):  # fmt: skip
    """Chunked linear cross-entropy in plain PyTorch: memory beyond the gradients is one chunk of logits. `native` has C++ take over between
    the products with the weight; it knows no option that changes the loss."""
    vocab_size = weight_VC.shape[0]
    if reduce is not None:
        vocab_size = int(reduce(torch.tensor(vocab_size, device=hidden_NC.device), "sum"))
    o = _Options(ignore_index, label_smoothing, z_loss, softcap, temperature, vocab_start, vocab_size, reduce, native)
    N = labels_N.shape[0]
    if rows is not None:
        hidden_NC, labels_N = hidden_NC[rows], labels_N[rows]
        token_weight_N = None if token_weight_N is None else token_weight_N[rows]
    if token_weight_N is None:
        results = _General.apply(hidden_NC, weight_VC, labels_N, o, return_entropy)
    else:
        results = _Weighted.apply(hidden_NC, weight_VC, labels_N, o, return_entropy, token_weight_N)

    def full(values):  # the rows that were dropped get zeros
        if values is None or rows is None or values.dim() == 0:
            return values
        return values.new_zeros(N).index_put((rows,), values)

    return tuple(full(values) for values in results)


def _check_softcap(op, softcap):
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{op}: softcap={softcap} must be positive; None is no cap")


def _check_labels(op, labels, ignore_index, first, size):
    """Refuse labels outside [first, first + size), where reading them waits for no device and they have values (FakeTensor's have none)."""
    if labels.device.type != "cpu" or type(labels) is not torch.Tensor:
        return
    wrong = ((labels < first) | (labels >= first + size)) & (labels != ignore_index)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(f"{op}: label {int(labels[index])} at index {index} is not in [{first}, {first + size}), nor ignore_index={ignore_index}")


def linear_cross_entropy(
    hidden_NC, weight_VC, labels_N, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, token_weight_N=None, rows=None,
    temperature=1.0, vocab_start=0, reduce=None, return_entropy=False, impl="auto",
):  # fmt: skip
    """Per-token cross-entropy of hidden (N, C) through the output matrix weight (V, C): (loss_N, logprob_N, entropy_N or None).

    All three are differentiable with a true per-token upstream gradient. Labels are int64 in [0, V) or ignore_index; on a CPU
    any other is refused, on a GPU, where to look is to wait, and with `reduce` it must not occur.

    token_weight_N  (N,): the first result is then the scalar sum of token_weight * loss, its gradients made in the forward (3 GEMMs in
                    place of 4), and the other two are detached. The weights get no gradient. Gradients of fp16 logits are rounded with
                    these weights in them, so a loss scale belongs in here, not in the upstream gradient alone
    rows            int64 indices of the rows that are not ignored, where the host knows them: only these are multiplied
    temperature     divides the (soft-capped) logits
    vocab_start, reduce   vocabulary-parallel: this weight holds rows vocab_start.. of the whole, and reduce(tensor, "max" | "sum")
                    combines over the group; the gradient of hidden is summed over it

    Raises ValueError for shapes, dtypes or labels that do not fit.
    """
    if hidden_NC.dim() != 2 or weight_VC.dim() != 2 or hidden_NC.shape[1] != weight_VC.shape[1]:
        raise ValueError(f"linear_cross_entropy: hidden {tuple(hidden_NC.shape)} and weight {tuple(weight_VC.shape)} do not fit")
    if labels_N.shape != hidden_NC.shape[:1] or labels_N.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: labels {tuple(labels_N.shape)} {labels_N.dtype} must be ({hidden_NC.shape[0]},) torch.int64")
    if hidden_NC.dtype != weight_VC.dtype:
        raise ValueError(f"linear_cross_entropy: hidden {hidden_NC.dtype} and weight {weight_VC.dtype} differ")
    if token_weight_N is not None and token_weight_N.shape != labels_N.shape:
        raise ValueError(f"linear_cross_entropy: token_weight {tuple(token_weight_N.shape)} must be {tuple(labels_N.shape)}")
    if temperature <= 0:
        raise ValueError(f"linear_cross_entropy: temperature={temperature} must be positive")
    _check_softcap("linear_cross_entropy", softcap)
    tensors = (hidden_NC, weight_VC, labels_N) if token_weight_N is None else (hidden_NC, weight_VC, labels_N, token_weight_N)
    plain = not (label_smoothing or z_loss or vocab_start or return_entropy) and softcap is reduce is None and temperature == 1.0
    native = choose("linear_cross_entropy", impl, *tensors, native=plain and hidden_NC.is_floating_point()) == "native"
    if reduce is None:
        _check_labels("linear_cross_entropy", labels_N, ignore_index, vocab_start, weight_VC.shape[0])
    return linear_cross_entropy_reference(
        hidden_NC, weight_VC, labels_N, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        token_weight_N=token_weight_N, rows=rows, temperature=temperature, vocab_start=vocab_start, reduce=reduce, return_entropy=return_entropy,
        native=native,
    )  # fmt: skip


def cross_entropy_reference(logits_NV, labels_N, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None):
    """Cross-entropy on logits in plain PyTorch, autograd through it."""
    z = logits_NV.to(compute_dtype(logits_NV))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse = torch.logsumexp(z, 1)
    ignored = labels_N == ignore_index
    target = z.gather(1, labels_N.masked_fill(ignored, 0)[:, None]).squeeze(1)
    loss = lse - (1.0 - label_smoothing) * target
    if label_smoothing:
        loss = loss - label_smoothing * z.mean(1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss.masked_fill(ignored, 0.0)


def cross_entropy(logits_NV, labels_N, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, impl="auto"):
    """Losses (N,) in fp32 (float64 for float64) of logits (N, V) against labels (N,) int64; ignored rows give 0. Differentiable per token.

    Raises ValueError for shapes or dtypes that do not fit and, on a CPU, for labels outside [0, V).
    """
    if logits_NV.dim() != 2 or labels_N.shape != logits_NV.shape[:1] or labels_N.dtype != torch.int64:
        raise ValueError(f"cross_entropy: logits {tuple(logits_NV.shape)} and labels {tuple(labels_N.shape)} {labels_N.dtype} do not fit")
    _check_softcap("cross_entropy", softcap)
    choose("cross_entropy", impl, logits_NV, labels_N)
    _check_labels("cross_entropy", labels_N, ignore_index, 0, logits_NV.shape[1])
    return cross_entropy_reference(logits_NV, labels_N, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap)


def cost(shape, dtype, *, weighted=True) -> tuple[int, int]:
    """(bytes moved, FLOPs) of forward and backward for shape (N, C, V): hidden, weight and both gradients once."""
    N, C, V = shape
    return 2 * (N * C + V * C) * dtype.itemsize, (3 if weighted else 4) * 2 * N * C * V
