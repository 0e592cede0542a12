"""Our model in transformers, trained in the loop that its documentation shows: the peer of the benchmarks of whole steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nanotrain.model.build import build_model
from nanotrain.model.families import hf_config
from nanotrain.model.hf import places
from nanotrain.model.transformer import ModelConfig
from nanotrain.optim import OptimConfig


def torch_adamw(parameters: Iterable[torch.nn.Parameter], c: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW with our settings, matrices decayed."""
    parameters = list(parameters)
    matrices, rest = ([p for p in parameters if (p.dim() == 2) == wanted] for wanted in (True, False))
    groups = [dict(params=matrices, weight_decay=c.weight_decay), dict(params=rest, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)


class TransformersLoop:
    """fp32 weights, ours of seed 0 as they are in `dtype`, under autocast to it, with clipping and torch's fused AdamW."""

    def __init__(self, c: ModelConfig, optim: OptimConfig, dtype: torch.dtype, device: torch.device | str, liger: bool = False):
        """ImportError where a package is not installed, or liger-kernel has nothing for this model."""
        config = hf_config(c)
        family = config.pop("model_type")
        if liger:
            import liger_kernel.transformers

            apply = getattr(liger_kernel.transformers, f"apply_liger_kernel_to_{family}", None)
            if apply is None:
                raise ImportError(f"liger-kernel has nothing for {family}")
            apply()
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(family, **config, use_cache=False)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
        self.optim, self.dtype, self.device = optim, dtype, torch.device(device)
        ours = build_model(c, seed=0, dtype=dtype, device="cpu")
        with self.device:
            self.model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).train()
        theirs = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parts in places(ours, family).items():
                theirs.pop(name).copy_(torch.cat(parts, -1))
        if theirs:
            raise ValueError(f"transformers' model has parameters that ours lacks: {', '.join(theirs)}")
        self.optimizer = torch_adamw(self.model.parameters(), optim)
        self.norm: torch.Tensor | None = None

    def step(self, tokens: torch.Tensor) -> float:
        """One step on rows of tokens; reading its loss waits for the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype != torch.float32):
            loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self.update()
        return loss.item()

    def update(self) -> None:
        """Clip, step, and clear the gradients; `norm` is theirs before."""
        self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
