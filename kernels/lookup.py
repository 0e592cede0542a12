"""Embedding: rows of a table by token, with a gradient that is the same to the bit each time.

    y[i] = weight[tokens[i]]
    grad_weight[v] = sum of grad[i] over the i with tokens[i] = v, zeros where there is none

Shapes: tokens (...) int64, weight (V, C), y (..., C). The gradient is summed in fp32 and rounded once to the weight's dtype.
Forward reads and writes N * C elements. Backward reads N * C and writes V * C, each once, with N * C additions, besides a sort of N tokens; no
atomics, and nothing that the host waits for.

The backward sorts the tokens (a stable sort, so equal ones stay in their order), finds where each vocabulary row's run of them begins, and
sums each run by one program per block of columns. A run may be long: the commonest token of a text makes 3% of it, and a batch may be all one
token. So the sorted tokens are first cut into chunks of _CHUNK, at the same places whatever they are; a program per chunk sums it if it is all
one token, and a run is then the chunks within it and the fewer than 2 * _CHUNK occurrences at its two ends. For N occurrences of one token the
longest chain of additions is N / _CHUNK + 2 * _CHUNK rows, shortest near _CHUNK = sqrt(N / 2): 768 rows at N = 65,536, _ROWS of
them side by side. The order
of the additions follows from the tokens alone.
Source: the sort and segmented sum of PyTorch's embedding_dense_backward, without the host's wait for the number of segments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nanotrain.kernels.runtime import choose, has_kernel, jit, launch, tl, triton
from torch.autograd.function import once_differentiable

EXAMPLES = ((40, 7, 64), (300, 3, 80), (1, 5, 1), (9, 300, 33))
"""Shapes (tokens N, vocabulary V, C) that tests, the compile gate and benchmarks share."""

_CHUNK = 128
"""Occurrences that are summed apart where they are all of one token; see above."""

_ROWS, _BYTES = 8, 2048
"""Rows whose loads are under way together, and most bytes of each that a program takes: 16 per thread of 4 warps. Most runs are short and most
programs write zeros, so that more of either would win nothing."""


def embedding_reference(tokens, weight):
    """weight[tokens] in plain PyTorch."""
    return F.embedding(tokens, weight)


@jit
def _embedding_chunk_kernel(
    tokens, order, grad, chunk_sums, width, column_blocks, grad_stride, grad_column_stride,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum of a chunk of the sorted tokens if they are all the same; nothing reads the places of others, which stay as they are."""
    chunk = (tl.program_id(0) // column_blocks).to(tl.int64)
    tokens += chunk * CHUNK
    order += chunk * CHUNK
    if tl.load(tokens) == tl.load(tokens + (CHUNK - 1)):
        column = (tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]).to(tl.int64)
        mask = column < width
        total = tl.zeros((1, COLUMNS), tl.float32)
        for start in range(0, CHUNK, ROWS):
            row = tl.load(order + start + tl.arange(0, ROWS))[:, None]
            values = tl.load(grad + row * grad_stride + column * grad_column_stride, mask, 0.0)
            total += tl.sum(values.to(tl.float32), 0, keep_dims=True)
        tl.store(chunk_sums + chunk * width + column, total, mask)


@jit
def _embedding_backward_kernel(
    starts, order, grad, chunk_sums, grad_weight, width, column_blocks, grad_stride, grad_column_stride,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of columns of one row of grad_weight: the whole chunks within its run of the sorted tokens, then what is left at both ends."""
    token = (tl.program_id(0) // column_blocks).to(tl.int64)
    column = (tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]).to(tl.int64)
    mask = column < width
    begin = tl.load(starts + token)
    end = tl.load(starts + token + 1)
    first = (begin + CHUNK - 1) // CHUNK
    last = tl.maximum(first, end // CHUNK)
    total = tl.zeros((1, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        chunk = start + tl.arange(0, ROWS)[:, None]
        sums = tl.load(chunk_sums + chunk.to(tl.int64) * width + column, (chunk < last) & mask, 0.0)
        total += tl.sum(sums, 0, keep_dims=True)
    for start in range(begin, end - (last - first) * CHUNK, ROWS):
        place = start + tl.arange(0, ROWS)
        place = tl.where(place < first * CHUNK, place, place + (last - first) * CHUNK)
        row = tl.load(order + place, place < end, 0)[:, None]
        values = tl.load(grad + row * grad_stride + column * grad_column_stride, (place < end)[:, None] & mask, 0.0)
        total += tl.sum(values.to(tl.float32), 0, keep_dims=True)
    tl.store(grad_weight + token * width + column, total.to(grad_weight.dtype.element_ty), mask)


def _embedding_backward(grad, tokens, vocabulary):
    """The gradient (V, C), in grad's dtype, of a table whose rows `tokens` grad (..., C) is the gradient of."""
    width = grad.shape[-1]
    grad_weight = torch.empty(vocabulary, width, dtype=grad.dtype, device=grad.device)
    if not grad_weight.numel():
        return grad_weight
    grad = grad.reshape(-1, width)
    # Half the bits are half the passes of the radix sort.
    tokens, order = torch.sort(tokens.reshape(-1).int(), stable=True)
    starts = torch.searchsorted(tokens, torch.arange(vocabulary + 1, dtype=torch.int32, device=tokens.device), out_int32=True)
    chunks = len(tokens) // _CHUNK
    chunk_sums = torch.empty(chunks, width, dtype=torch.float32, device=grad.device)
    columns = min(_BYTES // grad.element_size(), max(16, triton.next_power_of_2(width)))
    column_blocks = triton.cdiv(width, columns)
    sizes = (width, column_blocks, *grad.stride())
    options = {"CHUNK": _CHUNK, "ROWS": _ROWS, "COLUMNS": columns, "num_warps": max(1, columns * grad.element_size() // 512)}
    if chunks:
        launch(_embedding_chunk_kernel, (chunks * column_blocks,), tokens, order, grad, chunk_sums, *sizes, **options)
    launch(_embedding_backward_kernel, (vocabulary * column_blocks,), starts, order, grad, chunk_sums, grad_weight, *sizes, **options)
    return grad_weight


class _Embedding(torch.autograd.Function):
    """PyTorch's gather; its backward would add with atomics, or wait for the host."""

    @staticmethod
    def forward(ctx, tokens, weight):
        ctx.save_for_backward(tokens)
        ctx.vocabulary = len(weight)
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (tokens,) = ctx.saved_tensors
        return None, _embedding_backward(grad, tokens, ctx.vocabulary)


def embedding(tokens, weight, *, impl="auto"):
    """weight[tokens] (..., C) for tokens (...) int64 in [0, V) and weight (V, C).

    Differentiable in weight, whose gradient is dense and sums in a fixed order, so that it is the same to the bit each time. Raises ValueError
    for tokens that are not int64 and for a weight of other than two dimensions.
    """
    if tokens.dtype != torch.int64:
        raise ValueError(f"embedding: tokens are {tokens.dtype}, not int64")
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight {tuple(weight.shape)} must be (vocabulary, width)")
    if choose("embedding", impl, weight, tokens, triton=has_kernel(weight)) == "triton":
        return _Embedding.apply(tokens, weight)
    return embedding_reference(tokens, weight)


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) of one backward for (N, V, C): the gradient and the tokens' places in, the whole table's gradient out."""
    tokens, vocabulary, width = shape
    return (tokens + vocabulary) * width * dtype.itemsize + 8 * (2 * tokens + vocabulary), tokens * width
