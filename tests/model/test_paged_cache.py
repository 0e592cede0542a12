"""A cache in pages, and attention to it by the decode kernel: nothing but memory and speed tells them from a cache of rows by PyTorch."""

from contextlib import ExitStack
from functools import partial
from unittest import mock

import pytest
import torch
from nanotrain.kernels.decode import decode_attention
from nanotrain.kernels.runtime import launches

from nanotrain.model import cache as caching
from nanotrain.model.cache import Cache, PagedCache, make_cache
from nanotrain.model.generate import Generator, generate
from nanotrain.model.sampling import SamplingConfig
from tests.kernels.kit import poisoned
from tests.model.test_generate import GREEDY, PROMPTS
from tests.model.test_transformer import OPTIONS, build

CPU = torch.device("cpu")
KINDS = {name: OPTIONS[name] for name in ("plain", "gqa", "head_dim", "alibi", "gemma2", "window", "alibi_window_softcap")} | {
    "a page's window": dict(window=16, window_pattern="sf", kv_heads=2)
}


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """Short rows, too, fill several; and what is sent to a device does not change there when it does on the host."""
    monkeypatch.setattr(caching, "PAGE", 16)
    monkeypatch.setattr(caching, "sent", lambda tensor, device: tensor.clone())


def tokens_of(row: int, start: int, count: int) -> torch.Tensor:
    return (torch.arange(start, start + count) * 7 + row * 13) % 50


class Session:
    """Rows of a model that write on; each is known by a name, which says what it writes."""

    def __init__(self, model, cache):
        self.model, self.cache, self.names, self.free = model, cache, [], set()

    @torch.no_grad()
    def run(self, step, tokens):
        return self.model.head.logits(self.model(tokens, step.positions, cache=step, max_position=128))

    def prefill(self, names, lengths):
        self.names += names
        return self.run(self.cache.prefill(lengths, CPU), torch.cat([tokens_of(*pair) for pair in zip(names, [0] * 9, lengths, strict=False)])[None])

    def decode(self, count, rewind=0):
        """Logits after `count` tokens of each row, of which `rewind` are then forgotten."""
        tokens = torch.stack([tokens_of(name, length, count) for name, length in zip(self.names, self.cache.lengths, strict=True)])
        logits = self.run(self.cache.decode(count, CPU), tokens)
        self.cache.lengths = [length - rewind for length in self.cache.lengths]
        return logits

    def release(self, row):
        self.cache.release(row)
        self.names[row] = self.names[-1]
        self.names.pop()
        for number, block in enumerate(self.model.blocks.values()):  # pages given back are another's: what lies there must not matter
            if isinstance(self.cache, PagedCache):
                for held in self.cache.layers[number]:
                    held[self.cache._pages[block.attention.options["window"]]._free] = torch.nan


def story(model, cache):
    """Uneven rows that grow across pages and windows, are taken back, end and make room: the logits of every step."""
    session, found = Session(model, cache), []
    found.append(session.prefill([1, 2, 3], [1, 45, 17]))
    found += [session.decode(1), session.decode(3, rewind=2), session.decode(2, rewind=1), session.decode(3, rewind=3)]
    session.release(0)
    found += [session.decode(2) for _ in range(3)]
    found.append(session.prefill([4], [40]))
    session.release(2)
    found.append(session.prefill([5], [40]))  # as long as the one that ended
    session.release(1)
    found.append(session.prefill([6], [31]))
    found += [session.decode(3) for _ in range(4)]
    session.release(2)
    session.release(0)
    return [*found, session.decode(1)]


@pytest.mark.parametrize("option", KINDS)
def test_a_paged_cache_equals_a_dense_one(option):
    """By the reference in float64, where pages begin as NaN."""
    model = build(**KINDS[option])
    wanted = story(model, Cache(3, 128, width=3))
    with poisoned():
        found = story(model, PagedCache(3, 128, width=3))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [Cache, PagedCache])
@pytest.mark.parametrize("option", ["gemma2", "alibi_window_softcap"])
def test_the_kernel_equals_pytorch(option, kind, monkeypatch):
    """In a cache of rows, as on a GPU, and in one of pages: one launch a layer and step, more where keys are split."""
    model = build(**OPTIONS[option])
    wanted = story(model, Cache(3, 128, width=3))
    monkeypatch.setattr(caching, "decode_attention", partial(decode_attention, impl="triton"))
    monkeypatch.setattr(caching, "on_gpu", lambda device: True)
    before = launches["_decode_kernel"]
    found = story(model.float(), kind(3, 128, width=3))
    assert launches["_decode_kernel"] - before == 2 * 12
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("option", ["gqa", "window_by_layer", "dynamic"])
@pytest.mark.parametrize("drafted", [False, True])
def test_generation_is_the_same(option, drafted, monkeypatch):
    """More prompts than rows, some of which end early; with a draft tokens are taken back at every step."""
    model, draft = build(**OPTIONS[option]), build(seed=1, layers=1, window=4) if drafted else None
    prompts, stop = [*PROMPTS, [3, 4, 5] * 11], frozenset(range(0, 50, 7))
    settings = SamplingConfig(temperature=1.0, max_tokens=40, seed=5, top_p=0.9)
    wanted = [generate(model, prompts, c, rows=3, stop=stop, draft=draft) for c in (GREEDY, settings)]
    monkeypatch.setattr(caching, "on_gpu", lambda device: True)
    assert isinstance(make_cache(CPU, 1, 1), PagedCache)
    for c, want in zip((GREEDY, settings), wanted, strict=True):
        for got, completion in zip(generate(model, prompts, c, rows=3, stop=stop, draft=draft), want, strict=True):
            assert got.tokens == completion.tokens and got.reason == completion.reason
            torch.testing.assert_close(got.logprobs, completion.logprobs, rtol=1e-9, atol=1e-9)


def test_a_row_holds_the_pages_that_its_tokens_fill():
    model = build(kv_heads=2, window=20, window_pattern="sf")
    cache, dense = PagedCache(3, 128, width=3), Cache(3, 128, width=3)
    session = Session(model, cache)
    for each in (session, Session(model, dense)):
        each.prefill([1, 2, 3], [100, 2, 17])
    sliding, full = cache.layers[0][0], cache.layers[1][0]
    assert full.shape == (7 + 1 + 2, 16, 2, 4) and sliding.shape == (2 + 1 + 2, 16, 2, 4)  # of 20 + 2 tokens seen at once
    assert cache.size(20) == 32 and cache.size(None) == 112 and cache.nbytes() == 15 * 16 * 2 * (2 * 4) * 8 < 0.7 * dense.nbytes()
    # A row that ends moves no key, and the next one lies where it lay: the pool is not grown.
    kept = [x.clone() for pair in cache.layers.values() for x in pair]
    cache.release(0)
    assert all(torch.equal(x, y) for x, y in zip(kept, (x for pair in cache.layers.values() for x in pair), strict=True))
    session.names = [3, 2]
    session.prefill([4], [110])
    assert cache.layers[0][0] is sliding and cache.layers[1][0] is full
    held = [sorted(page for row in pages._held for page in row) for pages in cache._pages.values()]
    assert held == [sorted(set(pages)) for pages in held]
    assert [len(row) for row in cache._pages[None]._held] == [2, 1, 7] and [len(row) for row in cache._pages[20]._held] == [2, 1, 2]
    # Then it grows, by half at least.
    session.decode(3)
    assert cache.lengths == [20, 5, 113] and len(cache.layers[1][0]) == 15 and cache.layers[0][0] is sliding


def test_its_limits_are_those_of_a_cache():
    cache = PagedCache(2, 50)
    with pytest.raises(ValueError, match="50 tokens a row is full"):
        cache.prefill([51], CPU)
    with pytest.raises(ValueError, match="no room"):
        cache.prefill([1] * 3, CPU)
    with pytest.raises(ValueError, match="2 tokens a step"):
        cache.decode(2, CPU)


def test_a_cpu_has_rows_and_a_run_takes_what_its_device_has():
    assert type(make_cache(CPU, 1, 1)) is Cache
    generator = Generator(build(), GREEDY)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(caching, "on_gpu", lambda device: True))
        list(generator.run([[1, 2]]))
    assert type(generator.cache) is type(generator.draft_cache) is PagedCache
    list(generator.run([[1, 2]]))
    assert type(generator.cache) is Cache
