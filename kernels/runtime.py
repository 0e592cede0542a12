"""Which implementation serves a call: is Triton here, is a C++ library, is the tensor one that they can serve, and which path ran."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial

import torch
from nanotrain.kernels.native import library

try:
    import triton
    import triton.language as tl
except ImportError:  # not on Linux: the references serve
    triton = tl = None

IMPLEMENTATIONS = ("auto", "triton", "native", "reference")

launches: Counter[str] = Counter()
"""Launches of Triton kernels and calls of C++ functions by name, so that a test can see which path a call took."""


def jit(function=None, *, do_not_specialize: tuple[str, ...] = ()):
    """`triton.jit`, or without triton the function as it is, which nothing then calls; also as a decorator with arguments.

    `do_not_specialize` names numbers for which nothing is to be compiled apart, as numbers that 16 divides are.
    """
    if function is None:
        return partial(jit, do_not_specialize=do_not_specialize)
    return function if triton is None else triton.jit(function, do_not_specialize=do_not_specialize)


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Run a kernel on a grid of programs, counted in `launches`; the first argument is a tensor on the device to run on.

    `options` are the kernel's constexprs and num_warps, num_stages; with SPECIALIZED it makes tensor descriptors, for which Triton asks
    for memory.
    """
    launches[kernel.__name__] += 1
    device = arguments[0].device
    if options.get("SPECIALIZED"):
        triton.set_allocator(_scratch)  # of this thread: the backward runs in another
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for a launch, as torch gives it: in the order of the stream, and aligned to 256 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def architecture(device: torch.device) -> str:
    """What kernels on the device are compiled for: "sm_90", "gfx942", ...; "interpreter" where Triton's interpreter runs them."""
    if device.type == "cpu":
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU, by which kernels that stride over their work count their programs.

    132 (an H100's) for tensors without storage, on which kernels are only compiled; 2 on a CPU, where the interpreter runs them, so that
    programs have more than one piece of work there too.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 2


def on_gpu(device: torch.device) -> bool:
    """Whether `impl="auto"` takes kernels for tensors on the device."""
    return device.type == "cuda"


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host from where `.to(device, non_blocking=True)` waits for nothing: pinned where the device is a GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device, for which neither waits."""
    return pinned(tensor, device).to(device, non_blocking=True)


def has_kernel(*tensors: torch.Tensor) -> bool:
    """Whether Triton kernels serve the dtypes of these tensors: fp32, fp16 and bf16 (float64 is the references')."""
    return all(tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) for tensor in tensors)


def has_native(dtype: torch.dtype, device: torch.device) -> bool:
    """True where C++ serves tensors of this dtype and device. The first to ask has it compiled; where that fails, it is said once."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and library("train") is not None


def choose(op: str, impl: str, *tensors: torch.Tensor, triton: bool = False, native: bool = False) -> str:
    """Return "triton", "native" or "reference" for a call of `op` on `tensors`.

    `triton` and `native` say whether the op has a Triton kernel or a C++ function for arguments like these. "auto" takes the first for
    tensors on a GPU and the second for plain tensors in fp32 or bf16 on a CPU; "triton" and "native" take theirs or raise, never falling
    back in silence; "reference" always works.

    Raises ValueError for an unknown `impl` or for tensors on different devices, RuntimeError where `impl="triton"` or `impl="native"`
    cannot be served.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl={impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"{op}: tensors on different devices ({', '.join(sorted(map(str, devices)))}); move them to one")
    if impl == "reference":
        return "reference"
    if impl == "native":
        if (hindrance := _hindrance(tensors, native)) is not None:
            raise RuntimeError(f"{op}: impl='native' asked for, but {hindrance}; use impl='auto'")
        return "native"
    if impl == "auto":
        if triton and tl is not None and all(map(on_gpu, devices)):
            return "triton"
        return "native" if native and _hindrance(tensors, native) is None else "reference"
    if not triton:
        raise RuntimeError(f"{op}: impl='triton' asked for, but {op} has no Triton kernel for these arguments; use impl='auto'")
    if tl is None:
        raise RuntimeError(f"{op}: impl='triton' asked for, but triton is not installed; pip install triton")
    if devices == {torch.device("cpu")} and not _interpreted():
        raise RuntimeError(f"{op}: impl='triton' asked for on a CPU; set TRITON_INTERPRET=1 before Python starts, or use impl='auto'")
    return "triton"


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which was decided as they were decorated."""
    return not isinstance(_probe, triton.JITFunction)


@jit
def _probe():
    pass


def _hindrance(tensors: tuple[torch.Tensor, ...], native: bool) -> str | None:
    """What keeps C++, which reads the memory of tensors, from serving them; None where nothing does."""
    if not native:
        return "there is no C++ for these arguments"
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            return f"a tensor is a {type(tensor).__name__} of layout {tensor.layout}, no plain memory"
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.int64):
            return f"a tensor is in {tensor.dtype}, neither float32 nor bfloat16"
    # What watches or transforms PyTorch's operators (a memory plan's tensors without storage, a tracer, torch.func) would not see C++.
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return "torch traces or transforms this call"
    return None if library("train") is not None else "its library cannot be had"


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype a reference computes in: the widest of the inputs and fp32, so float64 stays float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
