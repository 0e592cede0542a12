"""What the model promises to everyone else, for every architecture option."""

from dataclasses import replace

import pytest
import torch

from nanotrain.model.build import build_model, initial_value, meta_model, parameter_count
from nanotrain.model.cache import Cache
from nanotrain.model.linear import Linear, deferred_weight_gradients
from nanotrain.model.positions import alibi_slopes, rope_frequencies
from nanotrain.model.presets import PRESETS
from nanotrain.model.transformer import Dropout, ModelConfig, Transformer

BASE = dict(vocab_size=50, width=16, layers=2, heads=4, ffn_width=24, context=32)
OPTIONS = {
    "plain": {},
    "mqa": dict(kv_heads=1),
    "gqa": dict(kv_heads=2),
    "head_dim": dict(head_dim=6),
    "learned": dict(positions="learned"),
    "alibi": dict(positions="alibi"),
    "layer_norm": dict(norm="layer"),
    "post": dict(norm_position="post"),
    "geglu": dict(activation="geglu"),
    "gelu_biases": dict(activation="gelu", bias=True, norm="layer"),
    "attention_bias": dict(attention_bias=True),
    "attention_biases": dict(attention_bias=True, output_bias=True, mlp_bias=True),
    "sandwich": dict(norm_position="sandwich", norm_offset=1.0),
    "gemma2": dict(norm_position="sandwich", norm_offset=1.0, activation="geglu", scale_embedding=True, attention_scale=0.3, attention_softcap=2.0,
                   logit_softcap=3.0, window=3, window_pattern="sf", head_dim=6, kv_heads=2),
    "qk_norm": dict(qk_norm=True),
    "window": dict(window=3),
    "window_by_layer": dict(window=3, window_pattern="fs"),
    "alibi_window_softcap": dict(positions="alibi", window=4, attention_softcap=2.0, kv_heads=2),
    "softcaps": dict(attention_softcap=2.0, logit_softcap=3.0),
    "untied": dict(tied=False),
    "linear": dict(rope_scaling="linear", rope_factor=2.0),
    "ntk": dict(rope_scaling="ntk", rope_factor=2.0),
    "yarn": dict(rope_scaling="yarn", rope_factor=4.0, rope_original_context=8),
    "dynamic": dict(rope_scaling="dynamic", rope_factor=2.0, rope_original_context=4),
    "longrope": dict(rope_scaling="longrope", rope_factor=4.0, rope_original_context=4, rope_short_factors=(1.0, 2.0), rope_long_factors=(2.0, 5.0)),
    "llama3": dict(rope_scaling="llama3", rope_factor=8.0, rope_original_context=16),
}


def config(**options):
    return ModelConfig(**(BASE | options)).resolved(frozenset(ModelConfig.__dataclass_fields__))


def build(seed=0, **options):
    model = build_model(config(**options), seed=seed, dtype=torch.float64, device="cpu")
    with torch.no_grad():  # away from zero biases and unit norms, so that each of them matters
        for n, p in enumerate(model.parameters()):
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(n))
    return model


def logits(model, tokens, **kwargs):
    positions = kwargs.pop("positions", torch.arange(tokens.shape[1]).expand(tokens.shape))
    return model.head.logits(model(tokens, positions, **(dict(max_position=int(positions.max()) + 1) | kwargs)))


def tokens_of(B=2, T=9):
    return torch.randint(0, 50, (B, T), generator=torch.Generator().manual_seed(5))


PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-1558m": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-70b": 68_976_648_192,
    "llama3.2-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_parameter_counts(preset):
    c = ModelConfig(preset=preset).resolved()
    assert parameter_count(c) == PUBLISHED[preset]
    assert all(p.device.type == "meta" for p in meta_model(c).parameters())


def test_nano_is_small_and_keys_given_beat_the_preset():
    assert set(PRESETS) == {"nano", *PUBLISHED}
    c = replace(ModelConfig().resolved(), vocab_size=4096)
    assert 2_000_000 < parameter_count(c) < 4_000_000
    assert ModelConfig(preset="gpt2-124m", layers=3).resolved(frozenset(["layers"])).layers == 3
    assert ModelConfig(preset="gpt2-124m", layers=3).resolved().layers == 12


@pytest.mark.parametrize("option", OPTIONS)
def test_cache_equals_full_recomputation(option):
    """Two prompts of uneven length, then one token at a time or several, for each row at its own place."""
    model, tokens = build(**OPTIONS[option]), tokens_of()
    T = tokens.shape[1]
    whole = logits(model, tokens)
    cache = Cache(3, T, width=3)
    with torch.no_grad():
        step = cache.prefill([1, 4], tokens.device)
        packed = torch.cat([tokens[0, :1], tokens[1, :4]])[None]
        hidden = model(packed, step.positions, cache=step, max_position=T)
        torch.testing.assert_close(model.head.logits(hidden)[0], torch.cat([whole[0, :1], whole[1, :4]]), rtol=1e-9, atol=1e-9)
        for count in (1, 2, 1, 1):
            starts = list(cache.lengths)
            step = cache.decode(count, tokens.device)
            part = torch.stack([tokens[row, start : start + count] for row, start in enumerate(starts)])
            found = model.head.logits(model(part, step.positions, cache=step, max_position=T))
            wanted = torch.stack([whole[row, start : start + count] for row, start in enumerate(starts)])
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        # The first row ends: the other takes its place. Three tokens are tried, two of them taken back, and others tried.
        cache.release(0)
        cache.lengths[0] -= 1
        start = cache.lengths[0]
        cache.decode(1, tokens.device)
        cache.lengths[0] = start
        step = cache.decode(1, tokens.device)
        found = model.head.logits(model(tokens[1:, start : start + 1], step.positions, cache=step, max_position=T))
        torch.testing.assert_close(found, whole[1:, start : start + 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("option", OPTIONS)
def test_packed_documents_equal_each_alone_and_never_see_each_other(option):
    model, tokens = build(**OPTIONS[option]), tokens_of(1, 12)
    lengths = [5, 1, 6]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logits(model, tokens, positions=positions, cu_seqlens=torch.tensor([0, 5, 6, 12], dtype=torch.int32))
    alone = torch.cat([logits(model, part, max_position=6) for part in tokens.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)
    # The gradient of one document's outputs to the embeddings of the others is zero exactly.
    x = model.embed.weight[tokens].detach().requires_grad_()
    embed, model.embed = model.embed, None
    out = model(x, positions, cu_seqlens=torch.tensor([0, 5, 6, 12], dtype=torch.int32))
    model.embed = embed
    for first, last in ((0, 5), (5, 6), (6, 12)):
        (gradient,) = torch.autograd.grad(out[:, first:last].square().sum(), x, retain_graph=True)
        inside = torch.zeros(12, dtype=torch.bool)
        inside[first:last] = True
        assert (gradient[0, ~inside] == 0).all() and (gradient[0, inside] != 0).any()


@pytest.mark.parametrize("option", OPTIONS)
def test_the_future_is_never_seen(option):
    model, tokens = build(**OPTIONS[option]), tokens_of(1, 9)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 50
    a, b = logits(model, tokens), logits(model, changed)
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.equal(a[:, 6], b[:, 6])


def loss_gradients(model, tokens, dropout=None):
    hidden = model(tokens, torch.arange(tokens.shape[1]).expand(tokens.shape), dropout=dropout)
    loss = model.head(hidden, tokens, token_weight_N=torch.linspace(0.5, 1.5, tokens.numel(), dtype=torch.float64))[0]
    return loss, torch.autograd.grad(loss, tuple(model.parameters()))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_gradient(option, recompute):
    tokens = tokens_of()
    dropout = Dropout(3, torch.arange(18).view(2, 9))
    want = loss_gradients(build(dropout=0.2, embedding_dropout=0.1, **OPTIONS[option]), tokens, dropout)
    got = loss_gradients(build(dropout=0.2, embedding_dropout=0.1, recompute=recompute, **OPTIONS[option]), tokens, dropout)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_recompute_keeps_less():
    from nanotrain.memory import activation_bytes

    kept = [activation_bytes(config(recompute=r, dropout=0.1), dtype=torch.float32, length=32, rows=2) for r in ("none", "selective", "full")]
    assert kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize("option", ["plain", "gqa", "window", "alibi", "post"])
def test_dropout_follows_global_positions_not_the_layout(option):
    model, tokens = build(dropout=0.3, embedding_dropout=0.2, **OPTIONS[option]), tokens_of(4, 8)
    counters = torch.arange(32).view(4, 8) + 1000
    positions = torch.arange(8).expand(4, 8)
    whole = model(tokens, positions, dropout=Dropout(7, counters))
    halves = [model(tokens[i : i + 2], positions[:2], dropout=Dropout(7, counters[i : i + 2])) for i in (0, 2)]
    torch.testing.assert_close(whole, torch.cat(halves))
    packed = model(
        tokens.view(1, 32), positions.reshape(1, 32), cu_seqlens=torch.arange(0, 33, 8, dtype=torch.int32), dropout=Dropout(7, counters.view(1, 32))
    )
    torch.testing.assert_close(packed.view_as(whole), whole)
    assert not torch.equal(whole, model(tokens, positions, dropout=Dropout(8, counters))) and not torch.equal(whole, model(tokens, positions))


def test_initial_weights_depend_on_seed_and_name_only():
    c = config(tied=False)
    a, b = (dict(build_model(c, seed=1, dtype=torch.float32, device="cpu").named_parameters()) for _ in range(2))
    deeper = dict(build_model(replace(c, layers=2, vocab_size=50), seed=1, dtype=torch.float32, device="cpu").named_parameters())
    other = dict(build_model(c, seed=2, dtype=torch.float32, device="cpu").named_parameters())
    for name, p in a.items():
        assert torch.equal(p, b[name]) and torch.equal(p, deeper[name]) and torch.equal(p.detach(), initial_value(name, p.shape, c, 1))
        assert p.dim() == 1 or not torch.equal(p, other[name])
    residual, plain = a["blocks.0.mlp.down_proj.weight"].std(), a["blocks.0.mlp.up_proj.weight"].std()
    assert abs(plain / 0.02 - 1) < 0.15 and abs(residual / (0.02 / 2) - 1) < 0.15  # sqrt(2 * 2 layers)


def test_a_pipeline_stage_holds_a_part_under_global_names():
    whole, tokens = build(), tokens_of()
    positions = torch.arange(9).expand(2, 9)
    first, last = build(), build()
    del first.blocks["1"], last.blocks["0"]
    first.head, last.embed = None, None
    assert {n for n, _ in last.named_parameters()} <= {n.replace("embed.", "head.") for n, _ in whole.named_parameters()} | {"head.weight"}
    hidden = last(first(tokens, positions), positions)
    torch.testing.assert_close(last.head.logits(hidden), logits(whole, tokens))


def test_a_shard_of_heads_runs_by_its_weights_shapes():
    """Half of the heads in each of two models whose attention outputs are summed: what tensor parallelism will do."""
    model = build(kv_heads=2, positions="alibi")
    positions = torch.arange(9).expand(2, 9)
    attention = model.blocks["0"].attention
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    want = attention(x, positions, None)
    total = 0
    for rank in range(2):
        shard = build(kv_heads=2, positions="alibi").blocks["0"].attention
        shard.head_start = 2 * rank
        for name in ("q_proj", "k_proj", "v_proj"):
            layer = getattr(shard, name)
            layer.weight = torch.nn.Parameter(layer.weight.chunk(2)[rank])
        shard.o_proj.weight = torch.nn.Parameter(shard.o_proj.weight.chunk(2, 1)[rank])
        cache = Cache(2, 9)
        step = cache.prefill([9, 9], x.device)
        packed = shard(x.flatten(0, 1)[None], step.positions, None, cache=step)
        total = total + packed.view(2, 9, -1)
        assert cache.layers[0][0].shape == (2, 9, 1, 4)
    torch.testing.assert_close(total, want)


def test_weight_gradients_can_be_put_off():
    model, tokens = build(bias=True), tokens_of()
    names = [n for n, _ in model.named_parameters()]
    _, want = loss_gradients(model, tokens)
    with deferred_weight_gradients(model) as queue:
        hidden = model(tokens, torch.arange(9).expand(2, 9))
        loss = model.head(hidden, tokens, token_weight_N=torch.linspace(0.5, 1.5, 18, dtype=torch.float64))[0]
        loss.backward()
    linear = {f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, Linear) for p in ("weight", "bias")}
    assert all((p.grad is None) == (n in linear) for n, p in model.named_parameters()) and len(queue) == 2 * 6 + 2 * 1
    for accumulate in reversed(queue):
        accumulate()
    for name, p, g in zip(names, model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, msg=name)


def test_head_never_needs_logits_and_agrees_with_them():
    model, tokens = build(logit_softcap=2.0), tokens_of()
    hidden = model(tokens, torch.arange(9).expand(2, 9))
    _, logprob, entropy = model.head(hidden, tokens, return_entropy=True)
    log_p = torch.log_softmax(model.head.logits(hidden), -1)
    torch.testing.assert_close(logprob.view(2, 9), log_p.gather(-1, tokens[..., None])[..., 0])
    torch.testing.assert_close(entropy.view(2, 9), -(log_p.exp() * log_p).sum(-1))


def test_rope_scaling_follows_the_papers():
    base = config(context=4096, head_dim=64)
    plain, one = rope_frequencies(base)
    assert one == 1.0 and torch.allclose(plain, 10000 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64))
    assert torch.allclose(rope_frequencies(replace(base, rope_scaling="linear", rope_factor=4.0))[0], plain / 4)
    ntk = rope_frequencies(replace(base, rope_scaling="ntk", rope_factor=4.0))[0]
    assert ntk[0] == plain[0] and torch.isclose(ntk[-1], plain[-1] / 4)  # the slowest turn stretched whole, the fastest not at all
    llama3, _ = rope_frequencies(replace(base, rope_scaling="llama3", rope_factor=8.0))
    wavelength = 2 * torch.pi / plain
    assert torch.equal(llama3[wavelength < 1024], plain[wavelength < 1024]) and torch.allclose(
        llama3[wavelength > 4096], plain[wavelength > 4096] / 8
    )
    yarn, factor = rope_frequencies(replace(base, rope_scaling="yarn", rope_factor=8.0))
    assert torch.equal(yarn[0], plain[0]) and torch.isclose(yarn[-1], plain[-1] / 8) and abs(factor - (0.1 * 2.0794415 + 1)) < 1e-6
    assert (yarn.diff() < 0).all() and (llama3.diff() < 0).all()


def test_alibi_slopes():
    assert torch.allclose(alibi_slopes(8), 2.0 ** -torch.arange(1, 9))
    assert torch.allclose(alibi_slopes(6), torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]))


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(preset="huge"), "--model.preset huge: unknown; one of nano"),
        (dict(heads=4, kv_heads=3), "--model.kv_heads 3"),
        (dict(head_dim=3), "--model.head_dim 3"),
        (dict(dropout=1.0), "--model.dropout 1.0"),
        (dict(layers=0), "--model.layers 0"),
        (dict(width=2, heads=4), "--model.width 2"),
        (dict(kv_heads=-1), "--model.kv_heads -1"),
        (dict(ffn_width=-5), "--model.ffn_width -5"),
        (dict(rope_scaling="ntk", head_dim=2), "--model.head_dim 2"),
        (dict(rope_factor=0.0), "--model.rope_factor 0.0"),
    ],
)
def test_shapes_that_cannot_be_built_name_their_flag(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_transformer_takes_any_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model = build_model(config(qk_norm=True), seed=0, dtype=dtype, device="cpu")
        hidden = model(tokens_of(), torch.arange(9).expand(2, 9))
        assert hidden.dtype == dtype and torch.isfinite(hidden).all() and isinstance(model, Transformer)
