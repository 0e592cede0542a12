"""The counter-based generator: known answers, independence of layout, the right distribution."""

import pytest
import torch
from nanotrain.kernels.random import dropout_reference, mix_seed, philox, stochastic_round


@pytest.mark.parametrize(
    "counter,key,expected",
    [  # known answers of Random123's philox4x32-10
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF - (1 << 64), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_known_answers(counter, key, expected):
    words = philox(key, *(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in words) == expected


def test_dropout_depends_on_global_positions_only():
    x, counters = torch.ones(6, 10), torch.arange(100, 106)
    whole = dropout_reference(x, 0.5, 3, counters)
    halves = [dropout_reference(x[i : i + 3], 0.5, 3, counters[i : i + 3]) for i in (0, 3)]
    assert torch.equal(whole, torch.cat(halves)) and set(whole.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(whole, dropout_reference(x, 0.5, 4, counters))


def test_dropout_rate_and_gradient():
    x = torch.ones(1000, 64, requires_grad=True)
    y = dropout_reference(x, 0.3, 1, torch.arange(1000))
    assert abs((y == 0).float().mean() - 0.3) < 0.01  # 5 sigma is 0.009
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_stochastic_rounding_is_unbiased_and_layout_independent():
    x = torch.full((40000,), 1.0 + 1 / 512)  # a quarter of the way between two bf16 numbers
    rounded = stochastic_round(x, torch.bfloat16, 5)
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    assert abs((rounded > 1).float().mean() - 0.25) < 0.011  # 5 sigma
    assert torch.equal(rounded[100:], stochastic_round(x[100:], torch.bfloat16, 5, first=100))
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    assert torch.equal(
        stochastic_round(special, torch.bfloat16, 5).nan_to_num(7.0, torch.inf, -torch.inf), special.nan_to_num(7.0, torch.inf, -torch.inf).bfloat16()
    )


def test_mixed_seeds_differ_and_agree_between_ints_and_tensors():
    seeds = mix_seed(1, torch.arange(1000), torch.tensor(2))
    assert len(set(seeds.tolist())) == 1000 and int(seeds[7]) == mix_seed(1, 7, 2) and mix_seed(1, 7, 2) != mix_seed(1, 2, 7)
