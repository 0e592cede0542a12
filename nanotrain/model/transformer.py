"""A decoder-only transformer, plain and for one device; parallelism, adapters and quantisation are put on from outside.

Legend of shape suffixes: B batch, T sequence, S keys seen, H query heads, K key/value heads, D head dim, C model width,
F feed-forward width, V vocabulary, N tokens of a batch laid end to end.

Documents are packed: tokens (1, N) with `cu_seqlens`, positions counted from each document's start. `positions_BT` and
`cu_seqlens` are arguments, never derived inside. Sources: Llama (arXiv 2302.13971), GPT-2, Qwen3, Gemma 2.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanotrain.config import at_least
from nanotrain.kernels.attention import flash_attention
from nanotrain.kernels.gated import geglu, swiglu
from nanotrain.kernels.norm import layer_norm, rms_norm
from nanotrain.kernels.random import dropout_reference, mix_seed
from nanotrain.kernels.rotary import rope
from nanotrain.kernels.token_loss import linear_cross_entropy
from nanotrain.model.linear import Linear
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
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """How rotary frequencies are stretched beyond `rope_original_context`."""
    rope_factor: float = 1.0
    """Stretch of the context [ratio]."""
    rope_original_context: int = 0
    """Context the frequencies were trained at [tokens] (yarn, llama3); 0 is `context`."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm."""
    norm_position: Literal["pre", "post"] = "pre"
    """Normalise each sub-layer's input, or the sum after it."""
    norm_eps: float = 1e-6
    """Added to the variance [squared activation]."""
    activation: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    """Feed-forward nonlinearity; gelu has no gate."""
    attention_bias: bool = False
    """Biases on q, k and v."""
    bias: bool = False
    """Biases on every linear layer and LayerNorm (implies attention_bias)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys."""
    window: int = 0
    """Sliding window [tokens]; 0 is none."""
    attention_softcap: float = 0.0
    """Soft cap of attention scores [score]; 0 is none."""
    logit_softcap: float = 0.0
    """Soft cap of logits [logit]; 0 is none."""
    tied: bool = True
    """The head shares the embedding's matrix."""
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
                 "logit_softcap")  # fmt: skip
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
        )
        if c.heads % c.kv_heads:
            raise ValueError(f"--model.kv_heads {c.kv_heads}: must divide --model.heads {c.heads}")
        if c.positions == "rope" and (c.head_dim % 2 or (c.head_dim == 2 and c.rope_scaling in ("ntk", "yarn"))):
            raise ValueError(f"--model.head_dim {c.head_dim}: rotary embedding needs an even head dim, of at least 4 to be scaled by ntk or yarn")
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


@dataclass
class Cache:
    """Keys and values of the tokens seen so far, a pair of (B, capacity, K, D) per layer, sized by the first call."""

    capacity: int
    length: int = 0
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values (B, T, K, D) after the `length` held; return all of them."""
        if self.length + k.shape[1] > self.capacity:
            raise ValueError(f"cache of {self.capacity} tokens is full; start it larger")
        if layer not in self.layers:
            self.layers[layer] = tuple(x.new_empty(x.shape[0], self.capacity, *x.shape[2:]) for x in (k, v))
        end = self.length + k.shape[1]
        for held, new in zip(self.layers[layer], (k, v), strict=True):
            held[:, self.length : end] = new
        return tuple(held[:, :end] for held in self.layers[layer])


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, optionally adding a residual first."""

    def __init__(self, width: int, kind: str, eps: float, bias: bool = False):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer" and bias else None

    def forward(self, x, residual=None):
        if self.kind == "rms":
            return rms_norm(x, self.weight, self.eps, residual=residual)
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual)


def rope_frequencies(c: ModelConfig) -> tuple[torch.Tensor, float]:
    """Rotary frequencies (D / 2,) in float64 [radians per token] after scaling, and the factor on cos and sin.

    Sources: linear arXiv 2306.15595; NTK-aware (static base change); YaRN arXiv 2309.00071; llama3 as in Llama 3.1.
    """
    D, base, factor, original = c.head_dim, c.rope_theta, c.rope_factor, c.rope_original_context
    if c.rope_scaling == "ntk":
        base = base * factor ** (D / (D - 2))
    exponent = torch.arange(0, D, 2, dtype=torch.float64) / D
    frequencies = base**-exponent
    if c.rope_scaling == "linear":
        return frequencies / factor, 1.0
    if c.rope_scaling == "llama3":
        low, high = 1.0, 4.0  # turns within the original context below which to stretch, above which to keep
        turns = original * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * keep + frequencies / factor * (1 - keep), 1.0
    if c.rope_scaling == "yarn":
        fast, slow = 32.0, 1.0  # turns within the original context

        def channel(turns):
            return D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        first, last = max(math.floor(channel(fast)), 0), min(math.ceil(channel(slow)), D - 1)
        ramp = ((torch.arange(D // 2, dtype=torch.float64) - first) / max(last - first, 0.001)).clamp(0, 1)
        attention_factor = 1.0 if factor <= 1.0 else 0.1 * math.log(factor) + 1.0
        return frequencies / factor * ramp + frequencies * (1 - ramp), attention_factor
    return frequencies, 1.0


def alibi_slopes(heads: int) -> torch.Tensor:
    """ALiBi's slope of each head (H,): powers of 2^(-8/n) for n heads a power of two, else interleaved with the next power's."""
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)]
    slopes += [2 ** (-4 * (2 * i + 1) / n) for i in range(heads - n)]
    return torch.tensor(slopes)


class Attention(nn.Module):
    """Grouped-query attention. The attention call itself is `self.attend`, a seam that context parallelism replaces."""

    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.c, self.layer, self.head_start = c, layer, 0
        self.q_proj = Linear(c.width, c.heads * c.head_dim, c.attention_bias)
        self.k_proj = Linear(c.width, c.kv_heads * c.head_dim, c.attention_bias)
        self.v_proj = Linear(c.width, c.kv_heads * c.head_dim, c.attention_bias)
        self.o_proj = Linear(c.heads * c.head_dim, c.width, c.bias)
        self.q_norm = Norm(c.head_dim, "rms", c.norm_eps) if c.qk_norm else None
        self.k_norm = Norm(c.head_dim, "rms", c.norm_eps) if c.qk_norm else None
        self.attend = flash_attention

    def forward(self, x_BTC, positions_BT, rotary, cu_seqlens=None, dropout=None, cache=None):
        c, (B, T, _) = self.c, x_BTC.shape
        # Heads are counted by the weights' shapes, not by the config: a shard holds its part of them.
        q, k, v = (proj(x_BTC).view(B, T, -1, c.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rope(q, k, *rotary, positions=positions_BT)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        options = {}
        if c.positions == "alibi":
            heads = q.shape[2]
            options["alibi_slopes"] = alibi_slopes(c.heads)[self.head_start : self.head_start + heads].to(q.device)
        if dropout is not None and c.dropout:
            starts = dropout.counters_BT[:, 0] if cu_seqlens is None else dropout.counters_BT[0, cu_seqlens[:-1].long()]
            options.update(dropout_p=c.dropout, seed=mix_seed(dropout.seed, starts, torch.tensor(self.layer, device=q.device)))
        out = self.attend(
            q, k, v, window=c.window or None, softcap=c.attention_softcap or None, cu_seqlens=cu_seqlens, head_start=self.head_start, **options
        )
        return self.o_proj(out.reshape(B, T, -1))


class FeedForward(nn.Module):
    """The gated feed-forward down(act(gate(x)) * up(x)), or down(gelu(up(x)))."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.activation = c.activation
        self.gate_proj = Linear(c.width, c.ffn_width, c.bias) if c.activation != "gelu" else None
        self.up_proj = Linear(c.width, c.ffn_width, c.bias)
        self.down_proj = Linear(c.ffn_width, c.width, c.bias)

    def forward(self, x):
        if self.activation == "gelu":
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        product = swiglu if self.activation == "swiglu" else geglu
        return self.down_proj(product(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """Attention and feed-forward, each added to the one residual tensor that enters and leaves."""

    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.c, self.layer = c, layer
        self.attention_norm = Norm(c.width, c.norm, c.norm_eps, c.bias)
        self.attention = Attention(c, layer)
        self.mlp_norm = Norm(c.width, c.norm, c.norm_eps, c.bias)
        self.mlp = FeedForward(c)

    def forward(self, x_BTC, positions_BT, rotary, cu_seqlens=None, dropout=None, cache=None):
        recompute = torch.is_grad_enabled() and cache is None and self.c.recompute
        if recompute == "full":
            return _recomputed(self._forward, x_BTC, positions_BT, rotary, cu_seqlens, dropout)
        return self._forward(x_BTC, positions_BT, rotary, cu_seqlens, dropout, cache, recompute == "selective")

    def _forward(self, x, positions_BT, rotary, cu_seqlens, dropout, cache=None, recompute_mlp=False):
        mlp = (lambda h: _recomputed(self.mlp, h)) if recompute_mlp else self.mlp
        if self.c.norm_position == "post":
            x = self.attention_norm(self._drop(self.attention(x, positions_BT, rotary, cu_seqlens, dropout, cache), dropout, 0), x)[0]
            return self.mlp_norm(self._drop(mlp(x), dropout, 1), x)[0]
        attended = self._drop(self.attention(self.attention_norm(x), positions_BT, rotary, cu_seqlens, dropout, cache), dropout, 0)
        normed, x = self.mlp_norm(attended, x)
        return x + self._drop(mlp(normed), dropout, 1)

    def _drop(self, branch, dropout, site):
        if dropout is None or not self.c.dropout:
            return branch
        return dropout_reference(branch, self.c.dropout, mix_seed(dropout.seed, self.layer, 2 + site), dropout.counters_BT)


def _recomputed(function, *arguments):
    # Dropout is counter-based, so there is no generator state to preserve.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class Head(nn.Module):
    """Final norm and output matrix; every objective reads per-token log-probabilities from here, and never [N, V] logits."""

    def __init__(self, c: ModelConfig, weight: nn.Parameter | None = None):
        super().__init__()
        self.c = c
        self.norm = Norm(c.width, c.norm, c.norm_eps, c.bias) if c.norm_position == "pre" else None
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
    where `embed` is None the input is a residual tensor instead of tokens. Built on the meta device by `meta_model`.
    """

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.embed_positions = nn.Embedding(c.context, c.width) if c.positions == "learned" else None
        self.blocks = nn.ModuleDict({str(layer): Block(c, layer) for layer in range(c.layers)})
        self.head = Head(c, self.embed.weight if c.tied else None)
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def rotary_tables(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin (at least length, D / 2) in fp32, made on first use; None without RoPE."""
        if self.c.positions != "rope":
            return None
        if self._rotary is None or len(self._rotary[0]) < length or self._rotary[0].device != device:
            frequencies, factor = rope_frequencies(self.c)
            angles = torch.arange(max(length, min(self.c.context, 4096)), dtype=torch.float64)[:, None] * frequencies
            self._rotary = tuple((t * factor).to(device, torch.float32) for t in (angles.cos(), angles.sin()))
        return self._rotary

    def forward(self, x, positions_BT, *, cu_seqlens=None, dropout: Dropout | None = None, cache: Cache | None = None, max_position: int = 0):
        """Hidden states (B, T, C), before the head's norm, of tokens (B, T) int64 at positions (B, T).

        cu_seqlens    offsets of packed documents (B is 1)
        dropout       given in training where the config has dropout; None switches it off
        cache         keys and values of earlier tokens; these ones are appended
        max_position  largest position plus one, where the host knows it; 0 takes the config's context
        """
        if self.embed is not None:
            x = F.embedding(x, self.embed.weight)
            if self.embed_positions is not None:
                x = x + F.embedding(positions_BT, self.embed_positions.weight)
            if dropout is not None and self.c.embedding_dropout:
                x = dropout_reference(x, self.c.embedding_dropout, mix_seed(dropout.seed, -1, 0), dropout.counters_BT)
        rotary = self.rotary_tables(max_position or self.c.context, x.device)
        for block in self.blocks.values():
            x = block(x, positions_BT, rotary, cu_seqlens, dropout, cache)
        if cache is not None:
            cache.length += x.shape[1]
        return x


def meta_model(c: ModelConfig) -> Transformer:
    """The model without storage, for counting, planning and loading; `c` must be resolved."""
    with torch.device("meta"):
        return Transformer(c)


def build_model(c: ModelConfig, *, seed: int, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """The model on `device` in `dtype` with initial weights, each a function of the seed and the parameter's name only.

    Matrices are normal with init_std, those that write to the residual stream (o_proj, down_proj) with
    init_std / sqrt(2 * layers); norm weights are 1, biases 0. Made one tensor at a time in fp32, never twice in memory.
    """
    model = meta_model(c)
    replaced: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in replaced:
                value = initial_value(f"{module_name}.{name}", parameter.shape, c, seed)
                replaced[id(parameter)] = nn.Parameter(value.to(device, dtype))
            setattr(module, name, replaced[id(parameter)])
    return model


def initial_value(name: str, shape: torch.Size, c: ModelConfig, seed: int) -> torch.Tensor:
    """The initial fp32 value of one parameter on the CPU."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = c.init_std / math.sqrt(2 * c.layers) if residual else c.init_std
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std


def parameter_count(c: ModelConfig) -> int:
    """Parameters of a resolved config, a tied matrix counted once."""
    return sum(p.numel() for p in meta_model(c).parameters())
