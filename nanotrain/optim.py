"""The optimizer (Muon for hidden matrices and AdamW for the rest; or AdamW, Lion or Adafactor for all), rate schedules and loss scaling.

Parameters may be bf16 or fp16: fp32 masters live here, or bf16 is rounded stochastically; micro-batches' gradients are summed in fp32. Where a
gradient is not finite, no state changes at all. Nothing waits for the device, and what lasts stays in its place: a CUDA graph can replay a step.
Sources: AdamW arXiv 1711.05101; Lion arXiv 2302.06675; Adafactor arXiv 1804.04235; Muon: Jordan et al. 2024; WSD arXiv 2404.06395.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import nn

from nanotrain.config import at_least
from nanotrain.kernels.adafactor import adafactor_
from nanotrain.kernels.optimizers import adamw_, grad_norm_, lion_
from nanotrain.kernels.orthogonal import orthogonalize
from nanotrain.kernels.random import mix_seed, stochastic_round
from nanotrain.kernels.runtime import compute_dtype

RATES = {"muon": 0.01, "adamw": 0.003, "lion": 0.002, "adafactor": 0.1}
"""Peak rates where none is given. Lion's and Adafactor's: best of those tried in 300 steps of a model 64 wide on Python's library, as AdamW's was."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["muon", "adamw", "lion", "adafactor"] = "muon"
    """muon: Muon for the hidden matrices and AdamW for the rest; adamw, lion, adafactor: that one for everything."""
    lr: float = 0.0
    """Peak rate [per step; adafactor: of a tensor's RMS, at most 1 / sqrt(step)]; 0: adamw 0.003, beside muon 0.01, lion 0.002, adafactor 0.1."""
    embedding_lr: float = 0.0
    """The same for embeddings, tied ones too [per step]; 0 takes 0.1 beside Muon, and `lr` alone."""
    muon_lr: float = 0.02
    """Peak rate of Muon, of each matrix times sqrt(max(1, rows / columns)) [per step]."""
    tuned_batch: int = 2048
    """Batch at which the rates above were chosen [tokens]; another batch prints what linear scaling suggests."""
    beta1: float = 0.8
    """AdamW's decay of the first moment [per step]."""
    beta2: float = 0.95
    """AdamW's decay of the second moment [per step]."""
    lion_beta1: float = 0.9
    """Lion's share of the momentum in the sign it moves by [per step]."""
    lion_beta2: float = 0.99
    """Lion's decay of the momentum [per step]."""
    eps: float = 1e-10
    """Added to AdamW's denominator, and the least of Adafactor's [units of the gradient]."""
    muon_momentum: float = 0.85
    """Muon's Nesterov momentum [per step]."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Type of momenta and second moments (float64 parameters: float64); Adafactor's, which are few, stay float32."""
    masters: bool = True
    """Keep fp32 copies of narrower parameters; without them bf16 ones are rounded stochastically, by run seed and step."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices, never of norms and biases [per step, times the rate]."""
    decay_embeddings: bool = False
    """Decay embeddings and the head too."""
    clip: float = 1.0
    """Largest norm of the whole gradient [norm]; 0 never clips."""
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """Shape after the warm-up: stable then linear decay (wsd), cosine, linear or constant."""
    warmup: float = 0.02
    """Linear warm-up [share of the budget]."""
    decay: float = 0.6
    """Last part of the budget in which wsd decays [share of the budget]."""
    floor: float = 0.02
    """Rate at the end [share of the peak]."""

    @property
    def peak_lr(self) -> float:
        """The peak rate but for Muon's, the default filled in."""
        return self.lr or RATES[self.name]

    @property
    def peak_embedding_lr(self) -> float:
        """The peak rate of embeddings, the default filled in."""
        return self.embedding_lr or (0.1 if self.name == "muon" else self.peak_lr)


def check_optim(c: OptimConfig, dtype: str) -> None:
    """Raise ValueError naming the flag for values that make no sense, alone or for parameters of this dtype."""
    for name in ("peak_lr", "peak_embedding_lr", "muon_lr", "eps"):
        if not getattr(c, name) > 0:
            raise ValueError(f"--optim.{name.removeprefix('peak_')} {getattr(c, name)}: must be positive")
    for name in ("beta1", "beta2", "lion_beta1", "lion_beta2", "muon_momentum"):
        if not 0 <= getattr(c, name) < 1:
            raise ValueError(f"--optim.{name} {getattr(c, name)}: must lie in [0, 1)")
    for name in ("warmup", "decay", "floor"):
        if not 0 <= getattr(c, name) <= 1:
            raise ValueError(f"--optim.{name} {getattr(c, name)}: must lie in [0, 1]")
    at_least(c, "optim", 0, "weight_decay", "clip")
    at_least(c, "optim", 1, "tuned_batch")
    if c.schedule == "wsd" and c.warmup + c.decay > 1:
        raise ValueError(f"--optim.warmup {c.warmup} and --optim.decay {c.decay}: together more than the whole budget")
    if not c.masters and dtype == "float16":
        raise ValueError("--optim.masters false: only bfloat16 is rounded stochastically; keep them for --train.dtype float16")


def schedule_factor(c: OptimConfig, progress: float) -> float:
    """Share of the peak rate at `progress` in [0, 1] of the budget, whatever its unit."""
    if progress < c.warmup:
        return progress / c.warmup
    if c.schedule == "constant":
        return 1.0
    if c.schedule == "wsd":
        left = min(1.0, (1.0 - progress) / c.decay) if c.decay else 1.0
    else:
        left = 1.0 - (progress - c.warmup) / max(1e-12, 1.0 - c.warmup)
        if c.schedule == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
    return c.floor + (1.0 - c.floor) * max(0.0, left)


STACKED = 1 << 24
"""Elements of the matrices that Muon updates together: enough for batched products of small ones, and little beside large ones."""


@dataclass
class StepResult:
    """What an update did, as device tensors: reading them is the caller's choice."""

    grad_norm: torch.Tensor
    """Norm of the whole gradient before clipping, in fp32."""
    clipped: torch.Tensor
    """True where the gradient was scaled down."""
    skipped: torch.Tensor
    """True where it was not finite and nothing was written."""


class Optimizer:
    """One optimizer over the parameters of a model; `seed` keys its stochastic rounding.

    `state()` names every tensor that must survive; loading copies into the same tensors, so a resumed run goes on bit for bit.
    """

    def __init__(self, model: nn.Module, c: OptimConfig, seed: int = 0):
        self.c, self.keep_gradients = c, False
        self.params = params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        dtypes, device = {p.dtype for p in params.values()}, next(iter(params.values())).device
        self.wide = compute_dtype(*params.values())
        self.masters = {n: p.detach().to(self.wide) for n, p in params.items() if c.masters and p.dtype != self.wide}
        self.seed = mix_seed(seed, 0x6F7074696D) if torch.bfloat16 in dtypes and not c.masters else None
        self.starts = dict(zip(params, accumulate((p.numel() for p in params.values()), initial=0), strict=False))
        self.muon = [n for n, p in params.items() if c.name == "muon" and p.dim() == 2 and n.startswith("blocks.")]
        self.rest = {n: p for n, p in params.items() if n not in set(self.muon)}
        self.groups: dict[tuple[int, ...], list[str]] = {}
        for name in self.muon:
            self.groups.setdefault(tuple(params[name].shape), []).append(name)
        kind = torch.bfloat16 if c.moments == "bfloat16" else self.wide
        # Momenta of equal shapes are one stack, so that they are orthogonalised in one batched product.
        self.momenta = {s: torch.zeros(len(g), *s, dtype=kind, device=device) for s, g in self.groups.items()}
        names = {"lion": ("exp_avg",), "adafactor": ()}.get(c.name, ("exp_avg", "exp_avg_sq"))
        self.moments = {name: {n: torch.zeros_like(p, dtype=kind) for n, p in self.rest.items()} for name in names}
        if c.name == "adafactor":
            row, col = ({n: p.new_zeros(p.shape[side], dtype=self.wide) for n, p in params.items() if p.dim() == 2} for side in (0, 1))
            whole = {n: torch.zeros_like(p, dtype=self.wide) for n, p in params.items() if p.dim() != 2}
            self.moments = {"row_var": row, "col_var": col, "variance": whole}
        self.options = dict(
            lr_scales=[c.peak_embedding_lr / c.peak_lr if n.startswith("embed") else 1.0 for n in self.rest],
            weight_decay=[c.weight_decay * (p.dim() == 2 and (c.decay_embeddings or n.startswith("blocks."))) for n, p in self.rest.items()],
            masters=[self.masters.get(n, p) for n, p in self.rest.items()] if self.masters else None,
            counter_starts=[self.starts[n] for n in self.rest],
        )  # fmt: skip
        self.steps, self.good_steps = torch.zeros((), device=device), torch.zeros((), device=device)
        self.sums: dict[str, torch.Tensor] = {}
        self.dynamic_scale = torch.float16 in dtypes
        self.loss_scale = torch.full((), 2.0**16 if self.dynamic_scale else 1.0, device=device)

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor of the optimizer by name: views of the live ones."""
        tensors = {"steps": self.steps, "loss_scale": self.loss_scale, "good_steps": self.good_steps}
        tensors |= {f"master.{n}": t for n, t in self.masters.items()}
        tensors |= {f"momentum.{n}": self.momenta[s][i] for s, g in self.groups.items() for i, n in enumerate(g)}
        return tensors | {f"{kind}.{n}": t for kind, moments in self.moments.items() for n, t in moments.items()}

    def accumulate(self) -> None:
        """Add each `.grad` to its fp32 sum and clear it; called after the backward of each of several micro-batches."""
        for name, p in self.params.items():
            if p.grad is not None and name not in self.sums:
                self.sums[name] = p.grad.to(self.wide, copy=self.keep_gradients)
            elif p.grad is not None:
                self.sums[name] += p.grad
        self._clear()

    def _clear(self):
        """Free the gradients; with `keep_gradients` zero them where they lie."""
        for p in self.params.values():
            p.grad = p.grad.zero_() if self.keep_gradients and p.grad is not None else None

    @torch.no_grad()
    def step(self, factor: float | torch.Tensor, loss: torch.Tensor) -> StepResult:
        """Update by the gradients at `factor` (or a 0-d tensor) of the peak rates, and clear them; not where they or `loss` are not finite."""
        factor = factor if isinstance(factor, torch.Tensor) else torch.full((), factor, dtype=self.wide, device=loss.device)
        grads = {n: self.sums.get(n, p.grad) for n, p in self.params.items()}
        grads = {n: torch.zeros_like(self.params[n]) if g is None else g for n, g in grads.items()}
        norm = grad_norm_(list(grads.values())) / self.loss_scale
        skipped = ~(torch.isfinite(norm) & torch.isfinite(loss))
        clip = self.c.clip or math.inf
        scale = (clip / norm).clamp(max=1.0) / self.loss_scale
        self.steps += (~skipped).float()
        seed = None if self.seed is None else self.seed + self.steps.long()
        self._step_rest(grads, factor, scale, skipped, seed)
        self._step_muon(grads, factor, scale, skipped, seed)
        if self.dynamic_scale:
            good = torch.where(skipped, 0.0, self.good_steps + 1)
            grown = good >= 1000
            self.loss_scale.mul_(torch.where(skipped, 0.5, torch.where(grown, 2.0, 1.0))).clamp_(1.0, 2.0**24)
            self.good_steps.copy_(torch.where(grown, 0.0, good))
        self._clear()
        self.sums = {n: total.zero_() for n, total in self.sums.items()} if self.keep_gradients else {}
        return StepResult(norm, norm > clip, skipped)

    def _step_rest(self, grads, factor, scale, skipped, seed):
        c, params = self.c, list(self.rest.values())
        lists = (params, [grads[n] for n in self.rest], *([named.get(n) for n in self.rest] for named in self.moments.values()))
        options = dict(lr=factor * c.peak_lr, grad_scale=scale, found_nonfinite=skipped, seed=seed, **self.options)
        if c.name == "lion":
            lion_(*lists, betas=(c.lion_beta1, c.lion_beta2), **options)
        elif c.name == "adafactor":
            adafactor_(*lists, step=self.steps, eps=(c.eps, 1e-3), **options)
        else:
            adamw_(*lists, step=self.steps, betas=(c.beta1, c.beta2), eps=c.eps, **options)

    def stacks(self):
        """(shape, names, momenta) of matrices that Muon updates together."""
        for shape, names in self.groups.items():
            count = max(1, STACKED // math.prod(shape))
            for first in range(0, len(names), count):
                yield shape, names[first : first + count], self.momenta[shape][first : first + count]

    def _step_muon(self, grads, factor, scale, skipped, seed):
        c = self.c
        for shape, names, momentum in self.stacks():
            gradient = torch.stack([grads[n] for n in names]).to(self.wide) * scale
            moved = momentum.to(self.wide).lerp(gradient, 1 - c.muon_momentum)
            update = orthogonalize(gradient.lerp(moved, c.muon_momentum)).to(self.wide)
            momentum.copy_(torch.where(skipped, momentum, moved))
            rate = factor * (c.muon_lr * max(1.0, shape[0] / shape[1]) ** 0.5)
            for index, name in enumerate(names):
                param = self.params[name]
                weight = self.masters.get(name, param).to(self.wide)  # the tensor itself, or a copy of a bf16 one without master
                change = update[index] if not c.weight_decay else update[index] + c.weight_decay * weight
                weight.addcmul_(torch.where(skipped, 0.0, change), rate, value=-1)
                if param.dtype != self.wide:
                    param.copy_(weight if seed is None else stochastic_round(weight, param.dtype, seed, self.starts[name]))
