"""A decode step of a plain model on a CPU by csrc/decode.cpp: one call instead of hundreds of operators.

It serves what it can compute exactly as the modules would: a whole `Transformer` of plain layers, all weights bf16 or fp32 on the CPU.
Anything else (a shard, an adapter, quantised weights, a hook, a replaced attention) is left to the modules. Weights are read where they
lie, and no token's result depends, to the bit, on what else is in the batch.

Legend: B rows, T new tokens of a row, V vocabulary.
"""

from __future__ import annotations

import ctypes
import math
import time
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int64, c_void_p
from functools import lru_cache
from itertools import chain

import torch
from torch import nn

from nanotrain.kernels import native
from nanotrain.model.build import meta_model
from nanotrain.model.cache import Decode
from nanotrain.model.linear import Linear
from nanotrain.model.positions import alibi_slopes
from nanotrain.model.sampling import SamplingConfig
from nanotrain.model.transformer import ModelConfig, Norm, Transformer


class _Weights(Structure):
    """A norm or a linear layer."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class _Layer(Structure):
    _fields_ = [
        *((f"{name}_norm", _Weights) for name in ("attention", "attention_post", "mlp", "mlp_post", "q", "k")),
        *((name, _Weights) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("window", c_int64),
    ]


class _Model(Structure):
    _fields_ = [
        ("layers", POINTER(_Layer)),
        *((name, c_void_p) for name in ("embed", "embed_positions", "head")),
        ("head_norm", _Weights),
        *((name, c_void_p) for name in ("cos", "sin", "slopes")),
        *((name, c_int64) for name in ("depth", "V", "C", "H", "K", "D", "F", "positions")),
        *((name, c_int64) for name in ("layer_norm", "post", "gelu", "gated", "bfloat16", "tiles")),
        *((name, c_float) for name in ("eps", "offset", "scale", "softcap", "logit_softcap", "embedding_scale")),
    ]


class _Choice(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("uniforms", "tokens", "logprobs")),
        *((name, c_double) for name in ("temperature", "top_p", "min_p")),
        ("top_k", c_int64),
    ]


class _Step(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("tokens", "rows", "places", "keys", "values", "cells", "logits")),
        ("choice", POINTER(_Choice)),
        ("scratch", c_void_p),
        *((name, c_int64) for name in ("N", "longest", "threads")),
    ]


def decoder(model: Transformer) -> NativeDecoder | None:
    """A decoder of the model as it is now, or None where the modules must serve."""
    if torch.is_autocast_enabled("cpu") or not plain(model) or (library := native.library("decode")) is None:
        return None
    return NativeDecoder(model, library)


def plain(model: nn.Module) -> bool:
    """Whether a model is what `build_model` makes of its config, on the CPU in bf16 or fp32, with nothing put in, on or around any part."""
    if type(model) is not Transformer or model.head is None or model.head.weight.dtype not in (torch.bfloat16, torch.float32):
        return False
    dtype = model.head.weight.dtype
    modules, shapes = _described(model.c)
    return (
        {name: _description(module) for name, module in model.named_modules()} == modules
        and {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)} == shapes
        and all(type(p) is nn.Parameter and p.is_contiguous() and p.device.type == "cpu" and p.dtype == dtype for p in model.parameters())
    )  # fmt: skip


@lru_cache(maxsize=4)
def _described(c: ModelConfig) -> tuple[dict, dict]:
    """Modules and shapes of parameters by name, as the config makes them."""
    model = meta_model(c)
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: _description(module) for name, module in model.named_modules()}, shapes


def _description(module: nn.Module) -> tuple:
    """A module's class, public attributes (those of its instance alone, a replaced `forward` among them) and hooks."""
    held = vars(module)
    attributes = {key: held[key] for key in held if not key.startswith("_") and key not in ("training", "deferred")}
    return type(module), attributes, [key for key in ("_forward_hooks", "_forward_pre_hooks") if held[key]]


class _Team:
    """How many threads take a step: all, but one alone for a while after they had to wait for each other, as on a busy machine they do:
    for whole time slices. No result depends on it."""

    def __init__(self):
        self._alone, self._left, self._rest, self._together = math.inf, _FEW, _FEW, 0

    def threads(self) -> int:
        """Of the next step."""
        return 1 if self._left else torch.get_num_threads()

    def took(self, seconds: float) -> None:
        """Note how long it took."""
        if self._left:
            self._left -= 1
            self._alone = min(1.1 * self._alone, seconds)
            return
        self._together += 1
        if seconds > 3 * self._alone:
            self._rest = min(2 * self._rest, _MANY)
            self._left = self._rest
        elif self._together % _FEW == 0:
            self._rest = max(_FEW, self._rest - 1)
            self._left = int(self._together % _MANY == 0)  # what one thread takes is measured now and then


_FEW, _MANY = 4, 512
"""Steps that one thread takes alone after a first wait, and at most after many; the second also how often it takes one to be measured."""


class NativeDecoder:
    """Decode steps of a model, for one thread at a time.

    It holds the parameters that the model had when it was made. They may change, in place or by new storage; modules or parameters put in
    their places later are not seen.
    """

    def __init__(self, model: Transformer, library: ctypes.CDLL):
        c = model.c
        self.model, self._library, self._dtype = model, library, model.head.weight.dtype
        self._layers = (_Layer * c.layers)()
        self._windows = [block.attention.options["window"] for block in model.blocks.values()]
        self._template = torch.empty(0, 0, c.kv_heads, c.head_dim, dtype=self._dtype)
        self._slopes = alibi_slopes(c.heads) if c.positions == "alibi" else None
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._model = m = _Model(
            layers=self._layers, depth=c.layers, V=c.vocab_size, C=c.width, H=c.heads, K=c.kv_heads, D=c.head_dim, F=c.ffn_width,
            positions=2**62 if model.embed_positions is None else c.context, layer_norm=c.norm == "layer", post=c.norm_position == "post",
            gelu=c.activation != "swiglu", gated=c.activation != "gelu", bfloat16=self._dtype == torch.bfloat16,
            tiles=self._dtype == torch.bfloat16 and library.decode_tiles(), eps=c.norm_eps, offset=c.norm_offset,
            scale=c.attention_scale or c.head_dim**-0.5, softcap=c.attention_softcap, logit_softcap=c.logit_softcap, embedding_scale=1.0,
            slopes=None if self._slopes is None else self._slopes.data_ptr(),
        )  # fmt: skip
        if c.scale_embedding:
            m.embedding_scale = float(torch.tensor(math.sqrt(c.width), dtype=self._dtype))
        library.decode_scratch.restype, library.decode_scratch.argtypes = c_int64, [c_void_p, c_int64, c_int64, c_int64]
        library.decode_step.restype = c_int64
        self._step, self._team, self._room = _Step(), _Team(), (0, 0, 0)
        self._addresses: list[int] = []
        self._parameters: list[torch.Tensor] = []
        self._gather()

    def step(self, step: Decode, tokens_BT: torch.Tensor, max_position: int) -> torch.Tensor:
        """Logits (B, T, V) in fp32 of `tokens_BT` (int64), whose keys and values are stored in the step's cache.

        max_position  largest position plus one that RoPE's tables must reach; tokens beyond those, or beyond learned positions, get the last
                      position's: only proposals that are dropped lie there
        """
        tokens_BT = tokens_BT.contiguous()
        logits_BTV = torch.empty(*tokens_BT.shape, self._model.V)
        self._run(step, tokens_BT.shape[1], tokens_BT.data_ptr(), logits_BTV, max_position)
        return logits_BTV

    def draw(self, step: Decode, tokens: list[int], max_position: int, c: SamplingConfig, uniforms: list[float]) -> tuple[list[int], list[float]]:
        """The next token of every row after its last one in `tokens` (B,), and its log-probability by the model itself [nats].

        Sampled as `sampling.distribution` and `sampling.draw` would at `uniforms` (B,) in [0, 1), which greedy settings do not read. A
        repetition penalty is not served: ValueError.
        """
        if c.repetition_penalty != 1.0:
            raise ValueError(f"native decode: --sampling.repetition_penalty {c.repetition_penalty} is not served; take the logits of `step`")
        B = len(tokens)
        given, uniform, chosen, logprobs = (c_int64 * B)(*tokens), (c_double * B)(*uniforms), (c_int64 * B)(), (c_double * B)()
        choice = _Choice(*map(ctypes.addressof, (uniform, chosen, logprobs)), c.temperature, c.top_p, c.min_p, c.top_k)
        self._run(step, 1, ctypes.addressof(given), torch.empty(B, self._model.V), max_position, choice)
        return chosen[:], logprobs[:]

    def _run(self, step: Decode, T: int, tokens: int, logits: torch.Tensor, max_position: int, choice: _Choice | None = None) -> None:
        """One call: tokens (B * T,) int64 at an address; `logits` is filled."""
        if [p.data_ptr() for p in self._parameters] != self._addresses:
            if not plain(self.model) or self.model.head.weight.dtype != self._dtype:
                raise ValueError("generate: the model was moved or rebuilt between two tokens; generate anew")
            self._gather()
        tables = self.model.rotary_tables(max_position, self._template.device)
        if tables is not self._tables:
            self._tables, self._model.positions = tables, len(tables[0])
            self._model.cos, self._model.sin = tables[0].data_ptr(), tables[1].data_ptr()
        starts, s = step.starts, self._step
        layers = [step.cache.layer(number, self._template, self._template, window) for number, window in enumerate(self._windows)]
        for held in chain.from_iterable(layers):
            if held.dtype != self._dtype or held.shape[2:] != self._template.shape[2:] or not held.is_contiguous():
                raise ValueError(f"native decode: the cache holds {tuple(held.shape)} in {held.dtype}, not this model's heads in {self._dtype}")
        rows, places = range(len(starts)), starts
        if T > 1:
            rows, places = [row for row in rows for _ in range(T)], [start + t for start in starts for t in range(T)]
        N, L = len(places), len(layers)
        numbers = (c_int64 * (2 * N + 3 * L))(
            *rows, *places, *(k.data_ptr() for k, _ in layers), *(v.data_ptr() for _, v in layers), *(k.shape[1] for k, _ in layers)
        )
        s.rows = at = ctypes.addressof(numbers)
        s.places, s.keys, s.values, s.cells = at + 8 * N, at + 16 * N, at + 8 * (2 * N + L), at + 16 * (N + L)
        s.N, s.longest, s.threads = N, max(starts) + T, self._team.threads()
        if self._room[0] < s.N or s.longest > self._room[1] or s.threads > self._room[2]:
            self._room = N, 2 * s.longest, max(s.threads, torch.get_num_threads())
            self._scratch = torch.empty(self._library.decode_scratch(byref(self._model), *self._room), dtype=torch.uint8)
        s.tokens, s.scratch, s.logits = tokens, self._scratch.data_ptr(), logits.data_ptr()
        s.choice = None if choice is None else ctypes.pointer(choice)
        started = time.perf_counter()
        stray = self._library.decode_step(byref(self._model), byref(s))
        if stray >= 0:
            raise ValueError(f"native decode: token number {stray} of {N} is not one of the model's {self._model.V}")
        self._team.took(time.perf_counter() - started)

    def _gather(self) -> None:
        """Note where each parameter lies."""
        model, m = self.model, self._model
        self._parameters = []

        def lies(tensor: torch.Tensor | None) -> int | None:
            if tensor is None:
                return None
            self._parameters.append(tensor)
            return tensor.data_ptr()

        def both(module: Norm | Linear | None) -> _Weights:
            return _Weights() if module is None else _Weights(lies(module.weight), lies(module.bias))

        m.embed, m.head, m.head_norm = lies(model.embed.weight), lies(model.head.weight), both(model.head.norm)
        m.embed_positions = None if model.embed_positions is None else lies(model.embed_positions.weight)
        for layer, block, window in zip(self._layers, model.blocks.values(), self._windows, strict=True):
            for holder, names in ((block, ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")),
                                  (block.attention, ("q_norm", "k_norm", "q_proj", "k_proj", "v_proj", "o_proj")),
                                  (block.mlp, ("gate_proj", "up_proj", "down_proj"))):  # fmt: skip
                for name in names:
                    setattr(layer, name.removesuffix("_proj"), both(getattr(holder, name)))
            layer.window = window or 0
        self._addresses = [p.data_ptr() for p in self._parameters]
