"""Native decode steps: what the modules would compute, and no token's bits depend on its batch."""

import ctypes
import platform

import pytest
import torch
from nanotrain.kernels import native

from nanotrain.model import native_decode
from nanotrain.model.cache import Cache
from nanotrain.model.generate import generate
from nanotrain.model.linear import Linear
from nanotrain.model.native_decode import NativeDecoder, decoder
from nanotrain.model.sampling import SamplingConfig, distribution, draw
from tests.model.test_transformer import OPTIONS, build, logits

pytestmark = pytest.mark.skipif(native.library("decode") is None, reason="no native decode here")
CPU = torch.device("cpu")
OTHERS = {"plain bfloat16": ("-mno-amx-bf16", "-mno-avx512bf16"), "avx2": ("-march=x86-64-v3",)} if platform.machine() == "x86_64" else {}
"""Builds for lesser processors."""
WIDE = dict(width=64, head_dim=16, ffn_width=96, vocab_size=77, kv_heads=2)
"""Whole vectors and tiles, and an odd rest of the vocabulary."""


@pytest.fixture(scope="module", params=["native", *OTHERS])
def library(request, tmp_path_factory):
    if request.param == "native":
        return native.library("decode")
    return native.build("decode", folder=tmp_path_factory.mktemp("native"), flags=OTHERS[request.param])


@pytest.fixture(autouse=True)
def threads():
    """One, where a test does not ask for more: on a busy machine they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_tokens(model, *shape, seed=0):
    return torch.randint(0, model.c.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def written(model, decode, T, steps=5, seed=0):
    """Texts of uneven rows, some released and filled again, and the logits that `decode(step, tokens)` gave along the way."""
    cache, texts, found, room = Cache(4, 32, width=3), [], [], 4
    for number in range(steps):
        if number in (0, 3):
            if texts:
                cache.release(1)
                texts[1] = texts[-1]
                texts.pop()
            prompts = [random_tokens(model, n, seed=seed + n) for n in (3, 1, 7, 5)[: room - len(texts)]]
            step = cache.prefill(list(map(len, prompts)), CPU)
            with torch.no_grad():
                model(torch.cat(prompts)[None], step.positions, cache=step, max_position=32)
            texts += prompts
        tokens = random_tokens(model, len(texts), T, seed=seed + 100 + number)
        found.append(([torch.cat([text, new]) for text, new in zip(texts, tokens, strict=True)], decode(cache.decode(T, CPU), tokens)))
        texts = list(found[-1][0])
    return found


def errors(model, decode, T):
    """Of logits against a full recomputation in float64."""
    exact = type(model)(model.c).double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        return torch.cat([
            (got[row] - logits(exact, text[None], max_position=32)[0, -T:]).flatten()
            for texts, found in written(model, decode, T) for got in (found.double(),) for row, text in enumerate(texts)
        ])  # fmt: skip


def by_modules(model):
    @torch.no_grad()
    def decode(step, tokens):
        return model.head.logits(model(tokens, step.positions, cache=step, max_position=32)).float()

    return decode


def by_native(model, library):
    made = NativeDecoder(model, library)
    return lambda step, tokens: made.step(step, tokens, 32)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_equals_recomputation(option, T):
    model = build(**OPTIONS[option]).float()
    assert errors(model, by_native(model, native.library("decode")), T).abs().max() < 1e-5


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("options", [dict(), dict(qk_norm=True, window=4), dict(OPTIONS["gelu_biases"], tied=False)],
                         ids=["plain", "window", "gelu"])  # fmt: skip
def test_bfloat16_rounds_as_the_modules_do(options, T, library):
    """Root-mean-square error against float64, beside that of torch's own operators."""
    model = build(**(options | WIDE)).bfloat16()
    ours, theirs = (errors(model, decode, T).square().mean().sqrt() for decode in (by_native(model, library), by_modules(model)))
    assert 0 < ours < 1.2 * theirs


@pytest.mark.parametrize("option", ["gemma2", "gelu_biases", "alibi_window_softcap", "head_dim"])
def test_builds_for_lesser_processors(option, library):
    for more in ({}, WIDE):
        model = build(**(OPTIONS[option] | more)).float()
        assert errors(model, by_native(model, library), 1).abs().max() < 1e-5


def filled(model, lengths, limit=32, width=3):
    """A cache of rows that hold random tokens, and NaN wherever they hold none."""
    cache = Cache(len(lengths), limit, width=width)
    cache._reserve(max(lengths) + width)
    cache.lengths = list(lengths)
    for number, block in enumerate(model.blocks.values()):
        window = block.attention.options["window"]
        like = torch.empty(0, 0, model.c.kv_heads, model.c.head_dim, dtype=model.head.weight.dtype)
        for held in cache.layer(number, like, like, window):
            held.fill_(torch.nan)
            for row, length in enumerate(lengths):
                cells = torch.arange(length) % held.shape[1]
                held[row, cells] = torch.randn(length, *held.shape[2:], generator=torch.Generator().manual_seed(length)).to(held)[: len(cells)]
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [dict(), dict(window=5, window_pattern="sf", qk_norm=True), OPTIONS["gemma2"], OPTIONS["gelu_biases"]],
                         ids=["plain", "window", "gemma2", "gelu"])  # fmt: skip
def test_a_tokens_bits_depend_on_nothing_else(options, dtype, library):
    """Alone, in the midst of 4 or 20 uneven rows, three tokens at once; by one thread and by two; NaN in every cell that holds nothing."""
    model = build(**(options | WIDE)).to(dtype)
    text = random_tokens(model, 9)
    seen = []
    for others, row, T, threads in (([], 0, 1, 1), ([], 0, 1, 2), ([3, 9, 1], 2, 1, 2), ([7] * 19, 17, 1, 1), ([2, 5] * 8, 4, 3, 2), ([], 0, 3, 1)):
        torch.set_num_threads(threads)
        lengths = [*others[:row], 0, *others[row:]]
        cache, made, parts = filled(model, lengths, 64 if others else 32), NativeDecoder(model, library), []
        made._team._left = 0
        for start in range(0, 9, T):
            tokens = random_tokens(model, len(lengths), T, seed=start)
            tokens[row] = text[start : start + T]
            parts.append(made.step(cache.decode(T, CPU), tokens, 64)[row])
        seen.append(torch.cat(parts))
    assert torch.isfinite(seen[0]).all()
    for other in seen[1:]:
        assert torch.equal(other, seen[0])


SETTINGS = [dict(temperature=0), dict(temperature=1.0), dict(top_k=10), dict(top_p=0.8), dict(min_p=0.2, temperature=1.5), dict(top_k=1),
            dict(top_p=0.9, top_k=30, min_p=0.05), dict(top_p=1e-9), dict(top_p=1 - 1e-9), dict(temperature=1e-3)]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
def test_draws_are_those_of_sampling(settings):
    model, c, generator = build(**WIDE).float(), SamplingConfig(**settings), torch.Generator().manual_seed(1)
    made, tokens, caches = decoder(model), [3, 1, 4, 1, 5], [filled(model, [4, 0, 7, 2, 9]) for _ in range(2)]
    for _ in range(12):
        uniforms = torch.rand(5, generator=generator, dtype=torch.float64)
        found = made.step(caches[0].decode(1, CPU), torch.tensor(tokens)[:, None], 32)[:, 0]
        want = draw(distribution(found, None, c), uniforms)
        got, logprobs = made.draw(caches[1].decode(1, CPU), tokens, 32, c, uniforms.tolist())
        assert got == want.tolist()
        torch.testing.assert_close(torch.tensor(logprobs), torch.log_softmax(found, -1).gather(1, want[:, None])[:, 0], rtol=1e-5, atol=1e-6)
        tokens = got


def test_draws_at_the_ends():
    """A uniform of 0 takes the first token that is possible, one below 1 the last; of equals the first; logits that are no numbers, some token."""
    model = build(**WIDE).float()
    with torch.no_grad():
        model.head.weight[40] = model.head.weight[20] = 5 * model.head.weight[20]
    made, zero = decoder(model), torch.tensor([[2]])
    best = int(made.step(filled(model, [0]).decode(1, CPU), zero, 32).argmax())
    for settings, uniform, want in ((dict(temperature=9.0), 0.0, 0), (dict(temperature=9.0), 1 - 2**-53, 76), (dict(top_k=1), 0.99, best)):
        assert made.draw(filled(model, [0]).decode(1, CPU), [2], 32, SamplingConfig(**settings), [uniform])[0] == [want]
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    for settings in SETTINGS:
        (token,), (logprob,) = made.draw(filled(model, [0]).decode(1, CPU), [2], 32, SamplingConfig(**settings), [0.5])
        assert 0 <= token < 77 and logprob != logprob
    with pytest.raises(ValueError, match="repetition_penalty 2.0 is not served"):
        made.draw(filled(model, [0]).decode(1, CPU), [2], 32, SamplingConfig(repetition_penalty=2.0), [0.5])


def test_weights_may_change_and_move_but_not_become_others():
    model = build(**WIDE).float()
    made = decoder(model)

    def both():
        tokens = random_tokens(model, 1, 1)
        return made.step(filled(model, [0]).decode(1, CPU), tokens, 32), logits(model, tokens)

    with torch.no_grad():
        model.blocks["0"].mlp.up_proj.weight *= 2
        torch.testing.assert_close(*both())
        for parameter in model.parameters():
            parameter.data = parameter.data.clone() * 1.1
        torch.testing.assert_close(*both())
    model.bfloat16()
    with pytest.raises(ValueError, match="moved or rebuilt"):
        both()


class Adapter(Linear):
    pass


def adapted(model):
    model.blocks["1"].mlp.down_proj.__class__ = Adapter


def halved(model):
    layer = model.blocks["0"].attention.q_proj
    layer.weight = torch.nn.Parameter(layer.weight[: len(layer.weight) // 2])


CHANGES = {
    "float64": lambda m: m.double(), "float16": lambda m: m.half(), "meta": lambda m: m.to("meta"), "adapter": adapted, "shard": halved,
    "mixed": lambda m: m.blocks["0"].mlp.double(), "attend": lambda m: setattr(m.blocks["0"].attention, "attend", lambda *a, **k: None),
    "forward": lambda m: setattr(m.blocks["1"], "forward", lambda *a, **k: None),
    "hook": lambda m: m.head.norm.register_forward_hook(lambda *a: None),
    "first_head": lambda m: setattr(m.blocks["0"].attention, "head_start", 2), "missing": lambda m: m.blocks.pop("0"),
    "more": lambda m: m.blocks["0"].register_module("lora", torch.nn.Identity()), "headless": lambda m: setattr(m, "head", None),
    "strided": lambda m: setattr(m.embed, "weight", torch.nn.Parameter(m.embed.weight.T.contiguous().T)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_only_plain_models_are_served(change):
    model = build().float()
    assert decoder(model) is not None and decoder(model.bfloat16()) is not None
    CHANGES[change](model.float())
    assert decoder(model) is None


def test_without_a_library_or_under_autocast_the_modules_serve(monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(build().float()) is None
    monkeypatch.setattr(native, "library", lambda name: None)
    assert decoder(build().float()) is None


def test_nothing_is_read_where_nothing_is():
    """A token that is none, and caches of another dtype and another model, which would be read beyond their ends."""
    model = build(**WIDE).float()
    made, c = decoder(model), SamplingConfig()
    for token in (-1, 77, 2**62):
        with pytest.raises(ValueError, match="token number 1 of 2"):
            made.step(filled(model, [0, 0]).decode(1, CPU), torch.tensor([[0], [token]]), 32)
        with pytest.raises(ValueError, match="token number 0 of 1"):
            made.draw(filled(model, [0]).decode(1, CPU), [token], 32, c, [0.5])
    for other in (build(**WIDE).bfloat16(), build(**(WIDE | dict(kv_heads=1))).float()):
        with pytest.raises(ValueError, match="not this model's heads in torch.float32"):
            made.step(filled(other, [0]).decode(1, CPU), torch.tensor([[0]]), 32)


def test_structures_are_those_of_the_library():
    sizes = (ctypes.c_int64 * 4)()
    native.library("decode").decode_layout(sizes)
    assert sizes[:] == [ctypes.sizeof(getattr(native_decode, name)) for name in ("_Layer", "_Model", "_Choice", "_Step")]


def test_a_busy_machine_is_met_with_one_thread():
    torch.set_num_threads(2)
    team, taken = native_decode._Team(), []

    def step(together, alone=1.0):
        taken.append(team.threads())
        team.took(together if taken[-1] > 1 else alone)

    for _ in range(2000):
        step(0.6)
    assert taken[:4] == [1] * 4 and sum(n == 2 for n in taken) > 1980
    taken.clear()
    for _ in range(2000):
        step(50.0)
    assert sum(n == 2 for n in taken) < 15
    taken.clear()
    for _ in range(2000):
        step(0.6)
    assert taken[-1000:].count(2) > 990


@pytest.mark.parametrize("option", ["plain", "gemma2", "learned", "dynamic"])
def test_texts_are_those_of_the_modules(option, monkeypatch):
    model, draft = build(**OPTIONS[option]).float(), build(seed=1, layers=1).float()
    prompts, greedy = [[1, 5, 7], [2], [9, 8, 7, 6, 5, 4, 3]], SamplingConfig(temperature=0, max_tokens=20)
    found = [generate(model, prompts, greedy, rows=2, draft=other) for other in (None, draft)]
    monkeypatch.setattr("nanotrain.model.generate.decoder", lambda model: None)
    want = generate(model, prompts, greedy, rows=2)
    for ours in found:
        assert [f.tokens for f in ours] == [w.tokens for w in want]
        torch.testing.assert_close([f.logprobs for f in ours], [w.logprobs for w in want], rtol=1e-5, atol=1e-5)
