"""Writing on from many prompts: nothing but speed tells it from writing each alone by full recomputation."""

from dataclasses import replace

import pytest
import torch
from nanotrain.kernels import native

from nanotrain.model import generate as generation
from nanotrain.model.build import build_model
from nanotrain.model.cache import Cache
from nanotrain.model.generate import Generator, generate
from nanotrain.model.native_decode import NativeDecoder, decoder
from nanotrain.model.sampling import SamplingConfig, distribution
from tests.model.test_transformer import OPTIONS, build, config, logits

PROMPTS = [[1, 5, 7], [2], [9, 8, 7, 6, 5, 4, 3], [1, 5, 7, 11], [30, 31]]
GREEDY = SamplingConfig(temperature=0, max_tokens=8)
DRAWN = SamplingConfig(temperature=1.0, max_tokens=8, seed=3)


class Letters:
    """A tokenizer of one letter a token."""

    open_ended: frozenset[int] = frozenset()

    def decode(self, ids, *, escaped=False):
        return "".join(chr(97 + i) for i in ids)


@torch.no_grad()
def by_recomputation(model, prompt, steps, **options):
    """The likeliest tokens and their log-probabilities."""
    text, found = list(prompt), []
    for _ in range(steps):
        logprob, token = logits(model, torch.tensor([text]), **options)[0, -1].log_softmax(-1).max(-1)
        text.append(int(token))
        found.append(float(logprob))
    return text[len(prompt) :], found


@pytest.mark.parametrize("option", OPTIONS)
def test_greedy_equals_full_recomputation(option):
    """Uneven prompts, fewer rows than prompts, so that rows that end, some before others, make room for waiting ones."""
    model, stop = build(**OPTIONS[option]), frozenset(range(0, 50, 3))
    for draft in (None, build(seed=1, layers=1, window=4)):
        found = generate(model, PROMPTS, GREEDY, rows=3, stop=stop, draft=draft)
        for prompt, completion in zip(PROMPTS, found, strict=True):
            reach = dict(max_position=max(32, len(prompt) + 8)) if option in ("dynamic", "longrope") else {}
            wanted, logprobs = by_recomputation(model, prompt, 8, **reach)
            end = next((at + 1 for at, token in enumerate(wanted) if token in stop), 8)
            assert completion.tokens == wanted[:end], prompt
            torch.testing.assert_close(completion.logprobs, logprobs[:end], rtol=1e-9, atol=1e-9)
            assert completion.reason == ("stop" if wanted[end - 1] in stop else "length")


@pytest.mark.parametrize("original", [11, 15, 40])
def test_frequencies_that_follow_the_length_are_those_of_a_row_s_own_limit(original):
    """Limits before, at and beyond the original context, also where a draft looks past them."""
    model = build(rope_scaling="dynamic", rope_factor=9.0, rope_original_context=original)
    for draft in (None, build(seed=1, layers=1)):
        for prompt, completion in zip(PROMPTS, generate(model, PROMPTS, GREEDY, draft=draft), strict=True):
            limit = len(prompt) + 8
            wanted = by_recomputation(model, prompt, 8, max_position=max(32, limit) if limit > original else limit)
            torch.testing.assert_close((completion.tokens, completion.logprobs), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("option", ["plain", "gemma2", "learned", "alibi"])
def test_logprobs_are_the_training_heads(option):
    model = build(**OPTIONS[option])
    settings = SamplingConfig(temperature=0.7, top_k=20, repetition_penalty=1.3, max_tokens=9)
    for prompt, completion in zip(PROMPTS, generate(model, PROMPTS, settings, rows=2), strict=True):
        text = torch.tensor([[*prompt, *completion.tokens]])
        hidden = model(text[:, :-1], torch.arange(text.shape[1] - 1)[None], max_position=text.shape[1])
        logprob = model.head(hidden, text[:, 1:])[1]
        torch.testing.assert_close(torch.tensor(completion.logprobs, dtype=torch.float64), logprob[len(prompt) - 1 :].detach())


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(top_k=10), dict(top_p=0.8), dict(min_p=0.2, temperature=1.5), dict(repetition_penalty=1.5, top_p=0.9, top_k=30)],
    ids=lambda s: "-".join(s) or "plain",
)
def test_a_sample_does_not_depend_on_its_batch(settings):
    model = build(kv_heads=2, window=5, window_pattern="sf")
    c = SamplingConfig(**(dict(max_tokens=20, seed=5) | settings))
    alone = [generate(model, [prompt], c, seeds=[n])[0] for n, prompt in enumerate(PROMPTS)]
    for rows in (2, 5):
        together = generate(model, PROMPTS, c, seeds=list(range(5)), rows=rows)
        assert [t.tokens for t in together] == [a.tokens for a in alone]
    backwards = generate(model, PROMPTS[::-1], c, seeds=[4, 3, 2, 1, 0], rows=3)
    assert [t.tokens for t in backwards[::-1]] == [a.tokens for a in alone]


@pytest.mark.parametrize("scaling", [{}, OPTIONS["dynamic"] | dict(rope_factor=9.0, rope_original_context=17)], ids=["plain", "dynamic"])
def test_with_a_draft_neither(scaling):
    """Also where the draft's frequencies follow the length: no row's are another's."""
    model, draft = build(kv_heads=2, window=5, window_pattern="sf"), build(seed=1, layers=1, **scaling)
    prompts, c = [*PROMPTS, [3, 4, 5] * 11], SamplingConfig(temperature=1.5, max_tokens=12, seed=5, top_p=0.9)
    alone = [generate(model, [prompt], c, seeds=[n], draft=draft)[0].tokens for n, prompt in enumerate(prompts)]
    for rows in (2, 6):
        assert [t.tokens for t in generate(model, prompts, c, seeds=list(range(6)), rows=rows, draft=draft)] == alone


def test_seeds_follow_the_prompt_number():
    model = build()
    one, two = generate(model, [[1], [1]], DRAWN)
    assert one.tokens != two.tokens
    assert generate(model, [[1]], DRAWN)[0].tokens == one.tokens
    assert generate(model, [[1]], SamplingConfig(temperature=1.0, max_tokens=8, seed=4))[0].tokens == two.tokens
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        generate(model, [[1], [2]], DRAWN, seeds=[1])


def test_draws_follow_the_probabilities():
    """Chi-square over 3,000 first tokens of a model with 50; the 0.1% quantile of 49 degrees of freedom is 85.35."""
    model = build()
    p = distribution(logits(model, torch.tensor([[1, 2]]))[:, -1], None, SamplingConfig(temperature=1.0))[0].detach()
    found = generate(model, [[1, 2]] * 3000, SamplingConfig(temperature=1.0, max_tokens=1), rows=500)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in found]), minlength=50)
    assert ((counts - 3000 * p) ** 2 / (3000 * p)).sum() < 85.35


def test_a_draft_changes_nothing_when_greedy():
    model, draft = build(window=4), build(seed=1, layers=1)
    short = build(seed=2, layers=1, positions="learned", context=6)  # its positions end before the texts, and before one of the prompts
    for other, penalty in ((draft, 1.0), (model, 1.5), (short, 1.5), (draft.bfloat16(), 1.0)):
        settings = replace(GREEDY, repetition_penalty=penalty)
        plain = generate(model, PROMPTS, settings)
        for rows, lookahead in ((1, 1), (3, 4)):
            found = generate(model, PROMPTS, settings, rows=rows, draft=other, lookahead=lookahead)
            assert [f.tokens for f in found] == [p.tokens for p in plain]
            torch.testing.assert_close([f.logprobs for f in found], [p.logprobs for p in plain])


def test_a_perfect_draft_is_always_accepted():
    model = build()
    for settings in (DRAWN, SamplingConfig(temperature=2.0, max_tokens=20, repetition_penalty=2.0, top_p=0.9)):
        generator = Generator(model, settings, draft=model, lookahead=3)
        assert len(list(generator.run(PROMPTS))) == settings.max_tokens * 5
        assert generator.accepted == generator.proposed > 0


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(top_k=6), dict(repetition_penalty=3.0), dict(top_p=0.9, min_p=0.05, temperature=1.5)],
    ids=lambda s: "-".join(s) or "plain",
)
def test_a_draft_leaves_the_distribution_exact(settings):
    """Pairs of the second and third new token, against their exact joint distribution; the draft is another model altogether."""
    model, draft = build(vocab_size=7), build(seed=9, layers=1, vocab_size=7)
    c = SamplingConfig(**(dict(temperature=1.0, max_tokens=4) | settings))
    found = generate(model, [[1, 2]] * 6000, c, rows=1500, draft=draft, lookahead=2)
    counts = torch.zeros(7, 7)
    for completion in found:
        counts[completion.tokens[1], completion.tokens[2]] += 1
    joint = torch.zeros(7, 7, dtype=torch.float64)

    def following(text):
        seen = torch.zeros(1, 7, dtype=torch.bool)
        seen[0, text] = True
        return distribution(logits(model, torch.tensor([text]))[:, -1].detach(), seen, c)[0]

    for a, pa in enumerate(following([1, 2])):
        for b, pb in enumerate(following([1, 2, a])):
            joint[b] += pa * pb * following([1, 2, a, b])
    possible = joint > 0
    assert counts[~possible].sum() == 0
    likely = joint * 6000 >= 5  # rarer pairs are one class
    observed = torch.cat([counts[likely], counts[possible & ~likely].sum()[None]])
    expected = torch.cat([joint[likely], joint[possible & ~likely].sum()[None]]) * 6000
    chi_square = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    freedom = len(observed) - 1
    assert chi_square < freedom + 3.3 * (2 * freedom) ** 0.5 + 6.6  # the 0.1% quantile, by Laurent and Massart's bound


def test_stop_tokens_and_strings():
    model, letters = build(), Letters()
    free = generate(model, PROMPTS, GREEDY, tokenizer=letters)
    text = free[0].text
    assert text == letters.decode(free[0].tokens)
    stopped = generate(model, PROMPTS, GREEDY, stop=frozenset([free[0].tokens[3]]), tokenizer=letters)[0]
    at = free[0].tokens.index(free[0].tokens[3])
    assert (stopped.tokens, stopped.reason, stopped.text) == (free[0].tokens[: at + 1], "stop", text[:at])
    cut = generate(model, PROMPTS, GREEDY, stop_text=("nowhere", text[3:5]), tokenizer=letters)[0]
    at = text.index(text[3:5])
    assert (cut.text, cut.reason, cut.tokens) == (text[:at], "text", free[0].tokens[: at + 2])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generate(model, PROMPTS, GREEDY, stop_text=("x",))


def test_what_may_become_a_stop_string_is_held_back():
    model, letters = build(), Letters()
    text = generate(model, [[1, 5, 7]], DRAWN, tokenizer=letters)[0].text
    assert len(set(text[:5])) == 5
    shown = [w.text for w in Generator(model, DRAWN, tokenizer=letters, stop_text=(text[2:4] + "\0",)).run([[1, 5, 7]])]
    assert shown == [text[0], text[1], "", "", text[2:5], *text[5:]]
    cut = [w.text for w in Generator(model, DRAWN, tokenizer=letters, stop_text=(text[2:4],)).run([[1, 5, 7]])]
    assert cut == [text[0], text[1], "", ""]
    assert generate(model, [[1, 5, 7]], DRAWN, tokenizer=letters, stop_text=(text[3], text[2:4]))[0].text == text[:2]  # the first in the text counts
    # What is held back where the text ends is shown; a whole stop string among it is not.
    end, whole = (text[-1] + "\0",), (text[-3:] + "\0", text[-2:], "")
    assert [w.text for w in Generator(model, DRAWN, tokenizer=letters, stop_text=end).run([[1, 5, 7]])][-1] == text[-1]
    both = generate(model, [[1, 5, 7]], DRAWN, tokenizer=letters, stop_text=whole)[0]
    assert (both.text, both.reason) == (text[:-2], "text")


def test_learned_positions_end():
    model = build(positions="learned")
    assert [len(c.tokens) for c in generate(model, [[1] * 30, [1]], SamplingConfig(max_tokens=40), draft=model)] == [2, 31]
    with pytest.raises(ValueError, match="learned positions end at 32"):
        generate(model, [[1] * 32], SamplingConfig())


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "no token; begin it with bos"),
        ([3, 50], {}, "go from 3 to 50, the model's from 0 to 49"),
        ([-1, 3], {}, "go from -1 to 3"),
        ([1], dict(rows=0), "rows 0"),
        ([1], dict(lookahead=0), "lookahead 0"),
        ([1], dict(draft=build(vocab_size=40)), "must share a tokenizer"),
        ([1], dict(draft=build().to("meta")), "the draft model is on meta, the model on cpu"),
    ],
)
def test_what_cannot_be_served(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(build(), [[1], prompt], GREEDY, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "settings", [dict(temperature=0), dict(), dict(top_k=5, top_p=0.9, min_p=0.1), dict(repetition_penalty=2.0)], ids=lambda s: "-".join(s) or "plain"
)
def test_logits_that_are_no_numbers_are_one_clear_error(settings, damage, dtype):
    """They begin at the fourth token: of a prompt, or of what is written."""
    model = build(positions="learned").to(dtype)
    with torch.no_grad():
        model.embed_positions.weight[3] = damage
    c = SamplingConfig(**(dict(max_tokens=8, temperature=1.0) | settings))
    for prompt in ([1, 2, 3, 4], [1]):
        for draft in (None, build(layers=1).to(dtype)):
            with pytest.raises(ValueError, match=r"logits after [1-4] tokens are infinite or no numbers" if draft else "logits after 4 tokens"):
                generate(model, [prompt], c, draft=draft)


def test_a_draft_that_is_damaged_only_slows():
    model, draft = build(), build(layers=1)
    with torch.no_grad():
        draft.head.weight.fill_(torch.nan)
    for settings in (GREEDY, DRAWN):
        generator = Generator(model, settings, draft=draft)
        assert len(list(generator.run([[1, 2]]))) == 8 and generator.accepted == 0


def test_long_prompts(monkeypatch):
    """Longer than the window and than a cache is at first, and admitted as far as a forward may go."""
    model, admitted, prefill = build(kv_heads=2, window=5, window_pattern="sf"), [], Cache.prefill
    prompts = [[*range(50), *range(20, 40)], [2], [9, 8, 7], [*range(50), *range(25)]]

    def noted(cache, lengths, device):
        admitted.append(lengths)
        return prefill(cache, lengths, device)

    monkeypatch.setattr(generation, "_PREFILL", 74)
    monkeypatch.setattr(Cache, "prefill", noted)
    for draft in (None, build(seed=1, layers=1, window=4)):
        for prompt, completion in zip(prompts, generate(model, prompts, GREEDY, draft=draft), strict=True):
            torch.testing.assert_close((completion.tokens, completion.logprobs), by_recomputation(model, prompt, 8), rtol=1e-9, atol=1e-9)
    assert admitted[:2] == [[70, 1, 3], [75]]


def test_ends_at_the_first_token():
    model = build()
    first = generate(model, PROMPTS, replace(GREEDY, max_tokens=1))
    for draft in (None, model):
        assert generate(model, [], GREEDY, draft=draft) == []
        for found in (generate(model, PROMPTS, replace(GREEDY, max_tokens=1), draft=draft, rows=2),
                      generate(model, PROMPTS, GREEDY, stop=frozenset(f.tokens[0] for f in first), draft=draft, rows=2)):  # fmt: skip
            assert [f.tokens for f in found] == [f.tokens for f in first]


def test_a_far_limit_takes_nothing_that_is_not_written():
    model = build(tied=False)
    last = generate(model, [[1, 5, 7]], replace(GREEDY, max_tokens=40))[0].tokens[-1]
    generator = Generator(model, replace(GREEDY, max_tokens=10**12), stop=frozenset([last]))
    written = len(list(generator.run([[1, 5, 7]])))
    assert written <= 40 and generator.cache.nbytes() <= 2 * 2 * 64 * 16 * 8 and len(model.rotary_tables(1, torch.device("cpu"))[0]) <= 128


def test_given_up_half_way():
    """Gradients are on between two tokens; a run that is left leaves nothing to the next; training goes on as if none had been."""
    model, again = build(), build()
    generator = Generator(model, DRAWN, rows=2)
    run = generator.run(PROMPTS)
    for _ in range(3):
        next(run)
        assert torch.is_grad_enabled()
    run.close()
    assert [w.token for w in generator.run(PROMPTS)] == [w.token for w in Generator(again, DRAWN, rows=2).run(PROMPTS)]
    for trained in (model, build()):
        trained.head(trained(torch.tensor([[1, 2, 3]]), torch.arange(3)[None]), torch.tensor([[2, 3, 4]]))[0].sum().backward()
        gradients = [p.grad for p in trained.parameters()]
        torch.testing.assert_close(gradients, [p.grad for p in model.parameters()], rtol=0, atol=0)


def test_the_cache_holds_no_more_than_can_be_seen():
    model = build(kv_heads=2, window=5, window_pattern="sf")
    cache = Cache(4, 1000)
    with torch.no_grad():
        step = cache.prefill([300], torch.device("cpu"))
        model(torch.ones(1, 300, dtype=torch.int64), step.positions, cache=step, max_position=1000)
    sliding, full = cache.layers[0][0], cache.layers[1][0]
    assert sliding.shape == (4, 5, 2, 4) and full.shape == (4, 300, 2, 4)  # 2 heads of keys, not 4; 5 tokens of window, not 1000
    with pytest.raises(ValueError, match="1000 tokens a row is full"):
        cache.prefill([1001], torch.device("cpu"))
    with pytest.raises(ValueError, match="no room"):
        cache.prefill([1] * 4, torch.device("cpu"))


@pytest.mark.skipif(native.library("decode") is None, reason="no native decode here")
@pytest.mark.parametrize("settings", [dict(temperature=0), dict(), dict(top_p=0.9, top_k=30, min_p=0.01), dict(repetition_penalty=1.5)],
                         ids=lambda s: "-".join(s) or "plain")  # fmt: skip
def test_native_steps_change_nothing(settings, monkeypatch):
    """Where a native step serves it draws, too, but for a repetition penalty."""
    model, c, drawn, draw = build().float(), SamplingConfig(**(dict(temperature=1.0, max_tokens=12) | settings)), [], NativeDecoder.draw
    monkeypatch.setattr(NativeDecoder, "draw", lambda *arguments: drawn.append(1) or draw(*arguments))
    found = generate(model, PROMPTS, c, rows=3)
    assert bool(drawn) == ("repetition_penalty" not in settings)
    monkeypatch.setattr(generation, "decoder", lambda model: None)
    for fast, plain in zip(found, generate(model, PROMPTS, c, rows=3), strict=True):
        assert fast.tokens == plain.tokens
        torch.testing.assert_close(fast.logprobs, plain.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_cpu_not_a_bit_depends_on_the_batch(dtype):
    """Where native steps serve, log-probabilities too are those of each prompt alone, though its neighbours come, end and make room."""
    model = build_model(config(width=64, ffn_width=96, kv_heads=2, window=5, window_pattern="sf"), seed=0, dtype=dtype, device="cpu")
    assert decoder(model) is not None, "no C++ compiler"
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.dim() == 2 else 1)
    c = SamplingConfig(temperature=1.0, max_tokens=12)
    together = generate(model, PROMPTS, c, seeds=[5, 6, 7, 8, 9], rows=3, stop=frozenset(range(6)))
    alone = [generate(model, [prompt], c, seeds=[5 + n], stop=frozenset(range(6)))[0] for n, prompt in enumerate(PROMPTS)]
    assert together == alone and len({len(a.tokens) for a in alone}) > 1
