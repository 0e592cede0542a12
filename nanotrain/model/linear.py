"""The linear layer every projection of the model is made of: one seam for sharding, LoRA, quantised weights and pipelines.

A module of this class may be replaced, under its name, by another with the same forward. Its weight gradient can be put
off: inside `deferred_weight_gradients()` a backward computes only the gradient of the input, and the weights' gradients
wait in the list that the context yields, for a pipeline to fill its bubbles with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """y = x W^T + b for x (..., in), weight (out, in), bias (out,) or None."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.deferred: list[Callable[[], None]] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.deferred is not None and torch.is_grad_enabled():
            return _Deferred.apply(x, self.weight, self.bias, self.deferred)
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def empty_side_by_side(layers: tuple[Linear, ...], dtype: torch.dtype, device: torch.device | str) -> None:
    """Give layers that take the same input weights (and biases) without values, next to each other in one block of memory."""
    for name in ("weight", "bias"):
        shapes = [p.shape for p in (getattr(layer, name) for layer in layers) if p is not None]
        if len(shapes) == len(layers):
            block = torch.empty(sum(s[0] for s in shapes), *shapes[0][1:], dtype=dtype, device=device)
            for layer, part in zip(layers, block.split([s[0] for s in shapes]), strict=True):
                setattr(layer, name, nn.Parameter(part))


def project(layers: tuple[nn.Module, ...], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Outputs of layers that take the same input: without gradients one product, where their weights still lie side by side."""
    if torch.is_grad_enabled() or not _side_by_side(layers):
        return tuple(layer(x) for layer in layers)
    widths = [layer.weight.shape[0] for layer in layers]
    weight, bias = layers[0].weight, layers[0].bias
    weight = weight.as_strided((sum(widths), weight.shape[1]), weight.stride())
    bias = None if bias is None else bias.as_strided((sum(widths),), (1,))
    return F.linear(x, weight, bias).split(widths, -1)


def _side_by_side(layers):
    for a, b in pairwise(layers):
        if type(a) is not Linear or type(b) is not Linear or (a.bias is None) != (b.bias is None):
            return False
        for first, second in ((a.weight, b.weight), (a.bias, b.bias)):
            if first is not None and first.data_ptr() + first.nbytes != second.data_ptr():
                return False
            if first is not None and first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
                return False
    return True


class _Deferred(torch.autograd.Function):
    """F.linear whose backward queues the weight's and bias's gradients instead of computing them."""

    @staticmethod
    def forward(ctx, x, weight, bias, queue):
        ctx.save_for_backward(x, weight)
        ctx.parameters, ctx.queue = (weight, bias), queue
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        parameters = ctx.parameters

        def accumulate():
            rows = grad.reshape(-1, grad.shape[-1])
            gradients = rows.T @ x.reshape(-1, x.shape[-1]), rows.sum(0)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if parameter is not None and parameter.requires_grad:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

        ctx.queue.append(accumulate)
        return grad @ weight, None, None, None


@contextmanager
def deferred_weight_gradients(model: nn.Module) -> Iterator[list[Callable[[], None]]]:
    """Within the context, backwards through `model` leave the weight gradients of its Linear layers in the yielded list.

    Call each entry, in any order, to add its gradient to `.grad`; the list outlives the context.
    """
    queue: list[Callable[[], None]] = []
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.deferred = queue
    try:
        yield queue
    finally:
        for layer in layers:
            layer.deferred = None
