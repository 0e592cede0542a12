"""The optimizer (AdamW, or Muon for hidden matrices and AdamW for the rest), learning-rate schedules and loss scaling.

Parameters may be bf16 or fp16: fp32 masters live here, gradients of several micro-batches are summed in fp32, and clipping
and the check for non-finite values stay on the device: where a gradient is not finite, no state changes at all.
Sources: AdamW arXiv 1711.05101; Muon: Jordan et al. 2024, with the Newton-Schulz coefficients of Polar Express
(arXiv 2505.16932); WSD arXiv 2404.06395.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from nanotrain.config import at_least
from nanotrain.kernels.optimizers import adamw_


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the hidden matrices and AdamW for the rest; adamw: AdamW for everything."""
    lr: float = 0.0
    """Peak rate of AdamW [per step]; 0 takes 0.01 beside Muon, where it has head, norms and biases, and 0.003 alone."""
    embedding_lr: float = 0.0
    """Peak rate of AdamW for embeddings, tied ones too [per step]; 0 takes 0.1 beside Muon, and `lr` alone."""
    muon_lr: float = 0.02
    """Peak rate of Muon, of each matrix times sqrt(max(1, rows / columns)) [per step]."""
    tuned_batch: int = 2048
    """Batch at which the rates above were chosen [tokens]; another batch prints what linear scaling suggests."""
    beta1: float = 0.8
    """AdamW's decay of the first moment [per step]."""
    beta2: float = 0.95
    """AdamW's decay of the second moment [per step]."""
    eps: float = 1e-10
    """Added to AdamW's denominator [units of the gradient]."""
    muon_momentum: float = 0.85
    """Muon's Nesterov momentum [per step]."""
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
    def adamw_lr(self) -> float:
        """AdamW's peak rate, the default filled in."""
        return self.lr or (0.01 if self.name == "muon" else 0.003)

    @property
    def adamw_embedding_lr(self) -> float:
        """AdamW's peak rate for embeddings, the default filled in."""
        return self.embedding_lr or (0.1 if self.name == "muon" else self.adamw_lr)


def check_optim(c: OptimConfig) -> None:
    """Raise ValueError naming the flag for values that make no sense."""
    for name in ("adamw_lr", "adamw_embedding_lr", "muon_lr", "eps"):
        if not getattr(c, name) > 0:
            raise ValueError(f"--optim.{name.removeprefix('adamw_')} {getattr(c, name)}: must be positive")
    for name in ("beta1", "beta2", "muon_momentum"):
        if not 0 <= getattr(c, name) < 1:
            raise ValueError(f"--optim.{name} {getattr(c, name)}: must lie in [0, 1)")
    for name in ("warmup", "decay", "floor"):
        if not 0 <= getattr(c, name) <= 1:
            raise ValueError(f"--optim.{name} {getattr(c, name)}: must lie in [0, 1]")
    at_least(c, "optim", 0, "weight_decay", "clip")
    at_least(c, "optim", 1, "tuned_batch")
    if c.schedule == "wsd" and c.warmup + c.decay > 1:
        raise ValueError(f"--optim.warmup {c.warmup} and --optim.decay {c.decay}: together more than the whole budget")


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


_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""For five steps with a safety factor of 2%: without it the rounding of bf16 pushes the largest singular value past one and far away."""


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices of a stack (n, rows, columns), in bf16 (float64 for float64).

    Five odd polynomial steps; singular values over a hundredth of the norm end between 0.85 and 1.15, which Muon needs no closer.
    """
    x = matrices.to(torch.float64 if matrices.dtype == torch.float64 else torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in _POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


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
    """One optimizer over the parameters of a model.

    `state()` names every tensor that must survive; loading copies into the same tensors, so a resumed run goes on bit for bit.
    """

    def __init__(self, model: nn.Module, c: OptimConfig):
        self.c = c
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        device = next(iter(self.params.values())).device
        wide = {n: torch.promote_types(p.dtype, torch.float32) for n, p in self.params.items()}
        self.masters = {n: p.detach().to(wide[n]) for n, p in self.params.items() if p.dtype != wide[n]}
        hidden = [n for n, p in self.params.items() if p.dim() == 2 and n.startswith("blocks.")]
        self.muon = hidden if c.name == "muon" else []
        self.adamw = [n for n in self.params if n not in set(self.muon)]
        self.groups: dict[tuple[int, ...], list[str]] = {}
        for name in self.muon:
            self.groups.setdefault(tuple(self.params[name].shape), []).append(name)
        # Momenta of equal shapes are one stack, so that they are orthogonalised in one batched product.
        self.momenta = {s: torch.zeros(len(g), *s, dtype=wide[g[0]], device=device) for s, g in self.groups.items()}
        self.exp_avgs = {n: torch.zeros_like(self.params[n], dtype=wide[n]) for n in self.adamw}
        self.exp_avg_sqs = {n: torch.zeros_like(self.params[n], dtype=wide[n]) for n in self.adamw}
        self.steps = torch.zeros((), device=device)
        self.sums: dict[str, torch.Tensor] = {}
        half = any(p.dtype == torch.float16 for p in self.params.values())
        self.loss_scale = torch.full((), 2.0**16 if half else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.dynamic_scale = half

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor of the optimizer by name: views of the live ones."""
        tensors = {"steps": self.steps, "loss_scale": self.loss_scale, "good_steps": self.good_steps}
        tensors |= {f"master.{n}": t for n, t in self.masters.items()}
        tensors |= {f"momentum.{n}": self.momenta[s][i] for s, g in self.groups.items() for i, n in enumerate(g)}
        tensors |= {f"exp_avg.{n}": t for n, t in self.exp_avgs.items()}
        tensors |= {f"exp_avg_sq.{n}": t for n, t in self.exp_avg_sqs.items()}
        return tensors

    def accumulate(self) -> None:
        """Add each `.grad` to its fp32 sum and free it; called after the backward of each of several micro-batches."""
        for name, p in self.params.items():
            if p.grad is None:
                continue
            if name not in self.sums:
                self.sums[name] = p.grad.to(torch.promote_types(p.grad.dtype, torch.float32))
            else:
                self.sums[name] += p.grad
            p.grad = None

    @torch.no_grad()
    def step(self, factor: float, loss: torch.Tensor) -> StepResult:
        """Update by the gradients gathered, at `factor` of the peak rates, and clear them; not where they or `loss` are not finite."""
        grads = {n: self.sums.get(n, p.grad) for n, p in self.params.items()}
        grads = {n: torch.zeros_like(self.params[n]) if g is None else g for n, g in grads.items()}
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms)) / self.loss_scale
        skipped = ~(torch.isfinite(norm) & torch.isfinite(loss))
        clip = self.c.clip or math.inf
        scale = (clip / norm).clamp(max=1.0) / self.loss_scale
        self.steps += (~skipped).float()
        self._step_adamw(grads, factor, scale, skipped)
        self._step_muon(grads, factor, scale, skipped)
        if self.dynamic_scale:
            self.good_steps = torch.where(skipped, 0.0, self.good_steps + 1)
            grown = self.good_steps >= 1000
            self.loss_scale = torch.where(skipped, self.loss_scale / 2, torch.where(grown, self.loss_scale * 2, self.loss_scale)).clamp(1.0, 2.0**24)
            self.good_steps = torch.where(grown, 0.0, self.good_steps)
        for p in self.params.values():
            p.grad = None
        self.sums.clear()
        return StepResult(norm, norm > clip, skipped)

    def _step_adamw(self, grads, factor, scale, skipped):
        c = self.c
        groups: dict[tuple[float, float], list[str]] = {}
        for name in self.adamw:
            decayed = self.params[name].dim() == 2 and (c.decay_embeddings or name.startswith("blocks."))
            rate = c.adamw_embedding_lr if name.startswith("embed") else c.adamw_lr
            groups.setdefault((rate * factor, c.weight_decay if decayed else 0.0), []).append(name)
        for (rate, decay), names in groups.items():
            masters = [self.masters[n] for n in names] if self.masters else None
            adamw_(
                [self.params[n] for n in names], [grads[n] for n in names], [self.exp_avgs[n] for n in names], [self.exp_avg_sqs[n] for n in names],
                lr=rate, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=decay, step=self.steps, grad_scale=scale,
                found_nonfinite=skipped, masters=masters,
            )  # fmt: skip

    def _stacks(self):
        """(shape, names, momenta) of matrices that are updated together."""
        for shape, names in self.groups.items():
            count = max(1, STACKED // math.prod(shape))
            for first in range(0, len(names), count):
                yield shape, names[first : first + count], self.momenta[shape][first : first + count]

    def _step_muon(self, grads, factor, scale, skipped):
        c = self.c
        for shape, names, momentum in self._stacks():
            gradient = torch.stack([grads[n] for n in names]).to(momentum.dtype) * scale
            moved = momentum.lerp(gradient, 1 - c.muon_momentum)
            update = orthogonalize(gradient.lerp(moved, c.muon_momentum)).to(momentum.dtype)
            momentum.copy_(torch.where(skipped, momentum, moved))
            rate = c.muon_lr * factor * max(1.0, shape[0] / shape[1]) ** 0.5
            for index, name in enumerate(names):
                weight = self.masters.get(name, self.params[name])
                change = update[index] if not c.weight_decay else update[index] + c.weight_decay * weight
                weight.sub_(torch.where(skipped, 0.0, change), alpha=rate)
                if name in self.masters:
                    self.params[name].copy_(weight)
