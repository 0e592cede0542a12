"""A model made: without storage for counting, with storage to be loaded, or with initial weights."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from nanotrain.model.linear import empty_side_by_side
from nanotrain.model.transformer import Attention, FeedForward, ModelConfig, Transformer


def meta_model(c: ModelConfig) -> Transformer:
    """The model without storage, for counting, planning and loading; `c` must be resolved."""
    with torch.device("meta"):
        return Transformer(c)


def empty_model(c: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """The model of a resolved config with storage but no values, to be loaded; made without a second copy of anything."""
    model = meta_model(c)
    for module in model.modules():
        if isinstance(module, Attention):
            empty_side_by_side((module.q_proj, module.k_proj, module.v_proj), dtype, device)
        elif isinstance(module, FeedForward) and module.gate_proj is not None:
            empty_side_by_side((module.gate_proj, module.up_proj), dtype, device)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device)))
    if c.tied:
        model.head.weight = model.embed.weight
    return model


@torch.no_grad()
def build_model(c: ModelConfig, *, seed: int, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """The model on `device` in `dtype` with initial weights, each a function of the seed and the parameter's name only.

    Matrices are normal with init_std, those that write to the residual stream (o_proj, down_proj) with
    init_std / sqrt(2 * layers); norms scale by 1, biases are 0. Made one tensor at a time in fp32, never twice in memory.
    """
    model = empty_model(c, dtype=dtype, device=device)
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, c, seed))
    return model


def initial_value(name: str, shape: torch.Size, c: ModelConfig, seed: int) -> torch.Tensor:
    """The initial fp32 value of one parameter on the CPU."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.full(shape, 1.0 - c.norm_offset)
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = c.init_std / math.sqrt(2 * c.layers) if residual else c.init_std
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std


def parameter_count(c: ModelConfig) -> int:
    """Parameters of a resolved config, a tied matrix counted once."""
    return sum(p.numel() for p in meta_model(c).parameters())
