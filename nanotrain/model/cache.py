"""The key/value cache of generation: keys and values of many rows of uneven length, each layer no longer than it can still see.

A row's token at position p lies in cell p, or, in a layer with a sliding window, in cell p modulo the cells that the window
needs: old keys are overwritten once no query can see them. Layers are sized by their own key/value heads, on first use; cells
grow with the longest row. Rows 0..n-1 are in use: a finished row's place is taken by the last one.

A forward over the cache is a step: `prefill` (whole prompts, packed end to end, into fresh rows) or `decode` (the next tokens of
every row). The model hands each layer's queries, keys and values to the step's `attend`.

Legend: B rows, T new tokens of a row, N tokens of prompts laid end to end, S cells, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F

from nanotrain.kernels.attention import flash_attention


class Cache:
    """Room for `rows` rows of at most `limit` tokens; a decode may add up to `width` tokens to each row at once."""

    def __init__(self, rows: int, limit: int, *, width: int = 1):
        self.rows, self.limit, self.width = rows, limit, width
        self.lengths: list[int] = []
        """Tokens held by each row in use; shorten one to forget its last tokens, at most `width` of those just added."""
        self.cells = 0
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def prefill(self, lengths: list[int], device: torch.device) -> Prefill:
        """The step that fills new rows with prompts of `lengths` tokens; they are rows of the cache from now on."""
        first = len(self.lengths)
        if first + len(lengths) > self.rows:
            raise ValueError(f"cache of {self.rows} rows has no room for {len(lengths)} more beside {first}")
        self._reserve(max(lengths))
        self.lengths += lengths
        return Prefill(self, first, lengths, device)

    def decode(self, count: int, device: torch.device) -> Decode:
        """The step that appends `count` tokens to every row in use."""
        if count > self.width:
            raise ValueError(f"cache: {count} tokens a step, it was made for {self.width}")
        self._reserve(max(self.lengths) + count)
        starts = list(self.lengths)
        self.lengths = [length + count for length in starts]
        return Decode(self, starts, count, device)

    def release(self, row: int) -> None:
        """Give up a row; the last one in use moves to its place."""
        last = len(self.lengths) - 1
        if row != last:
            for pair in self.layers.values():
                for held in pair:
                    held[row] = held[last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(held.nbytes for pair in self.layers.values() for held in pair)

    def size(self, window: int | None) -> int:
        """Cells of a layer: a window's worth, with room for the tokens of one step, or as many as the longest row has."""
        return self.cells if window is None else min(self.cells, window + self.width - 1)

    def layer(self, number: int, k: torch.Tensor, v: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (rows, S, K, D) of a layer, made or grown to the cells it needs now."""
        size = self.size(window)
        held = self.layers.get(number)
        if held is None or held[0].shape[1] < size:
            grown = tuple(x.new_zeros(self.rows, size, *x.shape[-2:]) for x in (k, v))  # zeros: garbage may be NaN, and 0 * NaN is
            if held is not None:
                for new, old in zip(grown, held, strict=True):
                    new[:, : old.shape[1]] = old
            self.layers[number] = held = grown
        return held

    def _reserve(self, length: int) -> None:
        if length > self.limit:
            raise ValueError(f"cache of {self.limit} tokens a row is full; start it larger")
        if length > self.cells:
            self.cells = min(self.limit, max(length, 2 * self.cells, 64))


class Prefill:
    """A forward over whole prompts, tokens (1, N) packed with `cu_seqlens` and `positions`."""

    def __init__(self, cache: Cache, first: int, lengths: list[int], device: torch.device):
        self.cache, self.first, self.lengths = cache, first, lengths
        counts = torch.tensor(lengths)
        ends = counts.cumsum(0)
        self.cu_seqlens = F.pad(ends, (1, 0)).to(device, torch.int32)
        self.ends = ends.to(device)
        rows = torch.arange(len(lengths)).repeat_interleave(counts)
        self.positions = (torch.arange(len(rows)) - (ends - counts)[rows])[None].to(device)
        self._rows, self._left = (first + rows).to(device), (counts[rows].to(device) - self.positions[0])
        self._cells: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer: int, q, k, v, *, window, **options):
        """Attention of packed q (1, N, H, D) to k, v (1, N, K, D) within each prompt; what later tokens can see is stored."""
        held = self.cache.layer(layer, k, v, window)
        size = held[0].shape[1]
        if size not in self._cells:
            kept = (self._left <= size).nonzero()[:, 0]  # the last `size` tokens of each prompt
            self._cells[size] = kept, self._rows[kept] * size + self.positions[0, kept] % size
        kept, cells = self._cells[size]
        for cells_held, new in zip(held, (k, v), strict=True):
            cells_held.flatten(0, 1).index_copy_(0, cells, new[0, kept])
        documents = {} if len(self.lengths) == 1 else dict(cu_seqlens=self.cu_seqlens, lengths=self.lengths)
        return flash_attention(q, k, v, window=window, **documents, **options)


class Decode:
    """A forward over the next T tokens of every row, tokens (B, T) at `positions`."""

    def __init__(self, cache: Cache, starts: list[int], count: int, device: torch.device):
        self.cache, self.starts, self.count, self.device = cache, starts, count, device
        self.even = min(starts) == max(starts)
        self.longest = max(starts) + count
        self._cells: dict[int, torch.Tensor] = {}
        self._masks: dict[tuple[int, int | None], tuple[torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def positions(self) -> torch.Tensor:
        """(B, T); made when first asked for, which a native step never does."""
        first = torch.tensor(self.starts, device=self.device)[:, None]
        return first if self.count == 1 else first + torch.arange(self.count, device=self.device)

    def attend(self, layer: int, q, k, v, *, window, softcap=None, scale=None, alibi_slopes=None):
        """Attention of q (B, T, H, D) to all that its row holds and to k, v (B, T, K, D), which are stored first."""
        held = self.cache.layer(layer, k, v, window)
        B, T, H, _ = q.shape
        size = held[0].shape[1]
        if self.even and self.starts[0] % size + T <= size:
            start = self.starts[0] % size
            for cells_held, new in zip(held, (k, v), strict=True):
                cells_held[:B, start : start + T] = new
        else:
            if size not in self._cells:
                self._cells[size] = (torch.arange(B, device=q.device)[:, None] * size + self.positions % size).flatten()
            for cells_held, new in zip(held, (k, v), strict=True):
                cells_held.flatten(0, 1).index_copy_(0, self._cells[size], new.flatten(0, 1))
        seen = min(size, self.longest)
        query, keys, values = q.transpose(1, 2), *(x[:B, :seen].transpose(1, 2) for x in held)
        mask = bias = None
        if T > 1 or not self.even or alibi_slopes is not None or (window is not None and seen > window):
            mask, distances = self._mask(size, seen, window, q)  # else one query in rows of one length: it sees every cell there is
            if alibi_slopes is not None:
                bias = alibi_slopes.view(-1, 1, 1) * -distances
        if softcap is None and bias is None:
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=k.shape[2] < H)
        else:
            out = _attention(query, keys, values, mask, bias, softcap, scale)
        return out.transpose(1, 2)

    def _mask(self, size, seen, window, q):
        """0 for cells that a query sees and -inf for others, and how far back their tokens lie: both (B, 1, T, S)."""
        if (size, window) not in self._masks:
            last = self.positions[:, -1:]
            held = last - (last - torch.arange(seen, device=q.device)) % size  # the position of the token in each cell
            distances = (self.positions[:, :, None] - held[:, None]).unsqueeze(1)
            hidden = (distances < 0) | (held < 0)[:, None, None]
            if window is not None:
                hidden |= distances >= window
            self._masks[size, window] = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -math.inf), distances
        return self._masks[size, window]


def _attention(q, k, v, mask, bias, softcap, scale):
    """Attention that torch's own cannot say: soft-capped scores, or a bias that q's dtype is too narrow for; fp32 throughout (float64 for it)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    B, H, T, D = q.shape
    grouped = q.reshape(B, k.shape[1], -1, D).to(wide)  # query heads that share keys stand together
    scores = (grouped @ k.to(wide).mT * (D**-0.5 if scale is None else scale)).view(B, H, T, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for term in (mask, bias):
        scores = scores if term is None else scores + term
    weights = torch.softmax(scores, -1).view(B, k.shape[1], -1, scores.shape[-1])
    return (weights @ v.to(wide)).view(B, H, T, -1).to(q.dtype)
