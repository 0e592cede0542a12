"""Drawing tokens: each filter does what it says, and draws have the right distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.model.sampling import SamplingConfig, check_sampling, distribution, draw

RAW = torch.tensor([[2.0, 1.0, 0.5, -1.0]])


def probabilities(seen=(0,), **options):
    marked = torch.zeros(1, 4, dtype=torch.bool).index_fill_(1, torch.tensor(seen), True)
    return distribution(RAW, marked, SamplingConfig(**(dict(temperature=1.0) | options)))[0]


def test_filters():
    raw = RAW[0]
    p = torch.softmax(raw, 0)
    two = torch.cat([torch.softmax(raw[:2], 0), torch.zeros(2)])
    torch.testing.assert_close(probabilities(), p)
    torch.testing.assert_close(probabilities(temperature=2.0), torch.softmax(raw / 2, 0))
    assert probabilities(temperature=0).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(probabilities(top_k=2), two)
    torch.testing.assert_close(probabilities(top_k=9), p)
    torch.testing.assert_close(probabilities(top_p=float(p[0]) + 0.01), two)
    torch.testing.assert_close(probabilities(top_p=1e-6), torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(probabilities(min_p=0.3), two)  # e^-1 of the most likely stays, e^-1.5 goes
    torch.testing.assert_close(probabilities(min_p=1.0), torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(probabilities((0, 3), repetition_penalty=2.0), torch.softmax(torch.tensor([1.0, 1.0, 0.5, -2.0]), 0))


def test_any_positive_temperature_works():
    for temperature in (1e-42, 1e-30, 1e30):
        p = probabilities(temperature=temperature)
        assert abs(float(p.sum()) - 1) < 1e-6 and (p[0] == 1 or temperature > 1)


@given(st.floats(0.05, 0.999), st.integers(0, 10), st.booleans())
@settings(max_examples=40, deadline=None)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, seed, flat):
    """Over a vocabulary larger than the part that is sorted first, flat (nearly all are needed) or peaked."""
    logits = torch.randn(3, 900, generator=torch.Generator().manual_seed(seed)) * (0.1 if flat else 5)
    full = torch.softmax(logits.double(), -1)
    kept = distribution(logits.double(), None, SamplingConfig(temperature=1.0, top_p=top_p)) > 0
    for p, k in zip(full, kept, strict=True):
        assert p[k].sum() >= top_p - 1e-9 and p[k].sum() - p[k].min() < top_p + 1e-9
        assert k.all() or p[k].min() >= p[~k].max()


def test_a_draw_inverts_the_sum():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(6, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.74, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(p, uniform).tolist() == [1, 1, 3, 3, 4, 4]
    thirds = torch.full((1, 3), 1 / 3)  # sums to less, or more, than one in fp32
    assert draw(thirds, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 2


@pytest.mark.parametrize(
    "option",
    [dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_k=-1), dict(top_p=0.0), dict(min_p=1.5), dict(repetition_penalty=0.0),
     dict(max_tokens=0)],
)  # fmt: skip
def test_bad_values_name_their_flag(option):
    with pytest.raises(ValueError, match=f"--sampling.{next(iter(option))}"):
        check_sampling(SamplingConfig(**option))
