"""What the compile gate compiles and the bench kit measures: each public kernel with its workloads, its cost and its peers.

A case calls a public function as a training step does. The compile gate (benchmarks/compile_gate.py) calls it on tensors without storage,
the bench kit (benchmarks/kernels.py) on a GPU; both take gradients by autograd wherever an input asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from nanotrain.kernels import adafactor, dropout, gated, lookup, norm, optimizers, orthogonal, rotary, token_loss

from benchmarks import attention_cases
from benchmarks.cases import Case, eager, formula, normal

# Norms: rows of C channels. 1024 is a small model's width, 4096 a large one's; rows of over 8192 have kernels of their own, hence always=2.

_NORM_SHAPES = ((8192, 4096), (2048, 16384), (16384, 1024), (8192, 80), (4096, 8192), (1024, 65536))


def _norm_inputs(shape, dtype, device, *, residual=False, bias=False):
    rows, width = shape
    make = partial(normal, dtype=dtype, device=device, grad=True)
    inputs = {"x": make(rows, width), "weight": make(width)}
    return inputs | ({"bias": make(width)} if bias else {}) | ({"residual": make(rows, width)} if residual else {})


def _norm_cost(shape, dtype, *, passes, vectors, flops):
    rows, width = shape
    return (passes * rows * width + vectors * width) * dtype.itemsize, flops * rows * width


def _rms_norm(inputs, impl):
    return norm.rms_norm(inputs["x"], inputs["weight"], 1e-6, residual=inputs.get("residual"), impl=impl)


def _layer_norm(inputs, impl):
    return norm.layer_norm(inputs["x"], inputs["weight"], inputs["bias"], 1e-5, residual=inputs.get("residual"), impl=impl)


def _torch_rms_norm(inputs):
    if "residual" not in inputs:
        return F.rms_norm(inputs["x"], inputs["weight"].shape, inputs["weight"], 1e-6)
    total = inputs["x"] + inputs["residual"]
    return F.rms_norm(total, inputs["weight"].shape, inputs["weight"], 1e-6), total


def _torch_layer_norm(inputs):
    if "residual" not in inputs:
        return F.layer_norm(inputs["x"], inputs["weight"].shape, inputs["weight"], inputs["bias"], 1e-5)
    total = inputs["x"] + inputs["residual"]
    return F.layer_norm(total, inputs["weight"].shape, inputs["weight"], inputs["bias"], 1e-5), total


def _liger_rms_norm():
    from liger_kernel.ops import LigerRMSNormFunction

    return lambda i: LigerRMSNormFunction.apply(i["x"], i["weight"], 1e-6, 0.0, "llama", False)


def _liger_add_rms_norm():
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    return lambda i: LigerFusedAddRMSNormFunction.apply(i["x"], i["residual"], i["weight"], 1e-6, 0.0, "llama", False)


def _liger_layer_norm():
    from liger_kernel.ops import LigerLayerNormFunction

    return lambda i: LigerLayerNormFunction.apply(i["x"], i["weight"], i["bias"], 1e-5)


_LAYER_NORM_STACK = {
    ("_norm_forward_kernel", "sm_100"): 8, ("_norm_backward_kernel", "sm_90"): 24, ("_norm_backward_kernel", "sm_100"): 16,
}  # fmt: skip
"""In fp32 alone, and for rows of 8192 at their widest: a few numbers that a program reads once a row, where two sums for each of 16 columns a
thread fill its 128 registers."""

_NORMS = (
    Case(
        "rms_norm", "norm", _NORM_SHAPES, _norm_inputs, _rms_norm, norm.cost, partial(_norm_cost, passes=3, vectors=2, flops=11),
        always=2, peers=formula(_torch_rms_norm) | {"liger": _liger_rms_norm},
    ),
    Case(
        "rms_norm", "norm", _NORM_SHAPES, partial(_norm_inputs, residual=True), _rms_norm, partial(_norm_cost, passes=4, vectors=1, flops=5),
        partial(_norm_cost, passes=4, vectors=2, flops=12), "residual", always=2,
        peers=formula(_torch_rms_norm) | {"liger": _liger_add_rms_norm},
    ),
    Case(
        "layer_norm", "norm", _NORM_SHAPES, partial(_norm_inputs, bias=True), _layer_norm, partial(_norm_cost, passes=2, vectors=2, flops=8),
        partial(_norm_cost, passes=3, vectors=3, flops=14), peers=formula(_torch_layer_norm) | {"liger": _liger_layer_norm},
        stack=_LAYER_NORM_STACK, always=2,
    ),
    Case(
        "layer_norm", "norm", _NORM_SHAPES, partial(_norm_inputs, bias=True, residual=True), _layer_norm,
        partial(_norm_cost, passes=4, vectors=2, flops=9), partial(_norm_cost, passes=4, vectors=3, flops=15), "residual",
        always=2, peers=formula(_torch_layer_norm),
        stack=_LAYER_NORM_STACK,
    ),
)  # fmt: skip


# Gated activations: rows of F channels.

_GATED_SHAPES = ((8192, 14336), (8192, 4096), (4096, 2730), (512, 256))


def _gated_inputs(shape, dtype, device):
    return {name: normal(*shape, dtype=dtype, device=device, grad=True) for name in ("gate", "up")}


def _gated_backward_cost(shape, dtype):
    elements = shape[0] * shape[1]
    return 5 * elements * dtype.itemsize, 12 * elements


def _gated_call(inputs, impl, *, function):
    return function(inputs["gate"], inputs["up"], impl=impl)


def _liger_swiglu():
    from liger_kernel.ops import LigerSiLUMulFunction

    return lambda i: LigerSiLUMulFunction.apply(i["gate"], i["up"])


def _liger_geglu():
    from liger_kernel.ops import LigerGELUMulFunction

    return lambda i: LigerGELUMulFunction.apply(i["gate"], i["up"])


_GATED = (
    Case(
        "swiglu", "gated", _GATED_SHAPES, _gated_inputs, partial(_gated_call, function=gated.swiglu), gated.cost, _gated_backward_cost,
        peers=formula(lambda i: F.silu(i["gate"]) * i["up"]) | {"liger": _liger_swiglu},
    ),
    Case(
        "geglu", "gated", _GATED_SHAPES, _gated_inputs, partial(_gated_call, function=gated.geglu), gated.cost, _gated_backward_cost,
        peers=formula(lambda i: F.gelu(i["gate"], approximate="tanh") * i["up"]) | {"liger": _liger_geglu},
    ),
)  # fmt: skip


# Rotary embedding: (B, T, H, K, D) as in kernels/rotary.py. Llama-3 8B, a small model, and heads of 80 and 256 channels.

_ROPE_SHAPES = ((4, 4096, 32, 8, 128), (16, 1024, 12, 12, 64), (4, 2048, 32, 32, 80), (4, 2048, 16, 4, 256))


def _rope_inputs(shape, dtype, device, *, rotary_share=1.0, grad=True, weights=False):
    B, T, H, K, D = shape
    make = partial(normal, dtype=dtype, device=device, grad=grad)
    half = int(D * rotary_share) // 2
    angles = torch.arange(T, device=device)[:, None] * 10000 ** (-torch.arange(half, device=device) / half)
    inputs = {"q": make(B, T, H, D), "k": make(B, T, K, D)} | ({"q_weight": make(D), "k_weight": make(D)} if weights else {})
    return inputs | {"cos": angles.cos(), "sin": angles.sin(), "positions": torch.arange(T, device=device).repeat(B, 1)}


def _rope(inputs, impl, *, inplace=False):
    i = inputs
    return rotary.rope(i["q"], i["k"], i["cos"], i["sin"], positions=i["positions"], inplace=inplace, impl=impl)


def _qk_norm_rope(inputs, impl):
    i = inputs
    return rotary.qk_norm_rope(i["q"], i["k"], i["q_weight"], i["k_weight"], i["cos"], i["sin"], positions=i["positions"], impl=impl)


def _qk_norm_rope_backward_cost(shape, dtype):
    B, T, H, K, D = shape
    elements = B * T * (H + K) * D
    return 3 * elements * dtype.itemsize, 13 * elements


def _torch_rope(inputs):
    cos, sin = (inputs[name][inputs["positions"]][:, :, None] for name in ("cos", "sin"))
    half, outs = cos.shape[-1], []
    for x in (inputs["q"], inputs["k"]):
        a, b, rest = x.float().split((half, half, x.shape[-1] - 2 * half), -1)
        outs.append(torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).to(x.dtype))
    return tuple(outs)


def _torch_qk_norm_rope(inputs):
    normed = {name: F.rms_norm(inputs[name], inputs[name].shape[-1:], inputs[f"{name}_weight"], 1e-6) for name in ("q", "k")}
    return _torch_rope(inputs | normed)


def _separate_kernels():
    """Our kernels one after another, which the fused one replaces."""

    def separate(inputs):
        normed = {name: norm.rms_norm(inputs[name], inputs[f"{name}_weight"], 1e-6, impl="triton") for name in ("q", "k")}
        return _rope(inputs | normed, "triton")

    return separate


def _liger_rope():
    from liger_kernel.ops import LigerRopeFunction

    def rope(i):
        if 2 * i["cos"].shape[-1] != i["q"].shape[-1]:
            raise ValueError("liger rotates whole heads")
        cos, sin = (i[name].repeat(1, 2)[None].to(i["q"].dtype) for name in ("cos", "sin"))
        q, k = LigerRopeFunction.apply(i["q"].transpose(1, 2), i["k"].transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return rope


_ROTARY = (
    Case(
        "rope", "rotary", _ROPE_SHAPES, _rope_inputs, _rope, rotary.cost, rotary.cost, peers=formula(_torch_rope) | {"liger": _liger_rope},
    ),
    Case(
        "rope", "rotary", _ROPE_SHAPES[:1], partial(_rope_inputs, grad=False), partial(_rope, inplace=True), rotary.cost, variant="in place",
        peers=formula(_torch_rope) | {"liger": _liger_rope},
    ),
    Case(
        "rope", "rotary", _ROPE_SHAPES[:1], partial(_rope_inputs, rotary_share=0.25), _rope, rotary.cost, rotary.cost, "quarter",
        peers=formula(_torch_rope),
    ),
    Case(
        "qk_norm_rope", "rotary", _ROPE_SHAPES, partial(_rope_inputs, weights=True), _qk_norm_rope, rotary.cost, _qk_norm_rope_backward_cost,
        peers=formula(_torch_qk_norm_rope) | {"separate": _separate_kernels},
    ),
)  # fmt: skip


# Dropout with the residual addition: rows of C channels. PyTorch's own draws other numbers, so it has no peer with the same results.

_DROPOUT_SHAPES = ((8192, 4096), (16384, 768), (8192, 80))


def _dropout_inputs(shape, dtype, device, *, seed_in_memory=False):
    rows, width = shape
    inputs = {name: normal(rows, width, dtype=dtype, device=device, grad=True) for name in ("x", "residual")}
    seed = torch.full((), 1234, device=device) if seed_in_memory else 1234
    return inputs | {"seed": seed, "counters": torch.arange(rows, device=device)}


def _dropout_add(inputs, impl):
    return dropout.dropout_add(inputs["x"], inputs["residual"], 0.1, inputs["seed"], inputs["counters"], impl=impl)


def _dropout_backward_cost(shape, dtype):
    rows, width = shape
    return 2 * rows * width * dtype.itemsize + 8 * rows, rows * width


_DROPOUT = (
    Case("dropout_add", "dropout", _DROPOUT_SHAPES, _dropout_inputs, _dropout_add, dropout.cost, _dropout_backward_cost),
    Case(
        "dropout_add", "dropout", _DROPOUT_SHAPES[:1], partial(_dropout_inputs, seed_in_memory=True), _dropout_add, dropout.cost,
        _dropout_backward_cost, "seed on the device",
    ),
)  # fmt: skip


# Embedding: (tokens N, vocabulary V, C). Llama-3.2 1B, GPT-2, and a narrow table. A few tokens are most of a text: the cube of a uniform number.


def _embedding_inputs(shape, dtype, device):
    tokens, vocabulary, width = shape
    chosen = (vocabulary * torch.rand(tokens, device=device, dtype=torch.float64) ** 3).long()
    return {"tokens": chosen, "weight": normal(vocabulary, width, dtype=dtype, device=device, grad=True)}


@cache
def _distinct(tokens: int, vocabulary: int) -> int:
    """How many different ones so many tokens, drawn like these, are expected to be."""
    shares = (torch.linspace(0, 1, vocabulary + 1, dtype=torch.float64) ** (1 / 3)).diff()
    return round((1 - (1 - shares) ** tokens).sum().item())


def _embedding_forward_cost(shape, dtype):
    """Each row of the table that occurs is read once, and is in the cache when it occurs again."""
    tokens, vocabulary, width = shape
    return (_distinct(tokens, vocabulary) + tokens) * width * dtype.itemsize + 8 * tokens, 0


def _liger_embedding():
    from liger_kernel.ops import LigerEmbeddingFunction

    return lambda i: LigerEmbeddingFunction.apply(i["weight"], i["tokens"])


_EMBEDDING = (
    Case(
        "embedding", "lookup", ((16384, 128256, 2048), (65536, 50304, 768), (8192, 1000, 80)), _embedding_inputs,
        lambda i, impl: lookup.embedding(i["tokens"], i["weight"], impl=impl), _embedding_forward_cost, lookup.cost,
        peers=formula(lambda i: F.embedding(i["tokens"], i["weight"])) | {"liger": _liger_embedding},
    ),
)  # fmt: skip


# Optimizers: (n, rows, columns) is n matrices and n vectors of as many columns. 113M parameters in large matrices, 28M in GPT-2's, many small
# tensors, and sizes that nothing divides. In bf16 and fp16 they have fp32 masters, unless they are rounded stochastically.

_OPTIMIZER_SHAPES = ((12, 2304, 4096), (48, 768, 768), (300, 64, 64), (9, 333, 777))

_LR, _BETAS, _LION_BETAS, _EPS, _DECAY, _STEP = 1e-3, (0.9, 0.95), (0.9, 0.99), 1e-8, 0.1, 10


def _optimizer_inputs(shape, dtype, device, *, moments=(), factored=False, stochastic=False):
    count, rows, columns = shape
    shapes = [(rows, columns)] * count + [(columns,)] * count
    make = partial(normal, dtype=dtype, device=device)
    inputs = {name: [make(*s) for s in shapes] for name in ("params", "grads")}
    kept = partial(normal, dtype=torch.bfloat16 if stochastic and not factored else torch.float32, device=device)
    inputs |= {name: [kept(*s) for s in shapes] for name in moments}
    if factored:
        matrices, vectors = [None] * count, [None] * count
        inputs["row_vars"] = [kept(rows, 1) for _ in matrices] + vectors
        inputs["col_vars"] = [kept(1, columns) for _ in matrices] + vectors
        inputs["variances"] = matrices + [kept(columns) for _ in vectors]
    for name in ("exp_avg_sqs", "row_vars", "col_vars", "variances"):
        for square in inputs.get(name, ()):
            if square is not None:
                square.square_()
    masters = None if stochastic or dtype == torch.float32 else [p.float() for p in inputs["params"]]
    sizes = [rows * columns] * count + [columns] * count
    starts = [sum(sizes[:number]) for number in range(len(sizes))] if stochastic else None
    scalars = {name: torch.full((), value, device=device) for name, value in (("lr", _LR), ("step", float(_STEP)), ("grad_scale", 1.0))}
    return inputs | scalars | {
        "found_nonfinite": torch.zeros((), dtype=torch.bool, device=device), "masters": masters, "seed": 1234 if stochastic else None,
        "counter_starts": starts,
    }  # fmt: skip


def _adamw(inputs, impl):
    optimizers.adamw_(**inputs, betas=_BETAS, eps=_EPS, weight_decay=_DECAY, impl=impl)


def _lion(inputs, impl):
    inputs = {name: value for name, value in inputs.items() if name != "step"}
    optimizers.lion_(**inputs, betas=_LION_BETAS, weight_decay=_DECAY, impl=impl)


def _adafactor(inputs, impl):
    adafactor.adafactor_(**inputs, weight_decay=_DECAY, impl=impl)


def _adafactor_cost(shape, dtype, *, stochastic=False):
    """Gradients three times, weights twice and out, and parameters too where the weights are their masters; see kernels/adafactor.py."""
    count, rows, columns = shape
    elements = count * (rows + 1) * columns
    masters = not stochastic and dtype != torch.float32
    weight = 4 if masters else dtype.itemsize
    return (3 * dtype.itemsize + 3 * weight + masters * dtype.itemsize) * elements, 16 * elements


def _optimizer_cost(shape, dtype, *, moments, flops, stochastic=False):
    """Gradients and weights in, moments in and out, weights out, and parameters too where the weights are their masters."""
    count, rows, columns = shape
    elements = count * (rows + 1) * columns
    if stochastic:
        return (3 * dtype.itemsize + 4 * moments) * elements, flops * elements
    narrow = 0 if dtype == torch.float32 else dtype.itemsize
    return (dtype.itemsize + 8 + 8 * moments + narrow) * elements, flops * elements


def _weights(i):
    """What a peer updates: the masters with fp32 gradients, where there are any."""
    return (i["params"], i["grads"]) if i["masters"] is None else (i["masters"], [g.float() for g in i["grads"]])


def _torch_adamw(i):
    weights, grads = _weights(i)
    steps = [i["step"]] * len(weights)
    torch._fused_adamw_(
        weights, grads, i["exp_avgs"], i["exp_avg_sqs"], [], steps, lr=_LR, beta1=_BETAS[0], beta2=_BETAS[1], weight_decay=_DECAY, eps=_EPS,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    if weights is not i["params"]:
        torch._foreach_copy_(i["params"], weights)


def _torch_lion(i):
    weights, grads = _weights(i)
    signs = torch._foreach_sign(torch._foreach_lerp(i["exp_avgs"], grads, 1 - _LION_BETAS[0]))
    torch._foreach_mul_(weights, 1 - _LR * _DECAY)
    torch._foreach_add_(weights, signs, alpha=-_LR)
    torch._foreach_lerp_(i["exp_avgs"], grads, 1 - _LION_BETAS[1])
    if weights is not i["params"]:
        torch._foreach_copy_(i["params"], weights)


def _torch_adafactor():
    from torch.optim._adafactor import adafactor as theirs

    def step(i):
        weights, grads = _weights(i)
        steps = list(torch.full((len(weights),), _STEP - 1.0).unbind())
        theirs(
            weights, grads, i["row_vars"], i["col_vars"], i["variances"], steps, foreach=True, d=1.0, lr=_LR, beta2_decay=-0.8,
            weight_decay=_DECAY, eps1=None, eps2=1e-3, maximize=False,
        )  # fmt: skip
        if weights is not i["params"]:
            torch._foreach_copy_(i["params"], weights)

    return step


def _gradients(shape, dtype, device):
    count, rows, columns = shape
    make = partial(normal, dtype=dtype, device=device)
    return {"grads": [make(rows, columns) for _ in range(count)] + [make(columns) for _ in range(count)]}


def _norm_of_gradients_cost(shape, dtype):
    count, rows, columns = shape
    elements = count * (rows + 1) * columns
    return dtype.itemsize * elements, 2 * elements


_ADAMW_MOMENTS, _LION_MOMENTS = ("exp_avgs", "exp_avg_sqs"), ("exp_avgs",)

_OPTIMIZERS = (
    Case(
        "adamw_", "optimizers", _OPTIMIZER_SHAPES, partial(_optimizer_inputs, moments=_ADAMW_MOMENTS), _adamw,
        partial(_optimizer_cost, moments=2, flops=15), in_place=True, peers={"torch": eager(_torch_adamw)},
    ),
    Case(
        "adamw_", "optimizers", _OPTIMIZER_SHAPES[:1], partial(_optimizer_inputs, moments=_ADAMW_MOMENTS, stochastic=True), _adamw,
        partial(_optimizer_cost, moments=2, flops=15, stochastic=True), variant="stochastic", dtypes=(torch.bfloat16,), in_place=True,
    ),
    Case(
        "lion_", "optimizers", _OPTIMIZER_SHAPES, partial(_optimizer_inputs, moments=_LION_MOMENTS), _lion,
        partial(_optimizer_cost, moments=1, flops=9), in_place=True, peers={"torch": eager(_torch_lion)},
    ),
    Case(
        "lion_", "optimizers", _OPTIMIZER_SHAPES[:1], partial(_optimizer_inputs, moments=_LION_MOMENTS, stochastic=True), _lion,
        partial(_optimizer_cost, moments=1, flops=9, stochastic=True), variant="stochastic", dtypes=(torch.bfloat16,), in_place=True,
    ),
    Case(
        "adafactor_", "adafactor", _OPTIMIZER_SHAPES, partial(_optimizer_inputs, factored=True), _adafactor, _adafactor_cost, in_place=True,
        peers={"torch": _torch_adafactor},
    ),
    Case(
        "adafactor_", "adafactor", _OPTIMIZER_SHAPES[:1], partial(_optimizer_inputs, factored=True, stochastic=True), _adafactor,
        partial(_adafactor_cost, stochastic=True), variant="stochastic", dtypes=(torch.bfloat16,), in_place=True,
    ),
    Case(
        "grad_norm_", "optimizers", _OPTIMIZER_SHAPES, _gradients, lambda i, impl: optimizers.grad_norm_(i["grads"], impl=impl),
        _norm_of_gradients_cost, peers={"torch": lambda: lambda i: torch.nn.utils.get_total_norm(i["grads"], foreach=True)},
    ),
)  # fmt: skip


# Muon's orthogonalisation: (n, rows, columns) as in kernels/orthogonal.py. Computed in bf16 whatever the input's dtype. The first shape has
# tiles enough for the large ones, the second has not. torch.optim.Muon takes as many steps of a polynomial with other coefficients, matrix by
# matrix.


def _orthogonal_product(kernel, dtype, target):
    return {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}[target]


def _torch_muon():
    from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS
    from torch.optim._muon import _zeropower_via_newtonschulz as theirs

    return lambda i: tuple(theirs(matrix, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS) for matrix in i["matrices"])


_ORTHOGONAL = (
    Case(
        "orthogonalize", "orthogonal", ((12, 1024, 4096), (2, 768, 3072), (8, 2048, 2048), (12, 768, 768)),
        lambda shape, dtype, device: {"matrices": normal(*shape, dtype=dtype, device=device)},
        lambda i, impl: orthogonal.orthogonalize(i["matrices"], impl=impl), orthogonal.cost, dtypes=(torch.bfloat16, torch.float32),
        peers=formula(lambda i: orthogonal.orthogonalize_reference(i["matrices"])) | {"torch.optim": _torch_muon}, product=_orthogonal_product,
        unlike=("torch.optim",),
    ),
)  # fmt: skip


# The head: (N, V) logits, or (N, C, V) of Qwen3 8B and of GPT-2, whose vocabulary is no multiple of anything. Every 16th token is ignored.

_LOGITS_SHAPES = ((4096, 151936), (8192, 32768), (8192, 50257))
_HEAD_SHAPES = ((8192, 4096, 151936), (16384, 768, 50257))
_LIKELY = 64


def _labels(rows, vocabulary, device):
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    labels[::16] = -100
    return labels


def _logits(shape, dtype, device):
    return {"logits": normal(*shape, dtype=dtype, device=device, grad=True), "labels": _labels(*shape, device)}


def _head_inputs(shape, dtype, device, *, weighted=False, likely=False):
    rows, width, vocabulary = shape
    make = partial(normal, dtype=dtype, device=device)
    inputs = {"hidden": make(rows, width).requires_grad_(), "weight": make(vocabulary, width).mul_(width**-0.5).requires_grad_()}
    if likely:
        return inputs | {"tokens": torch.randint(0, vocabulary, (rows, _LIKELY), device=device)}
    inputs["labels"] = _labels(rows, vocabulary, device)
    # A tensor of one number, which a case's float64 copy of the inputs makes wide.
    return inputs | ({"token_weight": torch.full((rows,), 1 / (rows - -(-rows // 16)), device=device)} if weighted else {})


def _logits_cost(shape, dtype, *, passes, flops):
    return passes * shape[0] * shape[1] * dtype.itemsize, flops * shape[0] * shape[1]


def _head_cost(shape, dtype, *, products, passes):
    """`products` of all of hidden, weight and logits; hidden and the weight, and their gradients, `passes` times."""
    rows, width, vocabulary = shape
    return passes * (rows + vocabulary) * width * dtype.itemsize, products * 2 * rows * width * vocabulary


def _linear_cross_entropy(inputs, impl):
    i = inputs
    return token_loss.linear_cross_entropy(i["hidden"], i["weight"], i["labels"], token_weight_N=i.get("token_weight"), impl=impl)[0]


def _torch_linear_cross_entropy(i):
    loss = F.cross_entropy((i["hidden"] @ i["weight"].T).float(), i["labels"], reduction="none")
    return (loss * i["token_weight"]).sum() if "token_weight" in i else loss


def _torch_chunks():
    """torch's own that chunks, since 2.13; of a mean alone."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy as theirs

    return lambda i: theirs(i["hidden"], i["weight"], i["labels"], options=LinearCrossEntropyOptions())


def _liger_cross_entropy():
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda i: liger_cross_entropy(i["logits"], i["labels"], reduction="none")


def _liger_linear_cross_entropy(reduction):
    def load():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as theirs

        return lambda i: theirs(i["hidden"], i["weight"], i["labels"], reduction=reduction)

    return load


class _Products(torch.autograd.Function):
    """The products alone of a head that holds its logits, and nothing between them: what no head can be faster than."""

    @staticmethod
    def forward(ctx, hidden, weight, early):
        z = hidden @ weight.T
        ctx.early = early
        ctx.save_for_backward(*((z @ weight, z.T @ hidden) if early else (hidden, weight, z)))
        return hidden.new_zeros((), dtype=torch.float32) if early else hidden.new_zeros(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        if ctx.early:
            return *ctx.saved_tensors, None
        hidden, weight, z = ctx.saved_tensors
        z = hidden @ weight.T
        return z @ weight, z.T @ hidden, None


def _products(*, early):
    return lambda: lambda i: _Products.apply(i["hidden"], i["weight"], early)


def _token_logprobs(inputs, impl):
    return token_loss.token_logprobs(inputs["hidden"], inputs["weight"], inputs["tokens"], impl=impl)


_BOTH = (torch.bfloat16, torch.float32)

_HEAD = (
    Case(
        "cross_entropy", "token_loss", _LOGITS_SHAPES, _logits, lambda i, impl: token_loss.cross_entropy(i["logits"], i["labels"], impl=impl),
        partial(_logits_cost, passes=1, flops=5), partial(_logits_cost, passes=2, flops=4),
        peers=formula(lambda i: F.cross_entropy(i["logits"].float(), i["labels"], reduction="none")),
    ),
    Case(
        "cross_entropy", "token_loss", _LOGITS_SHAPES, _logits,
        lambda i, impl: token_loss.cross_entropy(i["logits"], i["labels"], inplace=impl == "triton", impl=impl),
        partial(_logits_cost, passes=1, flops=5), partial(_logits_cost, passes=2, flops=4), "in place", peers={"liger": _liger_cross_entropy},
    ),
    Case(
        "linear_cross_entropy", "token_loss", _HEAD_SHAPES, _head_inputs, _linear_cross_entropy, partial(_head_cost, products=1, passes=1),
        partial(_head_cost, products=3, passes=2), dtypes=_BOTH, unlike=("products",),
        peers=formula(_torch_linear_cross_entropy) | {"liger": _liger_linear_cross_entropy("none"), "products": _products(early=False)},
    ),
    Case(
        "linear_cross_entropy", "token_loss", _HEAD_SHAPES, partial(_head_inputs, weighted=True), _linear_cross_entropy,
        partial(_head_cost, products=3, passes=2), partial(_head_cost, products=0, passes=2), "mean", dtypes=_BOTH, unlike=("products",),
        peers=formula(_torch_linear_cross_entropy)
        | {"torch.chunks": _torch_chunks, "liger": _liger_linear_cross_entropy("mean"), "products": _products(early=True)},
    ),
    Case(
        "token_logprobs", "token_loss", ((4096, 2048, 151936),), partial(_head_inputs, likely=True), _token_logprobs,
        partial(_head_cost, products=1, passes=1), partial(_head_cost, products=3, passes=2), dtypes=_BOTH,
        peers=formula(lambda i: torch.log_softmax((i["hidden"] @ i["weight"].T).float(), 1).gather(1, i["tokens"])),
    ),
)  # fmt: skip


CASES: tuple[Case, ...] = (*_NORMS, *_ROTARY, *_GATED, *_DROPOUT, *_EMBEDDING, *_HEAD, *_OPTIMIZERS, *_ORTHOGONAL, *attention_cases.CASES)


def select(names: Sequence[str] = ()) -> list[Case]:
    """The cases of these functions, or all; ValueError for a name that has none."""
    known = list(dict.fromkeys(case.name for case in CASES))
    for name in names:
        if name not in known:
            raise ValueError(f"no kernel is named {name}; there are {', '.join(known)}")
    return [case for case in CASES if not names or case.name in names]
