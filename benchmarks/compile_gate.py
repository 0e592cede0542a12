"""python -m benchmarks.compile_gate [--all] [--wide] [--csv FILE] [NAME ...]: compile every kernel for four GPUs and hold it to its budget.

Needs no GPU: public functions run on tensors without storage, forward and backward (benchmarks/paper_gpu.py), so signature, alignment and
constexprs are the launchers' own. For sm_80, sm_90, sm_100 and gfx942 the table shows each distinct kernel: registers of a thread, shared
memory of a block and bytes that a thread spills to local memory, the matrix instruction it declares and the one found in it, occupancy, and
its configuration, of whose switches those that are on.

The exit status is 1, and a line says why, where a kernel does not compile, wants more shared memory than the GPU has, spills more than its
case's written budget, lacks the matrix instruction that it declares or has one that it does not declare, or asks for specialized warps and has
none ("ws" are found); 2 where nothing can be compiled.

A run takes the first shape of each case, or what else it takes to reach each kernel, in bf16, fp32 and fp16, and every shape of kernels whose
files differ from the branch this one left, or from the last commit: of all kernels where benchmarks/kernel_cases.py or kernels/runtime.py do,
of attention's where benchmarks/attention_cases.py does. Of cases marked slow only
--all takes more than the first, as it takes every shape of every case. Triton's cache keeps what was compiled.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from nanotrain.kernels.runtime import triton

from benchmarks import attention_cases
from benchmarks.cases import Case, results, upstream, wanted
from benchmarks.kernel_cases import CASES, select
from benchmarks.paper_gpu import NVIDIA, TARGETS, Binary, in_a_line, paper_gpu

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """A kernel as one target's compiler made it, and what was promised of it."""

    case: str
    kernel: str
    config: str
    dtype: str
    target: str
    registers: int
    """Of a thread."""
    shared: int
    """Of a block [bytes]."""
    spills: int
    """Of a thread, to local memory [bytes]."""
    declared: str
    """Matrix instruction; "-" for none."""
    found: str
    specialized: bool
    """Whether registers move between its warps, of which some copy and others multiply."""
    occupancy: float
    """Warps that a multiprocessor can hold of this kernel, as a share of the most it holds."""
    specialization: str
    shape: str
    """The first that asked for this kernel."""
    budget: int
    """Most bytes it may spill."""
    tensor_memory: int
    """Columns of a block."""
    identity: str
    error: str
    """Why it does not compile."""

    def reasons(self) -> list[str]:
        """What is broken, a line each."""
        if self.error:
            return [f"{self}: does not compile: {self.error}"]
        found = []
        if self.shared > (limit := SHARED_LIMIT[self.target]):
            found.append(f"{self}: {self.shared:,} bytes of shared memory, {self.target} has {limit:,}")
        if self.tensor_memory > TENSOR_MEMORY:
            found.append(f"{self}: {self.tensor_memory} columns of tensor memory, {self.target} has {TENSOR_MEMORY}")
        if self.spills > self.budget:
            found.append(f"{self}: spills {self.spills:,} bytes, its budget is {self.budget:,}")
        if self.found != self.declared:
            found.append(f"{self}: declares the matrix instruction {self.declared}, found {self.found}")
        if "SPECIALIZED=True" in self.config.split() and not self.specialized:
            found.append(f"{self}: asks for specialized warps, found no {_SPECIALIZED}")
        return found

    def __str__(self):
        return f"{self.kernel} ({self.case}, {self.config}, {self.dtype}, {self.target}, shape {self.shape})"


# Limits of one block and of one multiprocessor. NVIDIA: CUDA C++ Programming Guide, "Compute Capabilities". AMD: LLVM's AMDGPU backend
# (AMDGPUBaseInfo.cpp and GCNSubtarget.cpp, for gfx942).

SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Shared memory that a block may ask for [bytes]. An A100's may have 163 KiB, but what is made for it serves sm_86, sm_89 and sm_120 too."""

SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}
"""Shared memory of a multiprocessor [bytes]."""

TENSOR_MEMORY = 512
"""Columns of tensor memory of an sm_100 multiprocessor."""


def occupancy(target: str, registers: int, shared: int, warps: int, *, scalars: int = 0, columns: int = 0) -> float:
    """Warps resident on a multiprocessor, of the most it holds, as registers and shared memory allow for blocks of so many warps.

    `registers` are of a thread; `scalars` are scalar registers of a wavefront (AMD), `columns` of tensor memory a block's (Blackwell). As
    NVIDIA's cuda_occupancy.h computes it, and LLVM for AMD. 0 where not even one block fits.
    """
    if target == "gfx942":
        # A SIMD, of which a compute unit has 4, holds 8 wavefronts, 7 that use more than 100 scalar registers; it has 512 vector registers of
        # each lane, given out by 8. A compute unit has 64 KiB of shared memory, given out by 512 bytes, and 16 barriers.
        slots = 4 * min(512 // _rounded(max(registers, 1), 8), 8 if scalars <= 100 else 7)
        blocks = min(slots // warps, 16 if warps > 1 else 32)
        most, needed = 32, _rounded(shared, 512)
    else:
        # 64 warps, 32 blocks and 65,536 registers, which each of 4 schedulers gives out to whole warps by 256. A block takes 1 KiB of shared
        # memory beside its own, which is given out by 128 bytes.
        slots = 4 * (16384 // _rounded(32 * max(registers, 1), 256))
        blocks = min(slots // warps, 64 // warps, 32, TENSOR_MEMORY // columns if columns else 32)
        most, needed = 64, _rounded(shared, 128) + 1024
    return min(blocks, SHARED_MEMORY[target] // needed if needed else blocks) * warps / most


def _rounded(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _nvidia_resources(binary: Binary) -> tuple[int, int, int]:
    """(registers, spilled bytes, 0) of a cubin, by the cuobjdump that comes with Triton."""
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary.path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # An entry for each function in the cubin; a kernel's own calls are inlined, but for a few of libdevice.
    usage = [{key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)} for line in text.splitlines() if "REG:" in line]
    return max(u["REG"] for u in usage), sum(u["STACK"] + u["LOCAL"] for u in usage), 0


def _amd_resources(binary: Binary) -> tuple[int, int, int]:
    """(vector registers, spilled bytes, scalar registers) by the metadata that ends AMD's assembly.

    Spilled are the private segment, in which vector registers are saved, and scalar registers saved in lanes of vector registers.
    """
    fields = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)$", binary.assembly, re.MULTILINE)}
    spilled = max(fields["private_segment_fixed_size"], 4 * fields["vgpr_spill_count"]) + 4 * fields["sgpr_spill_count"]
    return fields["vgpr_count"], spilled, fields["sgpr_count"]


_PRODUCTS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync", "mfma": "v_mfma_"}
"""How a matrix instruction reads in PTX or AMD's assembly."""


_SPECIALIZED = "setmaxnreg"
"""By what warps that only copy give their registers to those that multiply."""


def _product(assembly: str) -> str:
    return "+".join(name for name, text in _PRODUCTS.items() if text in assembly) or "-"


def _row(case: Case, shape: tuple, dtype: torch.dtype, binary: Binary) -> Row:
    registers = spills = scalars = 0
    if not binary.error:
        registers, spills, scalars = (_nvidia_resources if binary.target in NVIDIA else _amd_resources)(binary)
    return Row(
        case=case.title, kernel=binary.kernel, config=binary.config, dtype=str(dtype).removeprefix("torch."), target=binary.target,
        registers=registers, shared=binary.shared, spills=spills, declared=case.product(binary.kernel, dtype, binary.target),
        found=_product(binary.assembly), specialized=_SPECIALIZED in binary.assembly, occupancy=0.0 if binary.error else occupancy(
            binary.target, registers, binary.shared, binary.warps, scalars=scalars, columns=binary.tensor_memory,
        ),
        specialization=binary.specialization, shape="x".join(map(str, shape)), budget=case.stack.get((binary.kernel, binary.target), 0),
        tensor_memory=binary.tensor_memory, identity=binary.identity, error=binary.error,
    )  # fmt: skip


def compile_case(
    case: Case, shape: tuple[int, ...], dtype: torch.dtype, target: str, before: Callable[[Binary], object] = lambda binary: None
) -> list[Row]:
    """The kernels that one call of a case launches, and its backward, as `target`'s compiler makes them; a call that fails is a row too.

    `before` is told of each kernel before it is compiled.
    """
    with paper_gpu(target, before) as binaries:
        try:
            inputs = case.make(shape, dtype, "meta")
            outputs = [x for x in results(case.call(inputs, "triton")) if x.requires_grad]
            if outputs:
                torch.autograd.grad(outputs, wanted(inputs), upstream(outputs))
            if not binaries:
                raise RuntimeError("the call launched no kernel")
        except Exception as error:
            binaries.append(Binary(case.name, target, "", error=in_a_line(error)))
    return [_row(case, shape, dtype, binary) for binary in binaries]


Call = tuple[int, tuple[int, ...], torch.dtype, str]
"""Number of a case, shape, dtype, target."""


class _Compiler:
    """A process that compiles one call after another; where a call ends it, which a compiler's crash does, the next is given a new one."""

    def __init__(self):
        # It starts afresh: Triton's compilers, like autograd, do not survive a fork of a process that has used them.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, call: Call) -> None:
        self.call, self.at = call, None
        self.connection.send(call)

    def receive(self) -> list[Row] | None:
        """The rows of the call once it is done, and before that None. RuntimeError for a process that has not even begun."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            status = self.process.exitcode
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            if self.at is None:
                raise RuntimeError(f"a process for the compiler ended before it began ({how})") from None
            index, shape, dtype, _ = self.call
            return [_row(CASES[index], shape, dtype, replace(self.at, error=f"it ends the compiler's process ({how})"))]
        if isinstance(message, Binary):
            self.at, message = message, None
        return message

    def end(self) -> None:
        self.connection.close()
        self.process.join()


def _serve(connection: Connection) -> None:
    """Answer calls by their rows, and before that by what is to be compiled next, until the other side hangs up."""
    while True:
        try:
            index, shape, dtype, target = connection.recv()
        except EOFError:
            return
        connection.send(Binary(CASES[index].name, target, ""))
        connection.send(compile_case(CASES[index], shape, dtype, target, connection.send))


def compile_calls(calls: Sequence[Call], workers: int = 2) -> list[Row]:
    """The rows of all calls, in their order, compiled in so many processes at a time."""
    coming, busy, found = deque(range(len(calls))), {}, {}

    def begin(compiler: _Compiler) -> None:
        number = coming.popleft()
        compiler.begin(calls[number])
        busy[compiler.connection] = number, compiler

    for _ in range(min(workers, len(calls))):
        begin(_Compiler())
    while busy:
        for connection in wait(list(busy)):
            number, compiler = busy[connection]
            rows = compiler.receive()
            if rows is None:
                continue
            found[number] = rows
            del busy[connection]
            if coming:
                begin(compiler if compiler.process.is_alive() else _Compiler())
            else:
                compiler.end()
    return [row for number in sorted(found) for row in found[number]]


def rows(names: Sequence[str] = (), *, every_shape: bool | None = None, targets: Iterable[str] = TARGETS, workers: int = 2) -> list[Row]:
    """Every distinct kernel of the named functions, or of all, on every target.

    `every_shape` None takes of each case what reaches each kernel, and every shape of those whose files have changed. Raises ValueError for
    a name that is none, RuntimeError where Triton cannot compile in this process.
    """
    with paper_gpu(TARGETS[0]):
        pass  # says now, and not from a worker, why nothing could be compiled
    changed = changed_modules() if every_shape is None else set()
    chosen, calls = select(names), []
    for target in targets:
        for index, case in enumerate(CASES):
            shapes = case.shapes if every_shape or (case.module in changed and not case.slow) else case.shapes[: case.always]
            if case in chosen:
                calls += [(number, (index, shape, dtype, target)) for number, shape in enumerate(shapes) for dtype in case.dtypes]
    # First shapes first: two that share a kernel are far apart then, so that the second finds it in the cache.
    return distinct(compile_calls([call for _, call in sorted(calls, key=lambda item: item[0])], workers))


def distinct(found: Iterable[Row]) -> list[Row]:
    """Each binary, and each promise of it, once: by kernel, configuration, dtype and target."""
    once = {}
    for row in found:
        once.setdefault((row.kernel, row.target, row.identity or row.config, row.error, row.declared, row.budget), row)
    order = {case.title: number for number, case in enumerate(CASES)}
    return sorted(once.values(), key=lambda r: (order.get(r.case, len(order)), r.kernel, r.config, r.dtype, TARGETS.index(r.target)))


def changed_modules() -> set[str]:
    """Modules of kernels/ that differ from the branch this one left, or on that branch itself from the commit before; none without git.

    A module is changed too where one that it takes functions from is, and all that have cases are where the cases have changed.
    """
    base = next((b for ref in ("origin/HEAD", "origin/main", "origin/master") if (b := _git("merge-base", "HEAD", ref))), "")
    if base == _git("rev-parse", "HEAD"):
        base = ""
    base = base or _git("rev-parse", "--verify", "--quiet", "HEAD~1") or "HEAD"
    paths = {*f"{_git('diff', '--name-only', base)}\n{_git('ls-files', '--others', '--exclude-standard')}".split()}
    # What serves CPUs alone makes no kernel another.
    changed = {Path(path).stem for path in paths if re.fullmatch(r"kernels/\w+\.py", path)} - {"native", "cpu"}
    if paths & {"benchmarks/cases.py", "benchmarks/kernel_cases.py"}:
        changed |= {case.module for case in CASES}
    if "benchmarks/attention_cases.py" in paths:
        changed |= {case.module for case in attention_cases.CASES}
    uses = {
        path.stem: set(re.findall(r"^from nanotrain\.kernels\.(\w+) import", path.read_text(), re.MULTILINE))
        for path in (ROOT / "kernels").glob("*.py")
    }
    while more := {name for name, used in uses.items() if used & changed} - changed:
        changed |= more
    return changed


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _brief(config: str) -> str:
    """A configuration with short dtypes and, of its switches, the names of those that are on."""
    config = re.sub("|".join(_SHORT), lambda match: _SHORT[match[0]], config)
    return " ".join(part.removesuffix("=True") for part in config.split() if not part.endswith("=False"))


def _built(text: str, row: Row) -> str:
    return "-" if row.error else text


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "kernel": lambda r: r.kernel.removeprefix("_").removesuffix("_kernel"),
    "dtype": lambda r: _SHORT.get(r.dtype, r.dtype),
    "target": lambda r: r.target,
    "registers": lambda r: _built(str(r.registers), r),
    "shared": lambda r: _built(f"{r.shared:,}", r),
    "spills": lambda r: _built(f"{r.spills:,}", r),
    "declared": lambda r: r.declared,
    "found": lambda r: "error" if r.error else r.found + " ws" * r.specialized,
    "occupancy": lambda r: _built(f"{r.occupancy:.0%}", r),
    "config": lambda r: _brief(r.config),
}

_NUMBERS = ("registers", "shared", "spills", "occupancy")


def table(found: Sequence[Row], *, wide: bool = False) -> str:
    """The rows as text; `wide` adds the types of arguments, with D where Triton relies on divisibility by 16."""
    columns = _COLUMNS | ({"arguments": lambda r: r.specialization} if wide else {})
    lines = [list(columns), *([show(row) for show in columns.values()] for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if name in _NUMBERS else cell.ljust(w) for cell, w, name in zip(line, widths, columns, strict=True)).rstrip()
        for line in lines
    )


def write_csv(path: Path, found: Sequence[Row]) -> None:
    """The rows with all their fields, and Triton's version, on which they depend."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*Row.__dataclass_fields__, "triton"])
        writer.writeheader()
        writer.writerows(vars(row) | {"triton": triton.__version__} for row in found)


def report(found: Sequence[Row], *, wide: bool = False) -> int:
    """Print the table and every reason to fail; the exit status."""
    print(table(found, wide=wide))
    reasons = [reason for row in found for reason in row.reasons()]
    for reason in reasons:
        print(f"compile_gate: {reason}")
    print(f"{len(found)} kernels compiled by Triton {triton.__version__}, {len(reasons)} broken budgets")
    return 1 if reasons else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where every budget is kept, 1 where one is broken, 2 where nothing can be compiled."""
    usage, *paragraphs = __doc__.split("\n\n")
    width = shutil.get_terminal_size().columns - 2
    about = "\n\n".join(textwrap.fill(part, width) for part in (f"C{usage.split(': c', 1)[1]}", *paragraphs))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_gate", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join(dict.fromkeys(case.name for case in CASES))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; all where none is given")
    parser.add_argument("--all", action="store_true", help="every shape of every case")
    parser.add_argument("--wide", action="store_true", help="with the types of arguments, D where Triton relies on divisibility by 16")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table, with all fields, to FILE too")
    options = parser.parse_args(argv)
    try:
        found = rows(options.names, every_shape=True if options.all else None)
    except (RuntimeError, ValueError) as error:
        print(f"compile_gate: {error}", file=sys.stderr)
        return 2
    status = report(found, wide=options.wide)
    if options.csv is not None:
        try:
            write_csv(options.csv, found)
        except OSError as error:
            print(f"compile_gate: {error}", file=sys.stderr)
            return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
