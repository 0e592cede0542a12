"""The nearest (semi-)orthogonal matrix, by five steps of an odd polynomial: what Muon makes of a momentum.

    x <- a x + (b G + c G G) x,  G = x x^T,  from x = matrix / (1.02 |matrix|), its longer side as columns

Shapes: matrices (n, rows, columns), and so the result. Stored in bf16 between products, which accumulate in fp32 (all in float64 for float64).
G and, as G is symmetric, G G = G G^T are products of a matrix with its own transpose: one kernel computes their tiles on and under the diagonal
and stores each of the latter twice, the second time turned over, which is half the work of a plain product. The third product is cuBLAS's.
For shorter side r and longer side k a step is r^2 k + r^3 + 2 r^2 k FLOPs, and moves 4 r k + 5 r^2 elements.
Sources: Muon: Jordan et al. 2024; coefficients: Polar Express (arXiv 2505.16932); symmetric halves: the Newton-Schulz of Dion (arXiv 2504.05295).
"""

from __future__ import annotations

import torch
from nanotrain.kernels.runtime import choose, has_kernel, jit, launch, multiprocessors, tl

EXAMPLES = ((2, 64, 128), (3, 80, 80), (1, 130, 33), (1, 1, 5))
"""Shapes (n, rows, columns) that tests, the compile gate and benchmarks share."""

_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""For five steps with a safety factor of 2%: without it the rounding of bf16 pushes the largest singular value past one and far away."""


def _product_reference(x, beta=0.0, alpha=1.0):
    """alpha x x^T + beta x; x is symmetric where beta is not 0."""
    return torch.baddbmm(x, x, x, beta=beta, alpha=alpha) if beta else x @ x.mT


def _steps(matrices, dtype, product):
    """The five steps in storage of `dtype`, by `product` of the signature above."""
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in _POLAR_EXPRESS:
        x = torch.baddbmm(x, product(product(x), b, c), x, beta=a)
    return x.mT if tall else x


def orthogonalize_reference(matrices):
    """The steps in plain PyTorch."""
    return _steps(matrices, torch.float64 if matrices.dtype == torch.float64 else torch.bfloat16, _product_reference)


def _tiles(n: int, rows: int, multiprocessors: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and schedule of the product of n matrices of so many rows.

    128 x 128 tiles halve what is read, where there are enough of them for every multiprocessor; 3 stages of them are 96 KiB, so that two
    programs share an H100's, and 64 KiB on AMD, where a stage lies in registers, all that there is. fp32, which only tests store in, takes half.
    """
    if dtype == torch.float32:
        return {"BLOCK": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    if n * _triangle(-(-rows // 128)) >= multiprocessors:
        return {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}


def _triangle(side: int) -> int:
    """Entries on and under the diagonal of a square."""
    return side * (side + 1) // 2


@jit
def _symmetric_product_kernel(
    x, out, rows, depth, tiles, ratio, alpha, x_stride, x_row_stride, x_column_stride,
    ADDS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile on or under the diagonal of alpha x x^T (+ beta x), and its mirror image; tiles are numbered by rows."""
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    i -= (i * (i + 1) // 2 > tile).to(tl.int32)  # where the root was rounded across a whole number
    i += ((i + 1) * (i + 2) // 2 <= tile).to(tl.int32)
    j = tile - i * (i + 1) // 2
    row = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x += matrix * x_stride
    left = x + row[:, None] * x_row_stride + k[None, :] * x_column_stride
    right = x + column[None, :] * x_row_stride + k[:, None] * x_column_stride
    mask = (row[:, None] < rows) & (column[None, :] < rows)
    if ADDS:  # before the products and not after, so that the tile of x and theirs are never in registers together
        own = tl.load(x + row[:, None] * x_row_stride + column[None, :] * x_column_stride, mask, 0.0)
        total = own.to(tl.float32) * ratio
    else:
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK_K):
        a = tl.load(left, (row[:, None] < rows) & (k[None, :] < depth - start), 0.0)
        b = tl.load(right, (column[None, :] < rows) & (k[:, None] < depth - start), 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += BLOCK_K * x_column_stride
        right += BLOCK_K * x_column_stride
    values = (total * alpha).to(out.dtype.element_ty)
    out += matrix * rows * rows
    within = tl.arange(0, BLOCK)[:, None] * rows + tl.arange(0, BLOCK)[None, :]
    tl.store(out + (i.to(tl.int64) * rows + j) * BLOCK + within, values, mask)
    if i != j:
        mirrored = (column[:, None] < rows) & (row[None, :] < rows)
        tl.store(out + (j.to(tl.int64) * rows + i) * BLOCK + within, tl.trans(values), mirrored)


def _symmetric_product(x, beta=0.0, alpha=1.0):
    """alpha x x^T + beta x (n, rows, rows) in x's dtype for x (n, rows, columns) of any strides; x is symmetric where beta is not 0."""
    n, rows, depth = x.shape
    out = torch.empty(n, rows, rows, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    options = _tiles(n, rows, multiprocessors(x.device), x.dtype)
    tiles = _triangle(-(-rows // options["BLOCK"]))
    launch(
        _symmetric_product_kernel, (n * tiles,), x, out, rows, depth, tiles, beta / alpha, float(alpha), *x.stride(), ADDS=beta != 0.0, **options
    )  # fmt: skip
    return out


@torch.no_grad()
def orthogonalize(matrices, *, impl="auto"):
    """The nearest (semi-)orthogonal matrices of a stack (n, rows, columns), in bf16 (float64 for float64). Not differentiable.

    Five odd polynomial steps; singular values over a hundredth of the norm end between 0.85 and 1.15, which Muon needs no closer. Raises
    ValueError for other than three dimensions.
    """
    if matrices.dim() != 3:
        raise ValueError(f"orthogonalize: matrices {tuple(matrices.shape)} must be a stack (n, rows, columns)")
    if choose("orthogonalize", impl, matrices, triton=has_kernel(matrices)) == "triton":
        return _steps(matrices, torch.bfloat16, _symmetric_product)
    return orthogonalize_reference(matrices)


def cost(shape, dtype) -> tuple[int, int]:
    """(bytes moved, FLOPs) of the five steps of n matrices of `shape` (n, rows, columns), the symmetric products by halves."""
    n, short, long = shape[0], *sorted(shape[1:])
    moved = 4 * short * long + 5 * short * short
    return 5 * n * moved * 2, 5 * n * short * short * (3 * long + short)
