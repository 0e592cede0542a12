"""A decoder-only transformer, plain and for one device; parallelism, adapters and quantisation are put on from outside.

Legend of shape suffixes: B batch, T sequence, S keys seen, H query heads, K key/value heads, D head dim, C model width,
F feed-forward width, V vocabulary, N tokens of a batch laid end to end.

Documents are packed: tokens (1, N) with `cu_seqlens`, positions counted from each document's start. `positions_BT` and
`cu_seqlens` are arguments, never derived inside. Sources: Llama (arXiv 2302.13971), GPT-2, Qwen3, Gemma 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanotrain.config import at_least
from nanotrain.kernels.attention import flash_attention
from nanotrain.kernels.dropout import dropout_add
from nanotrain.kernels.gated import geglu, swiglu
from nanotrain.kernels.lookup import embedding
from nanotrain.kernels.norm import layer_norm, rms_norm
from nanotrain.kernels.random import mix_seed
from nanotrain.kernels.rotary import qk_norm_rope, rope
from nanotrain.kernels.token_loss import linear_cross_entropy
from nanotrain.model.linear import Linear, project
from nanotrain.model.positions import alibi_slopes, rope_frequencies
from nanotrain.model.presets import PRESETS


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model. `preset` fills every key that is not given."""

    preset: str = "nano"
    """A named shape (PRESETS); any other key given overrides its part of it."""
    vocab_size: int = 0
    """Rows of the embedding [tokens]; 0 takes the tokenizer's size."""
    width: int = 256
    """Model width C [channels]."""
    layers: int = 4
    """Depth [blocks]."""
    heads: int = 4
    """Query heads H [heads]."""
    kv_heads: int = 0
    """Key/value heads K [heads]; 0 is as many as heads (MHA), 1 is MQA, between is GQA."""
    head_dim: int = 0
    """Head dim D [channels]; 0 is width / heads."""
    ffn_width: int = 0
    """Feed-forward width F [channels]; 0 is 8/3 width (gated) or 4 width, rounded up to 32."""
    context: int = 1024
    """Longest sequence [tokens]: rows of learned positions, and what RoPE scaling starts from."""
    positions: Literal["rope", "learned", "alibi"] = "rope"
    """How order enters: rotary embedding, a learned table, or ALiBi slopes."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies [ratio]."""
    rope_scaling: Literal["none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"] = "none"
    """How rotary frequencies are stretched beyond `rope_original_context`; positions.py says how each does it."""
    rope_factor: float = 1.0
    """Stretch of the context [ratio]."""
    rope_original_context: int = 0
    """Context the frequencies were trained at [tokens] (dynamic, yarn, llama3, longrope); 0 is `context`."""
    rope_low: float = 1.0
    """Turns within the original context below which yarn and llama3 stretch a frequency in full [turns]."""
    rope_high: float = 0.0
    """Turns above which they leave it alone [turns]; 0 is 32 (yarn) or 4 (llama3)."""
    rope_attention_factor: float = 0.0
    """On cos and sin (yarn, longrope) [ratio]; 0 takes the method's own."""
    rope_untruncated: bool = False
    """YaRN's ramp begins and ends between channels, not at whole ones."""
    rope_short_factors: tuple[float, ...] = ()
    """Longrope's divisor of each frequency up to the original context [ratio]."""
    rope_long_factors: tuple[float, ...] = ()
    """Longrope's divisor of each frequency beyond it [ratio]."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm."""
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    """Normalise each sub-layer's input, the sum after it, or (sandwich, as Gemma 2) its input and its output."""
    norm_eps: float = 1e-6
    """Added to the variance [squared activation]."""
    norm_offset: float = 0.0
    """Added to RMSNorm's weights [weight]; 1 for Gemma."""
    activation: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    """Feed-forward nonlinearity; gelu has no gate."""
    attention_bias: bool = False
    """Biases on q, k and v."""
    output_bias: bool = False
    """A bias on attention's output projection."""
    mlp_bias: bool = False
    """Biases on the feed-forward's projections."""
    bias: bool = False
    """Biases on every linear layer and LayerNorm (implies the three above)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys."""
    window: int = 0
    """Sliding window [tokens]; 0 is none."""
    window_pattern: str = "s"
    """Which layers have the window: a letter a layer, s sliding or f full, repeated to the depth (Gemma 2 is sf)."""
    attention_scale: float = 0.0
    """On attention scores [ratio]; 0 is 1 / sqrt(head_dim)."""
    attention_softcap: float = 0.0
    """Soft cap of attention scores [score]; 0 is none."""
    logit_softcap: float = 0.0
    """Soft cap of logits [logit]; 0 is none."""
    tied: bool = True
    """The head shares the embedding's matrix."""
    scale_embedding: bool = False
    """Multiply embeddings by sqrt(width), as Gemma does."""
    init_std: float = 0.02
    """Standard deviation of initial weights [weight]; residual projections get init_std / sqrt(2 * layers)."""
    dropout: float = 0.0
    """Dropout on attention probabilities and residual branches [probability]."""
    embedding_dropout: float = 0.0
    """Dropout on the embedding's output [probability]."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward computes again: nothing, each feed-forward, or each block."""

    def resolved(self, given: frozenset[str] = frozenset()) -> ModelConfig:
        """This config with its preset's values in every key not in `given`, and zeros replaced by what they stand for.

        Raises ValueError naming the flag for shapes that cannot be built.
        """
        if self.preset not in PRESETS:
            raise ValueError(f"--model.preset {self.preset}: unknown; one of {', '.join(PRESETS)}")
        c = replace(self, **{k: v for k, v in PRESETS[self.preset].items() if k not in given})
        at_least(c, "model", 1, "width", "layers", "heads", "context")
        at_least(c, "model", 0, "vocab_size", "kv_heads", "head_dim", "ffn_width", "rope_original_context", "window", "attention_softcap",
                 "logit_softcap", "attention_scale", "rope_high", "rope_attention_factor")  # fmt: skip
        for name in ("rope_theta", "rope_factor", "norm_eps", "init_std"):
            if not 0 < getattr(c, name) < math.inf:
                raise ValueError(f"--model.{name} {getattr(c, name)}: must be positive")
        head_dim = c.head_dim or c.width // c.heads
        gated = c.activation != "gelu"
        c = replace(
            c,
            kv_heads=c.kv_heads or c.heads,
            head_dim=head_dim,
            ffn_width=c.ffn_width or math.ceil((c.width * 8 / 3 if gated else c.width * 4) / 32) * 32,
            rope_original_context=c.rope_original_context or c.context,
            attention_bias=c.attention_bias or c.bias,
            output_bias=c.output_bias or c.bias,
            mlp_bias=c.mlp_bias or c.bias,
        )
        if c.heads % c.kv_heads:
            raise ValueError(f"--model.kv_heads {c.kv_heads}: must divide --model.heads {c.heads}")
        if c.positions == "rope" and (c.head_dim % 2 or (c.head_dim == 2 and c.rope_scaling in ("ntk", "dynamic", "yarn"))):
            raise ValueError(f"--model.head_dim {c.head_dim}: rotary embedding needs an even head dim, of at least 4 for ntk, dynamic or yarn")
        if c.rope_scaling == "longrope" and not len(c.rope_short_factors) == len(c.rope_long_factors) == c.head_dim // 2:
            raise ValueError(f"--model.rope_short_factors, rope_long_factors: longrope needs {c.head_dim // 2} of each, half of the head dim")
        if not c.window_pattern or set(c.window_pattern) - {"s", "f"}:
            raise ValueError(f"--model.window_pattern {c.window_pattern!r}: must be letters s (sliding) and f (full)")
        if not c.head_dim:
            raise ValueError(f"--model.width {c.width}: smaller than --model.heads {c.heads}; set --model.head_dim")
        for name in ("dropout", "embedding_dropout"):
            if not 0.0 <= getattr(c, name) < 1.0:
                raise ValueError(f"--model.{name} {getattr(c, name)}: must lie in [0, 1)")
        return c


@dataclass(frozen=True)
class Dropout:
    """Where a batch's dropout draws from: the run's seed and each token's global index in the whole training run."""

    seed: int
    counters_BT: torch.Tensor


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, optionally adding a residual first."""

    def __init__(self, width: int, kind: str, eps: float, bias: bool = False, offset: float = 0.0):
        super().__init__()
        self.kind, self.eps, self.offset = kind, eps, offset
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer" and bias else None

    def forward(self, x, residual=None):
        if self.kind == "rms":
            return rms_norm(x, self.weight, self.eps, residual=residual, offset=self.offset)
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual)


def model_norm(c: ModelConfig) -> Norm:
    """The norm of the residual stream."""
    return Norm(c.width, c.norm, c.norm_eps, c.bias, c.norm_offset)


class Attention(nn.Module):
    """Grouped-query attention. The attention call itself is `self.attend`, a seam that context parallelism replaces."""

    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.c, self.layer, self.head_start = c, layer, 0
        self.q_proj = Linear(c.width, c.heads * c.head_dim, c.attention_bias)
        self.k_proj = Linear(c.width, c.kv_heads * c.head_dim, c.attention_bias)
        self.v_proj = Linear(c.width, c.kv_heads * c.head_dim, c.attention_bias)
        self.o_proj = Linear(c.heads * c.head_dim, c.width, c.output_bias)
        self.q_norm = Norm(c.head_dim, "rms", c.norm_eps, offset=c.norm_offset) if c.qk_norm else None
        self.k_norm = Norm(c.head_dim, "rms", c.norm_eps, offset=c.norm_offset) if c.qk_norm else None
        sliding = c.window and c.window_pattern[layer % len(c.window_pattern)] == "s"
        self.options = dict(window=c.window if sliding else None, softcap=c.attention_softcap or None, scale=c.attention_scale or None)
        self.attend = flash_attention

    def forward(self, x_BTC, positions_BT, rotary, documents=None, dropout=None, cache=None):
        c, (B, T, _) = self.c, x_BTC.shape
        # Heads are counted by the weights' shapes, not by the config: a shard holds its part of them.
        q, k, v = (y.view(B, T, -1, c.head_dim) for y in project((self.q_proj, self.k_proj, self.v_proj), x_BTC))
        if c.qk_norm and rotary is not None:
            weights = self.q_norm.weight, self.k_norm.weight
            q, k = qk_norm_rope(q, k, *weights, *rotary, positions=positions_BT, eps=c.norm_eps, offset=c.norm_offset)
        elif c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        elif rotary is not None:
            q, k = rope(q, k, *rotary, positions=positions_BT, inplace=True)
        options = dict(self.options)
        if c.positions == "alibi":
            options["alibi_slopes"] = alibi_slopes(c.heads, q.device)[self.head_start : self.head_start + q.shape[2]]
        if cache is not None:
            return self.o_proj(cache.attend(self.layer, q, k, v, **options).reshape(B, T, -1))
        if dropout is not None and c.dropout:
            firsts = None if documents is None else documents["cu_seqlens"][:-1].long().clamp(max=T - 1)  # one of no token may stand at the end
            starts = dropout.counters_BT[:, 0] if documents is None else dropout.counters_BT[0, firsts]
            options.update(dropout_p=c.dropout, seed=mix_seed(dropout.seed, starts, self.layer))
        out = self.attend(q, k, v, head_start=self.head_start, **(documents or {}), **options)
        return self.o_proj(out.reshape(B, T, -1))


class FeedForward(nn.Module):
    """The gated feed-forward down(act(gate(x)) * up(x)), or down(gelu(up(x)))."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.activation = c.activation
        self.gate_proj = Linear(c.width, c.ffn_width, c.mlp_bias) if c.activation != "gelu" else None
        self.up_proj = Linear(c.width, c.ffn_width, c.mlp_bias)
        self.down_proj = Linear(c.ffn_width, c.width, c.mlp_bias)

    def forward(self, x):
        if self.activation == "gelu":
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        product = swiglu if self.activation == "swiglu" else geglu
        return self.down_proj(product(*project((self.gate_proj, self.up_proj), x)))


class Block(nn.Module):
    """Attention and feed-forward, each added to the one residual tensor that enters and leaves."""

    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.c, self.layer = c, layer
        self.attention_norm, self.mlp_norm = model_norm(c), model_norm(c)
        self.attention_post_norm, self.mlp_post_norm = (model_norm(c), model_norm(c)) if c.norm_position == "sandwich" else (None, None)
        self.attention = Attention(c, layer)
        self.mlp = FeedForward(c)

    def forward(self, x_BTC, positions_BT, rotary, documents=None, dropout=None, cache=None):
        recompute = torch.is_grad_enabled() and cache is None and self.c.recompute
        if recompute == "full":
            return _recomputed(self._forward, x_BTC, positions_BT, rotary, documents, dropout)
        return self._forward(x_BTC, positions_BT, rotary, documents, dropout, cache, recompute == "selective")

    def _forward(self, x, positions_BT, rotary, documents, dropout, cache=None, recompute_mlp=False):
        mlp = (lambda h: _recomputed(self.mlp, h)) if recompute_mlp else self.mlp
        if self.c.norm_position == "post":
            x = self._add(self.attention_norm, self.attention(x, positions_BT, rotary, documents, dropout, cache), x, dropout, 0)[0]
            return self._add(self.mlp_norm, mlp(x), x, dropout, 1)[0]
        attended = self.attention(self.attention_norm(x), positions_BT, rotary, documents, dropout, cache)
        normed, x = self._add(self.mlp_norm, self._after(self.attention_post_norm, attended), x, dropout, 0)
        return self._add(None, self._after(self.mlp_post_norm, mlp(normed)), x, dropout, 1)

    def _after(self, norm, branch):
        return branch if norm is None else norm(branch)

    def _add(self, norm, branch, x, dropout, site):
        """x + dropout(branch); with a norm, (what it makes of that, that)."""
        if dropout is not None and self.c.dropout:
            x = dropout_add(branch, x, self.c.dropout, mix_seed(dropout.seed, self.layer, 2 + site), dropout.counters_BT)
            return x if norm is None else (norm(x), x)
        return x + branch if norm is None else norm(branch, x)


def _recomputed(function, *arguments):
    # Dropout is counter-based, so there is no generator state to preserve.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class Head(nn.Module):
    """Final norm and output matrix; every objective reads per-token log-probabilities from here, and never [N, V] logits."""

    def __init__(self, c: ModelConfig, weight: nn.Parameter | None = None):
        super().__init__()
        self.c = c
        self.norm = model_norm(c) if c.norm_position != "post" else None
        self.weight = nn.Parameter(torch.empty(c.vocab_size, c.width)) if weight is None else weight

    def forward(self, hidden_BTC, labels_BT, **options):
        """(loss_N, logprob_N, entropy_N or None) of the labels; `options` are those of linear_cross_entropy."""
        hidden = hidden_BTC if self.norm is None else self.norm(hidden_BTC)
        softcap = self.c.logit_softcap or None
        return linear_cross_entropy(hidden.flatten(0, -2), self.weight, labels_BT.flatten(), softcap=softcap, **options)

    def logits(self, hidden_BTC):
        """Logits (B, T, V), for generation."""
        hidden = hidden_BTC if self.norm is None else self.norm(hidden_BTC)
        logits = F.linear(hidden, self.weight)
        return self.c.logit_softcap * torch.tanh(logits / self.c.logit_softcap) if self.c.logit_softcap else logits


class Transformer(nn.Module):
    """tokens -> embed -> blocks -> hidden states; `head` turns those into log-probabilities or logits.

    `embed`, `blocks` (keyed by global layer number) and `head` stand alone, so a pipeline stage may hold a part of them:
    where `embed` is None the input is a residual tensor instead of tokens. model/build.py makes it.
    """

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.embed_positions = nn.Embedding(c.context, c.width) if c.positions == "learned" else None
        self.blocks = nn.ModuleDict({str(layer): Block(c, layer) for layer in range(c.layers)})
        self.head = Head(c, self.embed.weight if c.tied else None)
        self._rotary: tuple[int, tuple[torch.Tensor, torch.Tensor]] = (-1, ())

    def rotary_tables(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin (at least length, D / 2) in fp32, made on first use; None without RoPE."""
        if self.c.positions != "rope":
            return None
        reach = length if self.c.rope_scaling in ("dynamic", "longrope") and length > self.c.rope_original_context else 0
        if self._rotary[0] != reach or len(self._rotary[1][0]) < length or self._rotary[1][0].device != device:
            frequencies, factor = rope_frequencies(self.c, reach)
            angles = torch.arange(max(length, min(self.c.context, 4096)), dtype=torch.float64)[:, None] * frequencies
            self._rotary = reach, tuple((t * factor).to(device, torch.float32) for t in (angles.cos(), angles.sin()))
        return self._rotary[1]

    def forward(self, x, positions_BT, *, cu_seqlens=None, lengths=None, dropout: Dropout | None = None, cache=None, max_position: int = 0):
        """Hidden states (B, T, C), before the head's norm, of tokens (B, T) int64 at positions (B, T).

        cu_seqlens    offsets of packed documents (B is 1), and their `lengths` where the host knows them
        dropout       given in training where the config has dropout; None switches it off
        cache         a step of a KV cache (cache.py), which stores keys and values and attends to those it holds; no gradients
        max_position  largest position plus one, where the host knows it; 0 takes the config's context
        """
        if self.embed is not None:
            x = embedding(x, self.embed.weight)
            if self.c.scale_embedding:
                x = x * torch.tensor(math.sqrt(self.c.width), dtype=x.dtype)
            if self.embed_positions is not None:
                x = x + embedding(positions_BT, self.embed_positions.weight)
            if dropout is not None and self.c.embedding_dropout:
                x = dropout_add(x, None, self.c.embedding_dropout, mix_seed(dropout.seed, -1, 0), dropout.counters_BT)
        rotary = self.rotary_tables(max_position or self.c.context, x.device)
        documents = None if cu_seqlens is None else dict(cu_seqlens=cu_seqlens, lengths=lengths)
        for block in self.blocks.values():
            x = block(x, positions_BT, rotary, documents, dropout, cache)
        return x
