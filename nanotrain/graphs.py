"""A training step as one CUDA graph: the host submits it whole and no longer pays for each kernel's launch.

A graph replays the same kernels on the same memory, so what changes from step to step comes in through memory: batches are copied into buffers
of the graph's own, the factor on the rate and the count of labels into tensors. All else that the step touches (weights, gradients, the
optimizer's state) must stay where it is, and no value may be read on the host.
Source: the capture rules of PyTorch's "CUDA semantics", whole-network capture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from nanotrain.data.loader import Batch


def cuda_graph(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """(replay, outputs) of a function captured as a CUDA graph; each replay writes the same outputs anew."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs


def aside(function: Callable[[], Any]) -> Any:
    """The function's result, run on a stream of its own, as autograd must have been before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = function()
    torch.cuda.current_stream().wait_stream(stream)
    return outputs


class CapturedStep:
    """`step(batches, factor)`, replayed from a CUDA graph after two steps that run as they are, in which kernels are compiled.

    What it returns is overwritten by the next step. `held()` gives what the step reads and others may let go of (RoPE's tables): it is kept as
    long as the graph. `capture` and `warm_up` are how a function is captured, and run before that.
    """

    def __init__(self, step: Callable[[list[Batch], torch.Tensor], Any], held: Callable[[], Any], *, capture=cuda_graph, warm_up=aside):
        self.step, self.held, self.capture, self.warm_up = step, held, capture, warm_up
        self.warm_ups = 2
        self.batches: list[Batch] = []
        self.replay: Callable[[], None] | None = None
        self.outputs: Any = None
        self.kept: Any = None

    def __call__(self, batches: list[Batch], factor: float) -> Any:
        documents = max(len(batch.cu_seqlens) for batch in batches)
        if not self.batches or documents > len(self.batches[0].cu_seqlens):
            self._make_buffers(batches, 2 * documents)
        for own, batch in zip(self.batches, batches, strict=True):
            for name in ("tokens_BT", "labels_BT", "positions_BT", "counters_BT"):
                getattr(own, name).copy_(getattr(batch, name))
            own.cu_seqlens[: len(batch.cu_seqlens)].copy_(batch.cu_seqlens)
            own.cu_seqlens[len(batch.cu_seqlens) :] = batch.tokens_BT.shape[1]  # documents of no token
            own.counted.fill_(batch.counted)
        self.factor.fill_(factor)
        if self.warm_ups:
            self.warm_ups -= 1
            return self.warm_up(lambda: self.step(self.batches, self.factor))
        if self.replay is None:
            self.replay, self.outputs = self.capture(lambda: self.step(self.batches, self.factor))
            self.kept = self.held()
        self.replay()
        return self.outputs

    def _make_buffers(self, batches: list[Batch], documents: int) -> None:
        """Buffers for batches of up to so many documents; a graph of the former ones is given up."""
        device = batches[0].tokens_BT.device
        self.replay, self.outputs, self.factor = None, None, torch.ones((), device=device)
        self.batches = [
            replace(
                batch, tokens_BT=batch.tokens_BT.clone(), labels_BT=batch.labels_BT.clone(), positions_BT=batch.positions_BT.clone(),
                counters_BT=batch.counters_BT.clone(), cu_seqlens=F.pad(batch.cu_seqlens, (0, documents - len(batch.cu_seqlens))), rows=None,
                lengths=None, counted=torch.zeros((), dtype=torch.int64, device=device),
            )
            for batch in batches
        ]  # fmt: skip
