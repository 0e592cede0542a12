"""Counter-based random numbers: Philox 4x32-10, a pure function of a seed and four counters.

Dropout and stochastic rounding draw from it keyed on *global* positions, so a number never depends on how the work was
split, and nothing has to be saved to resume. Written with int64 tensor arithmetic (torch has no unsigned multiply-high);
`tl.philox` of Triton gives the same 32-bit words.

Cost: 10 rounds of about 10 integer operations for four 32-bit words.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: int | torch.Tensor) -> tuple[int | torch.Tensor, int | torch.Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers, without leaving int64."""
    low, high = (b & 0xFFFF) * a, (b >> 16) * a
    high = high + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: int | torch.Tensor, c0, c1, c2, c3):
    """Four uniform 32-bit words for a 64-bit seed and four 32-bit counters.

    Seed and counters are ints or int64 tensors that broadcast against each other: where one is a tensor the words are int64 tensors in
    [0, 2**32), else ints. Ints never travel to a device, so nothing waits for it.
    """
    c0, c1, c2, c3 = (c & _MASK for c in (c0, c1, c2, c3))
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def mix_seed(seed: int | torch.Tensor, *words: int | torch.Tensor) -> int | torch.Tensor:
    """A 63-bit seed that depends on `seed` and every word: one seed per layer, document or use out of one run seed.

    Ints in, int out; a tensor anywhere makes the result an int64 tensor of the broadcast shape.
    """
    for word in words:
        a, b, _, _ = philox(seed, word, word >> 32, 0x6E616E6F, 0)
        seed = ((a & 0x7FFFFFFF) << 32) | b
    return seed


def dropout_reference(x: torch.Tensor, p: float, seed: int, counters: torch.Tensor) -> torch.Tensor:
    """Zero each element of `x` (..., C) with probability `p`, scale the rest by 1 / (1 - p).

    `counters` (...) int64: the global index of each row (a token, for a residual stream); column c of row r is decided
    by philox(seed, c // 4, r) word c % 4.
    """
    columns = torch.arange((x.shape[-1] + 3) // 4, device=x.device)
    rows = counters[..., None]
    words = torch.stack(philox(seed, columns, rows, rows >> 32, 0), -1).flatten(-2)[..., : x.shape[-1]]
    keep = words >= int(p * 2**32)
    return torch.where(keep, x / (1.0 - p), torch.zeros((), dtype=x.dtype, device=x.device))


def stochastic_round(x: torch.Tensor, dtype: torch.dtype, seed: int, first: int = 0) -> torch.Tensor:
    """Round fp32 `x` to bf16 up or down with probability equal to the distance, element i keyed on counter first + i.

    Raises ValueError for a dtype other than bf16. Non-finite values pass through.
    """
    if dtype != torch.bfloat16:
        raise ValueError(f"stochastic_round: dtype {dtype} has no stochastic rounding; use torch.bfloat16")
    index = torch.arange(first, first + x.numel(), device=x.device)
    noise = (philox(seed, index, index >> 32, 1, 0)[0] & 0xFFFF).to(torch.int32).view(x.shape)
    bits = (x.float().contiguous().view(torch.int32) + noise) & -65536
    return torch.where(torch.isfinite(x), bits.view(torch.float32), x.float()).to(dtype)
