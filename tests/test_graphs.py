"""The captured step: buffers filled anew each step, more documents than before, and the same results as without a graph."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanotrain.data.loader import Batch
from nanotrain.graphs import CapturedStep, cuda_graph
from nanotrain.losses import IGNORED
from nanotrain.model.build import build_model
from nanotrain.model.transformer import ModelConfig
from nanotrain.optim import OptimConfig, Optimizer
from nanotrain.stages.pretrain import Config, check, step
from tests.kernels.kit import DEVICE, on_gpu

LENGTH = 32


def batch(seed: int, documents: int) -> Batch:
    """Two rows of 32 tokens, of so many documents."""
    draw = np.random.default_rng(seed)
    inner = np.sort(draw.choice(np.setdiff1d(np.arange(1, 2 * LENGTH), [LENGTH]), documents - 2, replace=False))
    offsets = np.unique(np.concatenate([[0, LENGTH, 2 * LENGTH], inner]))
    labels = torch.from_numpy(draw.integers(0, 96, (1, 2 * LENGTH)))
    labels[0, offsets[1:] - 1] = IGNORED
    positions = np.arange(2 * LENGTH) - np.repeat(offsets[:-1], np.diff(offsets))
    tensors = [labels.roll(1) % 96, labels, torch.from_numpy(positions)[None], torch.from_numpy(offsets).int(), torch.arange(2 * LENGTH)[None]]
    return Batch(*(t.to(DEVICE) for t in tensors), None, int((labels != IGNORED).sum()), LENGTH)


def training(name: str, dtype: torch.dtype, **features):
    model = ModelConfig(width=32, layers=2, heads=2, head_dim=16, vocab_size=96, **features).resolved(frozenset(ModelConfig.__dataclass_fields__))
    net = build_model(model, seed=0, dtype=dtype, device=DEVICE)
    optimizer = Optimizer(net, OptimConfig(name=name))
    return net, optimizer, partial(step, net, optimizer, seed=0)


def recorded(function):
    """A graph as a CPU can have it: nothing runs until it is replayed, and each replay writes the same tensors."""
    outputs: list[torch.Tensor] = []

    def replay():
        loss, result = function()
        made = [loss, result.grad_norm, result.clipped, result.skipped]
        if outputs:
            for own, new in zip(outputs, made, strict=True):
                own.copy_(new)
        outputs.extend(made[len(outputs) :])

    return replay, outputs


EVERYTHING = dict(positions="alibi", dropout=0.1, attention_softcap=20.0, window=9)
"""What attention can be asked for beside causal documents."""


@pytest.mark.parametrize(
    "name,accumulate,features",
    [*((name, accumulate, {}) for name in ("muon", "adamw", "lion", "adafactor") for accumulate in (1, 2)), ("adamw", 1, EVERYTHING)],
)
@pytest.mark.parametrize("capture", ["recorded", pytest.param("cuda", marks=on_gpu)])
def test_a_replayed_step_does_what_the_step_does(name, accumulate, features, capture):
    dtype = torch.float32 if features else torch.bfloat16
    plain, plain_optimizer, plain_step = training(name, dtype, **features)
    net, optimizer, function = training(name, dtype, **features)
    optimizer.keep_gradients = True
    options = dict(capture=cuda_graph) if capture == "cuda" else dict(capture=recorded, warm_up=lambda function: function())
    captured = CapturedStep(function, lambda: net.rotary_tables(LENGTH, DEVICE), **options)
    # On a CPU to the bit; a GPU's library of matrix products may choose others for a graph.
    tolerance = dict(rtol=0, atol=0) if DEVICE.type == "cpu" else dict(rtol=2e-2, atol=2e-3)
    # The fifth has more documents than the buffers of the first hold.
    for number, documents in enumerate((3, 5, 4, 6, 30, 12, 2)):
        batches = [batch(10 * number + i, documents) for i in range(accumulate)]
        got = captured(batches, 1.0 - 0.1 * number)[0]
        net.rotary_tables(5000 + number, DEVICE)  # as a long validation does: the model lets its tables go for longer ones
        room = len(captured.batches[0].cu_seqlens)
        assert room >= documents + 1
        # Documents of no token change how a CPU groups the others, so the step beside it has them too.
        padded = [replace(b, cu_seqlens=F.pad(b.cu_seqlens, (0, room - len(b.cu_seqlens)), value=2 * LENGTH)) for b in batches]
        want = plain_step(padded, torch.tensor(1.0 - 0.1 * number, device=DEVICE))[0]
        torch.testing.assert_close(got, want, **tolerance)
    if not features:
        assert captured.kept[0].shape != net.rotary_tables(LENGTH, DEVICE)[0].shape  # the graph has its own still
    for (key, a), b in zip(plain_optimizer.state().items(), optimizer.state().values(), strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=key)
    for a, b in zip(plain.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_what_no_graph_can_hold_is_refused_before_the_run():
    base = Config()
    config = Config(model=ModelConfig(head_dim=320), train=type(base.train)(steps=1, cuda_graph=True))
    with pytest.raises(ValueError, match=r"--train\.cuda_graph: attention with --model\.head_dim 320"):
        check(config)
