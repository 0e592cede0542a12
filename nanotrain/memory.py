"""The memory plan: what a training step will need, before it runs; what is there; and what it took.

Activations are counted, not modelled: the forward runs on tensors without storage and every tensor that the backward
would keep is added up, so the plan follows whatever the model does (recompute, biases, dropout).
"""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanotrain.kernels import token_loss
from nanotrain.kernels.runtime import has_native, on_gpu, triton
from nanotrain.model.build import meta_model
from nanotrain.model.transformer import Dropout, ModelConfig, Transformer
from nanotrain.optim import OptimConfig, Optimizer


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process."""

    parameters: int
    gradients: int
    optimizer: int
    activations_per_row: int
    """For each row of a micro-batch: kept for the backward, and the tensors of a feed-forward's own backward."""
    workspace: int
    """Held for a moment by the head (a chunk of logits, its weight gradient in fp32) and by the optimizer's update: their sum, for an
    allocator seldom fills the gaps that one leaves with the other's. C++ that works in place on a CPU needs less of either."""
    rows: int
    """Rows of the micro-batch planned for."""
    available: int
    """What the device or machine has left."""

    def __str__(self) -> str:
        kept = self.rows * self.activations_per_row
        parts = dict(parameters=self.parameters, gradients=self.gradients, optimizer=self.optimizer, activations=kept, workspace=self.workspace)
        terms = " + ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
        free = format_bytes(self.available)
        return f"plan {format_bytes(self.total)} = {terms}; {free} free; largest micro-batch {self.largest_micro_batch:,} rows"

    @property
    def fixed(self) -> int:
        """What does not depend on the micro-batch."""
        return self.parameters + self.gradients + self.optimizer + self.workspace

    @property
    def total(self) -> int:
        """The peak expected of a step."""
        return self.fixed + self.rows * self.activations_per_row

    @property
    def largest_micro_batch(self) -> int:
        """Rows that fit, with a quarter of the memory left for what is not planned (libraries, the allocator's gaps); 0 where not even one does."""
        return max(0, int((0.75 * self.available - self.fixed) // max(1, self.activations_per_row)))


def plan(
    c: ModelConfig, optim: OptimConfig, *, dtype: torch.dtype, length: int, rows: int, accumulate: int, device: torch.device
) -> MemoryPlan:  # fmt: skip
    """Plan for a resolved config, micro-batches of `rows` rows of `length` tokens, `accumulate` of them to a step."""
    optimizer = Optimizer(meta_model(c).to(dtype), optim)
    count, wide = sum(p.numel() for p in optimizer.params.values()), optimizer.wide.itemsize
    gradients = count * (dtype.itemsize + (wide if accumulate > 1 else 0))
    native = has_native(dtype, device)
    impl = "triton" if on_gpu(device) and triton is not None else "native" if native and not c.logit_softcap else "reference"
    chunk = token_loss._chunk_rows(c.vocab_size, c.width, dtype, device, impl) * c.vocab_size * dtype.itemsize
    # References hold three tensors of as many elements; of the weight's gradient there are the sum and, where it is wider, one chunk's part.
    head = chunk * (3 * wide // dtype.itemsize if impl == "reference" else 1)
    head += c.vocab_size * c.width * (wide + (dtype.itemsize if dtype.itemsize < wide else 0))
    activations = activation_bytes(c, dtype=dtype, length=length, rows=rows)
    gate = 3 * dtype.itemsize if native and c.activation != "gelu" else (6 if dtype.itemsize < wide else 3) * wide
    feed_forward = gate * rows * length * c.ffn_width
    per_row = -(-(activations + feed_forward) // rows)
    state = sum(t.nbytes for t in optimizer.state().values())
    workspace = head + _update_bytes(optimizer, native, device)
    return MemoryPlan(count * dtype.itemsize, gradients, state, per_row, workspace, rows, available_memory(device))


def _update_bytes(optimizer: Optimizer, native: bool, device: torch.device) -> int:
    """The most that an update holds for a moment: what Muon makes of a stack, wide copies where it is not one pass, the bits of rounding."""
    c, wide = optimizer.c, optimizer.wide.itemsize
    stack = 5 * wide * max((momentum.numel() for *_, momentum in optimizer.stacks()), default=0)
    rest = [p.numel() for p in optimizer.rest.values()]
    adam, copied = c.name in ("muon", "adamw"), c.moments == "bfloat16"
    kernels = on_gpu(device) and triton is not None
    if kernels or (native and adam and not copied and optimizer.seed is None):
        copies = 0
    elif adam:  # of all gradients at once, of moments and of parameters that are narrower
        copies = sum(rest) * wide * (1 + 2 * copied + (optimizer.seed is not None))
    else:
        copies = 6 * max(rest) * wide
    rounded = [] if optimizer.seed is None else [optimizer.params[n].numel() for n in optimizer.muon] + ([] if kernels else rest)
    return max(stack, copies) + 64 * max(rounded, default=0)  # eight int64 for each element


def activation_bytes(c: ModelConfig, *, dtype: torch.dtype, length: int, rows: int) -> int:
    """Bytes that the backward of one micro-batch keeps from the forward, beyond parameters."""
    kept: dict[int, int] = {}
    default = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        try:
            torch.set_default_dtype(dtype)
            model = Transformer(c)
        finally:
            torch.set_default_dtype(default)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        holders = []

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
                holders.append(storage)  # its address must not be used again
            return tensor

        tokens = torch.zeros(rows, length, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model(tokens, tokens, dropout=Dropout(0, tokens) if c.dropout or c.embedding_dropout else None, max_position=length)
            model.head(hidden, tokens, token_weight_N=torch.zeros(rows * length))
    return sum(kept.values())


def available_memory(device: torch.device) -> int:
    """Free bytes of the GPU, or of the machine within the limit its container sets."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _meminfo("MemAvailable")
    for limit_file, used_file in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            limit, used = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit_file, used_file))
            free = min(free, max(0, limit - used))
        except (OSError, ValueError):
            continue
    return free


def _meminfo(key: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def keep_freed_memory() -> None:
    """Have glibc keep the memory that a step frees for the next one.

    By default it returns large blocks to the kernel, and each step on a CPU spends a tenth of its time on page faults.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


class PeakMemory:
    """Peak memory since this was made: the allocator's on a GPU, the growth of the process's resident memory on a CPU."""

    def __init__(self, device: torch.device):
        self.device, self.base = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is still resident would hide what a run takes of it
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
            self.base = self.bytes()

    def bytes(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024 - self.base
        except (OSError, IndexError):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.base


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError  # the loop returns


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def ladder(*, micro_batch: int, accumulate: int, recompute: str, optim: OptimConfig, dtype: str) -> str:
    """What takes less memory, the next rung first, with its flags."""
    rungs = []
    if recompute != "full":
        rungs.append(f"--model.recompute={'selective' if recompute == 'none' else 'full'}")
    if micro_batch > 1:
        smaller = max(d for d in range(1, micro_batch) if micro_batch % d == 0)
        rungs.append(f"--train.micro_batch={smaller} --train.accumulate={accumulate * (micro_batch // smaller)} (the same step)")
    if optim.name == "adamw":
        rungs.append("--optim.name=muon (one moment in place of two)")
    if optim.name != "adafactor" and optim.moments == "float32":
        rungs.append("--optim.moments=bfloat16 (half the moments' size)")
    if optim.masters and dtype == "bfloat16":
        rungs.append("--optim.masters=false (no fp32 copy of the parameters)")
    if optim.name != "adafactor":
        rungs.append("--optim.name=adafactor (hardly any moments)")
    return "; then ".join([*rungs, "a shorter --train.length or a smaller --model.preset"])
