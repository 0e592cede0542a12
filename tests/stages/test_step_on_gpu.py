"""What a training step does on a GPU, shown without one: on tensors that have no storage, taken for a GPU's.

Nothing can be read from such a tensor, so a step that waits for a value fails; what would be copied between host and device is refused here.
"""

from __future__ import annotations

import importlib
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import pytest
import torch
from nanotrain.kernels import runtime
from torch.utils._python_dispatch import TorchDispatchMode

from nanotrain.data.loader import Batch
from nanotrain.model.build import meta_model
from nanotrain.model.transformer import ModelConfig
from nanotrain.optim import OptimConfig, Optimizer
from nanotrain.stages.pretrain import step

KERNELS = ("norm", "rotary", "gated", "dropout", "lookup", "optimizers", "multi_tensor", "adafactor", "orthogonal")


class NoTransfers(TorchDispatchMode):
    """Refuses operators that move data between the host and the device, or wait for its values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        waits = name in ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "unique2", "_unique2")
        devices = {t.device.type for t in (*args, out) if isinstance(t, torch.Tensor) and (t.dim() or name in ("_to_copy", "copy_"))}
        moves = name in ("_to_copy", "copy_") and len(devices) > 1 and not (kwargs or {}).get("non_blocking")
        assert not waits and not moves, f"{name} makes the host wait"
        return out


def launched(model: ModelConfig, optim: OptimConfig, *, dtype=torch.bfloat16, batches: int = 1, attend=None) -> Counter:
    """Kernels that a step launches where nothing asks for another path; `attend` takes attention's place."""
    found: Counter[str] = Counter()
    with ExitStack() as stack:
        for name in KERNELS:
            module = importlib.import_module(f"nanotrain.kernels.{name}")
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch", lambda kernel, *_, **__: found.update([kernel.__name__])))
        for module in (runtime, importlib.import_module("nanotrain.kernels.attention")):
            stack.enter_context(mock.patch.object(module, "on_gpu", lambda device: device.type == "meta"))
        config = replace(model, vocab_size=96).resolved(frozenset(ModelConfig.__dataclass_fields__))
        net = meta_model(config).to(dtype)
        for block in net.blocks.values():
            block.attention.attend = attend or block.attention.attend
        net.rotary_tables(64, torch.device("meta"))  # made once in a run
        optimizer = Optimizer(net, optim)
        tokens = torch.zeros(1, 64, dtype=torch.int64, device="meta")
        offsets = torch.zeros(5, dtype=torch.int32, device="meta")
        batch = Batch(tokens, tokens, tokens, offsets, tokens, None, 60, 64)
        factor = torch.ones((), device="meta")
        for _ in range(2):  # the second finds tables and state made
            found.clear()
            with NoTransfers():
                loss, _ = step(net, optimizer, [batch] * batches, factor, 0)
        assert loss.device.type == "meta"
    return found


LLAMA = ModelConfig(width=32, layers=2, heads=2, kv_heads=1, tied=False)
QWEN = replace(LLAMA, qk_norm=True, norm_position="sandwich", activation="geglu")
GPT2 = replace(LLAMA, kv_heads=2, norm="layer", bias=True, positions="learned", activation="gelu", tied=True)


LAYERS = {"_norm_forward_kernel": 5, "_norm_backward_kernel": 5, "_rope_kernel": 4, "_gated_forward_kernel": 2, "_gated_backward_kernel": 2}
ALWAYS = {"_embedding_backward_kernel": 1, "_square_sum_kernel": 1, "_norm_kernel": 1}
ADAFACTOR = ("_adafactor_sums_kernel", "_adafactor_moments_kernel", "_adafactor_norms_kernel", "_adafactor_apply_kernel")
# Newton-Schulz makes two symmetric products in each of five steps, for the four shapes of LLAMA's matrices.
OPTIMIZERS = {
    "adamw": {"_adamw_kernel": 1},
    "lion": {"_lion_kernel": 1},
    "adafactor": {"_adafactor_totals_kernel": 2, **dict.fromkeys(ADAFACTOR, 1)},
    "muon": {"_adamw_kernel": 1, "_symmetric_product_kernel": 40},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_serve_by_default_and_nothing_waits(name, dtype):
    assert launched(LLAMA, OptimConfig(name=name), dtype=dtype) == LAYERS | ALWAYS | OPTIMIZERS[name]


def test_norms_of_heads_and_steps_of_several_batches():
    found = launched(QWEN, OptimConfig(masters=False, moments="bfloat16"), batches=2)
    assert found["_qk_norm_rope_forward_kernel"] == found["_qk_norm_rope_backward_kernel"] == 2 * 2
    assert found["_norm_forward_kernel"] == found["_norm_backward_kernel"] == 2 * 9 and found["_adamw_kernel"] == 1


def test_dropout_and_learned_positions():
    """Attention with dropout reads on the host where documents start, until it has a kernel of its own: something else stands in for it."""
    model = replace(GPT2, dropout=0.1, embedding_dropout=0.1)
    found = launched(model, OptimConfig(name="adamw"), attend=lambda q, k, v, **_: q * k * v)
    assert found["_dropout_kernel"] == 2 * (1 + 2 * 2) and found["_embedding_backward_kernel"] == 2 and found["_norm_forward_kernel"] == 5
    assert launched(GPT2, OptimConfig(name="adamw"))["_dropout_kernel"] == 0
