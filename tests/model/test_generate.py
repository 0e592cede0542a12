"""Drawing tokens: the cache changes nothing, each filter does what it says, the draws have the right distribution."""

import pytest
import torch

from nanotrain.model.generate import SamplingConfig, generate, next_token_probabilities
from tests.model.test_transformer import build, logits


def test_greedy_equals_full_recomputation():
    model = build(window=4, qk_norm=True)
    text = [1, 5, 7]
    got = list(generate(model, text, SamplingConfig(temperature=0, max_tokens=8), stop=frozenset()))
    for _ in range(8):
        text = [*text, int(logits(model, torch.tensor([text]))[0, -1].argmax())]
    assert got == text[3:]


def test_stops_at_a_stop_token_and_at_the_end_of_learned_positions():
    model = build(positions="learned")
    free = list(generate(model, [1], SamplingConfig(temperature=0, max_tokens=10), stop=frozenset()))
    stopped = list(generate(model, [1], SamplingConfig(temperature=0, max_tokens=10), stop=frozenset([free[3]])))
    assert stopped == free[: free.index(free[3]) + 1]
    assert len(list(generate(model, [1] * 30, SamplingConfig(max_tokens=10), stop=frozenset()))) == 2
    with pytest.raises(ValueError, match="learned positions end at 32"):
        list(generate(model, [1] * 32, SamplingConfig(), stop=frozenset()))
    with pytest.raises(ValueError, match="no token"):
        list(generate(model, [], SamplingConfig(), stop=frozenset()))


def test_the_seed_decides():
    model = build()
    runs = [list(generate(model, [1], SamplingConfig(max_tokens=12, seed=s), stop=frozenset())) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_any_positive_temperature_works():
    raw = torch.tensor([2.0, 1.0, 0.5, -1.0])
    for temperature in (1e-42, 1e-30, 1e30):
        drawn = next_token_probabilities(raw, torch.tensor([0]), SamplingConfig(temperature=temperature))
        assert abs(float(drawn.sum()) - 1) < 1e-6 and (drawn[0] == 1 or temperature > 1)


def probabilities(seen=(0,), **options):
    raw = torch.tensor([2.0, 1.0, 0.5, -1.0])
    return next_token_probabilities(raw, torch.tensor(seen), SamplingConfig(**(dict(temperature=1.0) | options)))


def test_filters():
    raw = torch.tensor([2.0, 1.0, 0.5, -1.0])
    torch.testing.assert_close(probabilities(), torch.softmax(raw, 0))
    torch.testing.assert_close(probabilities(temperature=2.0), torch.softmax(raw / 2, 0))
    assert probabilities(temperature=0).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(probabilities(top_k=2), torch.cat([torch.softmax(raw[:2], 0), torch.zeros(2)]))
    p = torch.softmax(raw, 0)
    torch.testing.assert_close(probabilities(top_p=float(p[0]) + 0.01), torch.cat([torch.softmax(raw[:2], 0), torch.zeros(2)]))
    torch.testing.assert_close(probabilities(top_p=1e-6), torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(probabilities((0, 3), repetition_penalty=2.0), torch.softmax(torch.tensor([1.0, 1.0, 0.5, -2.0]), 0))


def test_draws_follow_the_probabilities():
    """Chi-square over 3,000 first tokens of a model with 50; the 0.1% quantile of 49 degrees of freedom is 85.35."""
    model = build()
    p = next_token_probabilities(logits(model, torch.tensor([[1, 2]]))[0, -1], torch.tensor([1, 2]), SamplingConfig(temperature=1.0))
    counts = torch.zeros(50)
    for seed in range(3000):
        counts[next(generate(model, [1, 2], SamplingConfig(temperature=1.0, max_tokens=1, seed=seed), stop=frozenset()))] += 1
    chi_square = ((counts - 3000 * p) ** 2 / (3000 * p)).sum()
    assert chi_square < 85.35


@pytest.mark.parametrize("option", [dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(repetition_penalty=0.0), dict(max_tokens=0)])
def test_bad_values_name_their_flag(option):
    with pytest.raises(ValueError, match=f"--sampling.{next(iter(option))}"):
        list(generate(build(), [1], SamplingConfig(**option), stop=frozenset()))
