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
from nanotrain.kernels import attention_configs, runtime
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanotrain.data.loader import Batch
from nanotrain.model.build import meta_model
from nanotrain.model.transformer import ModelConfig
from nanotrain.optim import OptimConfig, Optimizer
from nanotrain.stages.pretrain import step

KERNELS = (
    "attention_order", "attention_forward", "attention_backward", "norm", "rotary", "gated", "dropout", "lookup", "optimizers", "multi_tensor",
    "adafactor", "orthogonal", "token_loss",
)  # fmt: skip


class NoTransfers(TorchDispatchMode):
    """Refuses operators that wait for values of the device, and those that take from the host and the device but for queued copies."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        moves = name in ("_to_copy", "copy_")
        # A number's tensor (0-d, of the host) beside tensors of the device is passed with the launch, unless it is moved.
        tensors = [t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor) and (t.dim() or moves)]
        devices = {t.device.type for t in tensors}
        waits = "meta" in devices and name in ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "_unique2")
        mixed = len(devices) > 1 and not (moves and (kwargs or {}).get("non_blocking"))
        assert not waits and not mixed, f"{name} makes the host wait"
        return out


@pytest.mark.parametrize(
    "wait",
    [lambda x, host: x.nonzero(), lambda x, host: x[host], lambda x, host: host.to("meta"), lambda x, host: x.copy_(host), lambda x, host: x.cpu()],
)
def test_what_waits_is_refused(wait):
    with NoTransfers(), pytest.raises((AssertionError, NotImplementedError)):
        wait(torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.int64))


def launched(model: ModelConfig, optim: OptimConfig, *, dtype=torch.bfloat16, batches: int = 1) -> Counter:
    """Kernels that a step launches where nothing asks for another path."""
    found: Counter[str] = Counter()
    with ExitStack() as stack:
        for name in KERNELS:
            module = importlib.import_module(f"nanotrain.kernels.{name}")
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch", lambda kernel, *_, **__: found.update([kernel.__name__])))
        stack.enter_context(mock.patch.object(runtime, "on_gpu", lambda device: device.type == "meta"))
        # What kernels are compiled for is asked of Triton's driver, which there is none of here.
        stack.enter_context(mock.patch.object(attention_configs, "architecture", lambda device: "sm_90"))
        config = replace(model, vocab_size=96).resolved(frozenset(ModelConfig.__dataclass_fields__))
        net = meta_model(config).to(dtype)
        net.rotary_tables(64, torch.device("meta"))  # made once in a run
        optimizer = Optimizer(net, optim)
        tokens = torch.zeros(1, 64, dtype=torch.int64, device="meta")
        offsets = torch.zeros(5, dtype=torch.int32, device="meta")
        batch = Batch(tokens, tokens, tokens, offsets, tokens, None, 60, 64, (10, 20, 4, 30))
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


ATTENTION = {f"_attention_{part}_kernel": 2 for part in ("forward", "delta", "keys_backward", "queries_backward")}
LAYERS = ATTENTION | {
    "_attention_order_kernel": 2 * 3,
    "_norm_forward_kernel": 5, "_norm_backward_kernel": 5, "_rope_kernel": 4, "_gated_forward_kernel": 2, "_gated_backward_kernel": 2,
}  # fmt: skip
ALWAYS = {"_embedding_backward_kernel": 1, "_token_sums_kernel": 1, "_token_gradient_kernel": 1, "_square_sum_kernel": 1, "_norm_kernel": 1}
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
    found = launched(replace(GPT2, dropout=0.1, embedding_dropout=0.1), OptimConfig(name="adamw"))
    assert found["_dropout_kernel"] == 2 * (1 + 2 * 2) and found["_embedding_backward_kernel"] == 2 and found["_norm_forward_kernel"] == 5
    assert launched(GPT2, OptimConfig(name="adamw"))["_dropout_kernel"] == 0


@pytest.mark.parametrize(
    "change",
    [dict(attention_softcap=30.0, logit_softcap=20.0, window=9, window_pattern="sf"), dict(positions="alibi", dropout=0.1),
     dict(head_dim=12), dict(recompute="full")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_waits_whatever_the_attention(change, dtype):
    found = launched(replace(LLAMA, **change), OptimConfig(), dtype=dtype)
    assert found["_norm_backward_kernel"] == 5 and found["_adamw_kernel"] == 1
    assert {name: found[name] for name in ATTENTION} == ATTENTION | ({"_attention_forward_kernel": 4} if "recompute" in change else {})
