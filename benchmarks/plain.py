"""A plain PyTorch training loop of the same model, what one writes in an hour, for benchmarks to compare with.

fp32 weights under bf16 autocast (or plain fp32), scaled_dot_product_attention, cross-entropy on logits, torch's fused AdamW (beside
torch's Muon for the hidden matrices, where asked for), the same rows of the same data; documents in a row see each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanotrain.data.loader import Loader
from nanotrain.model.transformer import Transformer


class PlainLoop:
    """The weights and shapes of `model`, written plainly."""

    def __init__(self, model: Transformer, dtype: torch.dtype, loader: Loader, rows: int, *, muon: bool = False):
        self.c, self.dtype, self.loader, self.rows, self.cursor = model.c, dtype, loader, rows, 0
        self.w = {n: torch.nn.Parameter(p.detach().float().clone()) for n, p in model.named_parameters()}
        hidden = [p for n, p in self.w.items() if muon and p.dim() == 2 and n.startswith("blocks.")]
        rest = [p for p in self.w.values() if not any(p is h for h in hidden)]
        self.optimizers = [torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), fused=True)]
        if muon:
            self.optimizers.append(torch.optim.Muon(hidden, lr=0.02, weight_decay=0.0))
        self.peaks = [o.param_groups[0]["lr"] for o in self.optimizers]
        T = loader.length
        angles = torch.arange(T)[:, None] * 10000 ** (-torch.arange(0, self.c.head_dim, 2) / self.c.head_dim)
        self.cos, self.sin = angles.cos()[:, None], angles.sin()[:, None]

    def rope(self, x):
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1).to(x.dtype)

    def forward(self, tokens):
        c, w = self.c, self.w
        B, T = tokens.shape
        x = F.embedding(tokens, w["embed.weight"])
        for i in range(c.layers):
            p = f"blocks.{i}."
            h = F.rms_norm(x, (c.width,), w[p + "attention_norm.weight"], c.norm_eps)
            q, k, v = (F.linear(h, w[f"{p}attention.{n}_proj.weight"]).view(B, T, -1, c.head_dim) for n in "qkv")
            if c.qk_norm:
                q = F.rms_norm(q, (c.head_dim,), w[p + "attention.q_norm.weight"], c.norm_eps)
                k = F.rms_norm(k, (c.head_dim,), w[p + "attention.k_norm.weight"], c.norm_eps)
            q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (self.rope(q), self.rope(k), v))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
            x = x + F.linear(a, w[p + "attention.o_proj.weight"])
            h = F.rms_norm(x, (c.width,), w[p + "mlp_norm.weight"], c.norm_eps)
            x = x + F.linear(
                F.silu(F.linear(h, w[p + "mlp.gate_proj.weight"])) * F.linear(h, w[p + "mlp.up_proj.weight"]), w[p + "mlp.down_proj.weight"]
            )
        return F.linear(F.rms_norm(x, (c.width,), w["head.norm.weight"], c.norm_eps), w.get("head.weight", w["embed.weight"]))

    def step(self, factor: float = 1.0) -> float:
        """One step at `factor` of the peak rates; returns the loss."""
        batch = self.loader.batch(self.cursor, self.rows)
        self.cursor += self.rows
        tokens, labels = batch.tokens_BT.view(self.rows, -1), batch.labels_BT.view(-1)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            logits = self.forward(tokens)
        loss = F.cross_entropy(logits.view(-1, self.c.vocab_size).float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.w.values(), 1.0)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()
