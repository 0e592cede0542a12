"""The contestants of benchmarks/peers_cpu.py train the same model: their losses agree, and profiles of them add up."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from benchmarks.peers_cpu import CASTS, CONTESTANTS, FIRST, GROUPS, HEAD, LAST, OPTIMIZER, SHAPE, Task, profiled

pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="extra: pip install -e '.[peers]'"),
]


def task(dtype):
    return Task(replace(SHAPE, vocab_size=96, width=32, ffn_width=64, heads=2, kv_heads=2, head_dim=16), dtype, rows=2, length=24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_agree(dtype):
    losses = {name: [contestant.step() for _ in range(8)] for name, contestant in ((n, make(task(dtype))) for n, make in CONTESTANTS.items())}
    for name in ("transformers", "plain"):
        assert losses[name][0] == pytest.approx(losses["ours"][0], rel=FIRST[dtype])
        assert losses[name][-1] == pytest.approx(losses["ours"][-1], rel=LAST[dtype])
    assert losses["ours"][-1] < losses["ours"][0] - 1e-3


@pytest.mark.parametrize("name", ["ours", "transformers"])
def test_a_profile_adds_up(name):
    shares = profiled(CONTESTANTS[name](task(torch.bfloat16)), steps=2)
    assert list(shares) == list(GROUPS)
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares[group] for group in (HEAD, OPTIMIZER, CASTS)) > 0
    assert min(shares.values()) >= 0
