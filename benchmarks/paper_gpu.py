"""A GPU on paper: public functions called on tensors without storage compile what their launchers ask for, and nothing runs.

    with paper_gpu("sm_90") as binaries:
        rms_norm(torch.empty(8, 64, device="meta"), torch.empty(64, device="meta"), impl="triton")
    binaries[0].kernel, binaries[0].specialization, binaries[0].shared

Triton's own launch path runs up to the launch itself: it derives the signature and the alignment of pointers and integers from the
launcher's arguments, adds constexprs, warps and stages, and compiles for the target. So the binary looked at is the one that a GPU runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from nanotrain.kernels.runtime import triton

NVIDIA = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
"""Compute capabilities by target."""

TARGETS = (*NVIDIA, "gfx942")

_DEVICES = {target: 1000 + number for number, target in enumerate(TARGETS)}
"""Triton keeps compiled kernels by the number of a device: each target takes one that no GPU has."""


@dataclass(frozen=True)
class Binary:
    """A compiled kernel, or one that does not compile."""

    kernel: str
    """Name of the kernel's function."""
    target: str
    config: str
    """The constexprs and the options (warps, stages, ...) that the launcher chose."""
    specialization: str = ""
    """Types of the arguments in order, with D where Triton may rely on divisibility by 16, =1 for a one that is built in, (n) for n alike."""
    warps: int = 0
    shared: int = 0
    """Shared memory that a launch asks for [bytes]."""
    tensor_memory: int = 0
    """Columns of tensor memory (Blackwell)."""
    identity: str = ""
    """Triton's hash of source, signature, constexprs, options and target: equal for equal binaries."""
    assembly: str = ""
    """PTX, or AMD's assembly."""
    path: Path | None = None
    """The cubin, or AMD's code object, in Triton's cache."""
    error: str = ""
    """Why it does not compile, in a line; empty if it does."""


class _Driver:
    """What Triton asks of a driver until it launches."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        self.device = _DEVICES[target]
        self.target = GPUTarget("cuda", NVIDIA[target], 32) if target in NVIDIA else GPUTarget("hip", target, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def paper_gpu(target: str, before: Callable[[Binary], object] = lambda binary: None) -> Iterator[list[Binary]]:
    """Have kernels that are launched inside compiled for `target` (of TARGETS) in place of being run; yields the distinct ones, in order.

    A kernel that does not compile is in the list too, with its error. `before` is told the name and options of each kernel before it is
    compiled, which says where the compiler was if that ends the process. Raises RuntimeError where there is no Triton, or where kernels were
    decorated for its interpreter.
    """
    if target not in TARGETS:
        raise ValueError(f"no target {target}; there are {', '.join(TARGETS)}")
    if triton is None:
        raise RuntimeError("kernels cannot be compiled: triton is not installed; pip install triton")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled in this process: TRITON_INTERPRET is set, by which they run in the interpreter; unset it")
    binaries: list[Binary] = []
    seen = set()
    run = triton.JITFunction.run

    def compile_only(function, *arguments, grid, warmup, **options):
        binary = Binary(function.__name__, target, _config(options))
        before(binary)
        try:
            compiled = run(function, *arguments, grid=grid, warmup=True, **options)
        except Exception as error:
            binary = replace(binary, error=in_a_line(error))
        else:
            if compiled.hash in seen:
                return
            binary = _binary(function, compiled, options, target)
        if (key := binary.identity or binary) not in seen:
            seen.add(key)
            binaries.append(binary)

    config = triton.runtime.driver
    active = config._active  # `active` would look for a GPU
    config.set_active(_Driver(target))
    triton.JITFunction.run = compile_only
    try:
        yield binaries
    finally:
        triton.JITFunction.run = run
        config.set_active(active)


def _binary(function, compiled, options: dict[str, object], target: str) -> Binary:
    constants = {path[0]: value for path, value in compiled.src.constants.items() if len(path) == 1}
    constexprs, types = {}, []
    for number, (parameter, kind) in enumerate(zip(function.params, compiled.src.signature.values(), strict=True)):
        if parameter.is_constexpr:
            constexprs[parameter.name] = constants.get(number)
        elif number in constants:
            types.append(f"={constants[number]}")
        else:
            types.append(f"{kind}D" if ["tt.divisibility", 16] in compiled.src.attrs.get((number,), ()) else f"{kind}")
    asked = {name: value for name, value in options.items() if name not in compiled.src.signature}
    text, code = ("ptx", ".cubin") if target in NVIDIA else ("amdgcn", ".hsaco")
    return Binary(
        function.__name__, target, _config(constexprs | {"num_warps": compiled.metadata.num_warps} | asked),
        " ".join(f"{kind}({n})" if (n := len(list(alike))) > 1 else kind for kind, alike in groupby(types)),
        compiled.metadata.num_warps, compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0, compiled.hash,
        compiled.asm[text], next(Path(path) for name, path in compiled.metadata_group.items() if name.endswith(code)),
    )  # fmt: skip


def _config(options: dict[str, object]) -> str:
    return " ".join(f"{name.removeprefix('num_')}={_text(value)}" for name, value in options.items())


def _text(value: object) -> str:
    value = getattr(value, "value", value)  # of a tl.constexpr
    return ",".join(map(_text, value)) if isinstance(value, tuple) else str(value)


def in_a_line(error: Exception) -> str:
    """What went wrong first, in a line: of a compiler's message the line that names an error, or else the last."""
    kinds, cause = [type(error).__name__], error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if type(cause) is not type(error):
        kinds.append(type(cause).__name__)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [""]
    named = [line for line in lines if "error" in line.lower() and "codegen error" not in line]
    return ": ".join((*kinds, (named or lines[-1:])[0]))
