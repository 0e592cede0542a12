"""The key/value cache of generation: keys and values of many rows of uneven length, each layer no longer than it can still see.

A row's token at position p lies in cell p, or, in a layer with a sliding window, in cell p modulo the cells that the window
needs: old keys are overwritten once no query can see them. Layers are sized by their own key/value heads, on first use; cells
grow with the longest row. Rows 0..n-1 are in use: a finished row's place is taken by the last one.

`Cache` gives every row as many cells as the longest has; on a CPU, C++ reads them (native_decode.py). On a GPU a `PagedCache` gives
each row the pages that its own tokens fill, and a row that ends gives them back, without a key being moved.

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
from nanotrain.kernels.decode import decode_attention
from nanotrain.kernels.runtime import on_gpu, sent

PAGE = 64
"""Tokens of a page: a tile of the decode kernel. What a row leaves of its last page is lost."""


def make_cache(device: torch.device, rows: int, limit: int, *, width: int = 1) -> Cache:
    """The cache for a device: paged on a GPU."""
    return (PagedCache if on_gpu(device) else Cache)(rows, limit, width=width)


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

    def table(self, window: int | None, device: torch.device) -> torch.Tensor | None:
        """The page table (rows in use, pages of a row) of layers of a window; None where cells are a row's own."""
        return None

    def flat(self, window: int | None, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Where the tokens at these positions of these rows lie in the cells of a layer, laid end to end."""
        size = self.size(window)
        return rows * size + positions % size

    def _reserve(self, length: int) -> None:
        if length > self.limit:
            raise ValueError(f"cache of {self.limit} tokens a row is full; start it larger")
        if length > self.cells:
            self.cells = min(self.limit, max(length, 2 * self.cells, 64))


class PagedCache(Cache):
    """The same in pages of `PAGE` tokens, for the decode kernel: a row holds the pages that its tokens fill.

    Layers of one window share a page table. Under a window a row has a ring of as many pages as the window needs, else as many as its tokens
    fill; the token at position p lies in its page p // PAGE, modulo the ring. Pages are taken from a list of free ones. Where that runs out,
    the pools grow by half at least, and what they hold is copied: a layer at a time, so that one old pool of keys and values at most lies
    beside the new ones. Releasing a row moves the last row's entries of the table, no key.
    """

    def __init__(self, rows: int, limit: int, *, width: int = 1):
        super().__init__(rows, limit, width=width)
        self._pages: dict[int | None, _Pages] = {}

    def release(self, row: int) -> None:
        for pages in self._pages.values():
            pages.release(row, len(self.lengths) - 1)
        self.lengths[row] = self.lengths[-1]
        self.lengths.pop()

    def size(self, window: int | None) -> int:
        longest = self.cells if window is None else min(self.limit, window + self.width - 1)
        return -(-longest // PAGE) * PAGE

    def layer(self, number: int, k: torch.Tensor, v: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (pages, PAGE, K, D) of a layer, made or grown to the pages that rows hold now."""
        count = self._owned(window).count
        held = self.layers.get(number)
        if held is None or len(held[0]) < count:
            grown = []
            for new, old in zip((k, v), held or (None, None), strict=True):
                grown.append(new.new_empty(count, PAGE, *new.shape[-2:]))
                if old is not None:
                    grown[-1][: len(old)] = old
            self.layers[number] = held = tuple(grown)
        return held

    def table(self, window: int | None, device: torch.device) -> torch.Tensor:
        return self._owned(window).table(device)[: len(self.lengths)]

    def flat(self, window: int | None, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cells = positions % self.size(window)
        return self.table(window, rows.device)[rows, cells // PAGE].long() * PAGE + cells % PAGE

    def _owned(self, window: int | None) -> _Pages:
        """The pages in layers of a window, of which every row has been given those that its tokens fill."""
        if window not in self._pages:
            self._pages[window] = _Pages(self.rows)
        self._pages[window].cover(self.lengths, self.size(window) // PAGE)
        return self._pages[window]


class _Pages:
    """Which of `count` pages each row holds, in order: in lists, and as a table that is sent to the device where it has changed."""

    def __init__(self, rows: int):
        self.count = 0
        self._free: list[int] = []
        self._held: list[list[int]] = [[] for _ in range(rows)]
        self._covered: list[int] = []
        self._host = torch.zeros(rows, 0, dtype=torch.int32)
        self._sent: torch.Tensor | None = None

    def cover(self, lengths: list[int], most: int) -> None:
        """Give rows of these lengths the pages that they lack, up to `most` each."""
        if lengths == self._covered:
            return
        self._covered = list(lengths)
        if most > self._host.shape[1]:
            self._host, self._sent = F.pad(self._host, (0, most - self._host.shape[1])), None
        lacking = [max(0, min(most, -(-length // PAGE)) - len(held)) for length, held in zip(lengths, self._held, strict=False)]
        if (short := sum(lacking) - len(self._free)) > 0:
            count = min(len(self._held) * most, self.count + max(short, self.count // 2))
            self._free += range(self.count, count)
            self.count = count
        for row, number in enumerate(lacking):
            if number:
                held = self._held[row]
                held += [self._free.pop() for _ in range(number)]
                self._host[row, len(held) - number : len(held)] = torch.tensor(held[-number:])
                self._sent = None

    def release(self, row: int, last: int) -> None:
        """Take a row's pages; the last row takes its place."""
        self._free += self._held[row]
        self._held[row], self._held[last] = self._held[last], []
        self._host[row], self._sent, self._covered = self._host[last], None, []

    def table(self, device: torch.device) -> torch.Tensor:
        """(rows, most) int32; entries of pages that a row does not hold are of no meaning."""
        if self._sent is None:
            self._sent = sent(self._host, device)
        return self._sent


class Prefill:
    """A forward over whole prompts, tokens (1, N) packed with `cu_seqlens` and `positions`."""

    def __init__(self, cache: Cache, first: int, lengths: list[int], device: torch.device):
        self.cache, self.first, self.lengths = cache, first, lengths
        counts = torch.tensor(lengths)
        ends = counts.cumsum(0)
        rows = torch.arange(len(lengths)).repeat_interleave(counts)
        positions = torch.arange(len(rows)) - (ends - counts)[rows]
        self.cu_seqlens, self.ends, self.positions = (sent(x, device) for x in (F.pad(ends, (1, 0)).int(), ends, positions[None]))
        self._rows, self._positions, self._left = first + rows, positions, counts[rows] - positions  # on the host
        self._cells: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer: int, q, k, v, *, window, **options):
        """Attention of packed q (1, N, H, D) to k, v (1, N, K, D) within each prompt; what later tokens can see is stored."""
        held = self.cache.layer(layer, k, v, window)
        if window not in self._cells:
            kept = (self._left <= self.cache.size(window)).nonzero()[:, 0]  # the last tokens of each prompt
            kept, rows, positions = (sent(x, q.device) for x in (kept, self._rows[kept], self._positions[kept]))
            self._cells[window] = kept, self.cache.flat(window, rows, positions)
        kept, cells = self._cells[window]
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
        self._cells: dict[int | None, torch.Tensor] = {}
        self._masks: dict[tuple[int, int | None], tuple[torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def lengths(self) -> torch.Tensor:
        """(B,) tokens of each row, the new ones included; made when first asked for, which a native step never does."""
        return sent(torch.tensor(self.starts) + self.count, self.device)

    @cached_property
    def positions(self) -> torch.Tensor:
        """(B, T) of the new tokens."""
        return self.lengths[:, None] + torch.arange(-self.count, 0, device=self.device)

    def attend(self, layer: int, q, k, v, *, window, softcap=None, scale=None, alibi_slopes=None):
        """Attention of q (B, T, H, D) to all that its row holds and to k, v (B, T, K, D), which are stored first."""
        cache, (B, T, H, _) = self.cache, q.shape
        held, size, table = cache.layer(layer, k, v, window), cache.size(window), cache.table(window, q.device)
        if table is None and self.even and self.starts[0] % size + T <= size:
            start = self.starts[0] % size
            for cells_held, new in zip(held, (k, v), strict=True):
                cells_held[:B, start : start + T] = new
        else:
            if window not in self._cells:
                self._cells[window] = cache.flat(window, torch.arange(B, device=q.device)[:, None], self.positions).flatten()
            for cells_held, new in zip(held, (k, v), strict=True):
                cells_held.flatten(0, 1).index_copy_(0, self._cells[window], new.flatten(0, 1))
        if table is not None or on_gpu(q.device):
            return decode_attention(
                q, *held, self.lengths, page_table=table, window=window, softcap=softcap, scale=scale, alibi_slopes=alibi_slopes, longest=self.longest
            )  # fmt: skip
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
