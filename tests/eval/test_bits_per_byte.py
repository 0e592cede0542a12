"""Bits per byte: each document from its own start, every token scored once."""

import math

import numpy as np
import pytest
import torch

from nanotrain.eval.bits_per_byte import score
from tests.data.test_shards import write
from tests.model.test_transformer import build, logits

CPU = torch.device("cpu")


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    return write(tmp_path / "d", [[1, *rng.integers(3, 50, n), 2] for n in (3, 20, 0, 9, 33)], vocab_size=50)


@pytest.mark.parametrize("length,stride", [(8, 4), (8, 8), (8, 1), (64, 32)])
@pytest.mark.parametrize("batch_tokens", [1, 8192])
def test_equals_scoring_token_by_token(shards, length, stride, batch_tokens):
    model = build()
    nats = 0.0
    for n in range(5):
        ids = torch.tensor(shards.document(n))
        start, scored = 0, 1
        while scored < len(ids):
            end = min(start + length, len(ids) - 1)
            log_p = torch.log_softmax(logits(model, ids[None, start:end]), -1)[0]
            for target in range(scored, end + 1):
                nats -= log_p[target - 1 - start, ids[target]].item()
            scored, start = end + 1, start + stride
    got = score(model, shards, length=length, stride=stride, device=CPU, batch_tokens=batch_tokens)
    assert got.documents == 5 and got.tokens == shards.tokens - 5 and got.bytes == shards.bytes
    assert math.isclose(got.nats, nats, rel_tol=1e-6)
    assert math.isclose(got.bits_per_byte, nats / math.log(2) / shards.bytes, rel_tol=1e-6)


def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary(shards):
    model = build()
    with torch.no_grad():
        model.head.weight.zero_()
    got = score(model, shards, length=8, stride=4, device=CPU)
    assert math.isclose(got.nats_per_token, math.log(50), rel_tol=1e-9)


def test_a_part_is_whole_documents_and_always_the_same(shards):
    parts = [score(build(), shards, length=8, stride=4, device=CPU, max_tokens=20) for _ in range(2)]
    assert parts[0] == parts[1] and 20 <= parts[0].tokens < shards.tokens - 5
    assert score(build(), shards, length=8, stride=4, device=CPU, stop=lambda: True) is None
