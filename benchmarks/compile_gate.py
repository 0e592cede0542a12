"""python -m benchmarks.compile_gate [--all] [--csv FILE] [NAME ...]: compile every kernel for four GPUs, with no GPU, and hold it to its budget.

Public functions run on tensors without storage, forward and backward (benchmarks/paper_gpu.py), so signature, alignment and constexprs are
the launchers' own. For sm_80, sm_90, sm_100 and gfx942 the table shows each distinct kernel: its configuration, registers of a thread, shared
memory of a block, bytes that a thread spills to local memory, the matrix instruction it declares and the one found in it, and occupancy.
Last come the types of its arguments, with D where Triton relies on divisibility by 16.

The exit status is 1, and a line says why, where a kernel does not compile, wants more shared memory than the GPU has, spills more than its
case's written budget, lacks the matrix instruction that it declares, or has one that it does not declare.

A run takes the first shape of each case in bf16, fp32 and fp16, and every shape of kernels whose files differ from the branch this one
left, or from the last commit; --all takes every shape of every case. Triton's cache keeps what was compiled.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from nanotrain.kernels.runtime import triton

from benchmarks.kernel_cases import CASES, Case, results, select, upstream, wanted
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
        return found

    def __str__(self):
        return f"{self.kernel} ({self.case}, {self.config}, {self.dtype}, {self.target}, shape {self.shape})"


# Limits of one block and of one multiprocessor. NVIDIA: CUDA C++ Programming Guide, "Compute Capabilities". AMD: LLVM's AMDGPU backend
# (AMDGPUBaseInfo.cpp and GCNSubtarget.cpp, for gfx942).

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Shared memory that a block may ask for [bytes]."""

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
        most, memory, needed = 32, 64 << 10, _rounded(shared, 512)
    else:
        # 64 warps, 32 blocks and 65,536 registers, which each of 4 schedulers gives out to whole warps by 256. A block takes 1 KiB of shared
        # memory beside its own, which is given out by 128 bytes; the multiprocessor has 1 KiB more than a block may ask for.
        slots = 4 * (16384 // _rounded(32 * max(registers, 1), 256))
        blocks = min(slots // warps, 64 // warps, 32, TENSOR_MEMORY // columns if columns else 32)
        most, memory, needed = 64, SHARED_LIMIT[target] + 1024, _rounded(shared, 128) + 1024
    return min(blocks, memory // needed if needed else blocks) * warps / most


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


def _product(assembly: str) -> str:
    return "+".join(name for name, text in _PRODUCTS.items() if text in assembly) or "-"


def _row(case: Case, shape: tuple, dtype: torch.dtype, binary: Binary) -> Row:
    registers = spills = scalars = 0
    if not binary.error:
        registers, spills, scalars = (_nvidia_resources if binary.target in NVIDIA else _amd_resources)(binary)
    return Row(
        case=case.title, kernel=binary.kernel, config=binary.config, dtype=str(dtype).removeprefix("torch."), target=binary.target,
        registers=registers, shared=binary.shared, spills=spills, declared=case.product(binary.kernel, dtype, binary.target),
        found=_product(binary.assembly), occupancy=0.0 if binary.error else occupancy(
            binary.target, registers, binary.shared, binary.warps, scalars=scalars, columns=binary.tensor_memory,
        ),
        specialization=binary.specialization, shape="x".join(map(str, shape)), budget=case.stack.get((binary.kernel, binary.target), 0),
        tensor_memory=binary.tensor_memory, identity=binary.identity, error=binary.error,
    )  # fmt: skip


def compile_case(case: Case, shape: tuple, dtype: torch.dtype, target: str) -> list[Row]:
    """The kernels that one call of a case launches, and its backward, as `target`'s compiler makes them; a call that fails is a row too."""
    with paper_gpu(target) as binaries:
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


def _compile(job: tuple[int, int, str]) -> list[Row]:
    """The rows of case number `index` on its first `count` shapes."""
    index, count, target = job
    case = CASES[index]
    return [row for shape in case.shapes[:count] for dtype in case.dtypes for row in compile_case(case, shape, dtype, target)]


def rows(names: Sequence[str] = (), *, every_shape: bool | None = None, targets: Iterable[str] = TARGETS, workers: int = 2) -> list[Row]:
    """Every distinct kernel of the named functions, or of all, on every target.

    `every_shape` None takes the first shape of each case, and every shape of those whose files have changed. Raises ValueError for a name
    that is none, RuntimeError where Triton cannot compile in this process.
    """
    with paper_gpu(TARGETS[0]):
        pass  # says now, and not from a worker, why nothing could be compiled
    changed = changed_modules() if every_shape is None else set()
    chosen, jobs = select(names), []
    for target in targets:
        for index, case in enumerate(CASES):
            if case in chosen:
                jobs.append((index, len(case.shapes) if every_shape or case.module in changed else 1, target))
    # A job is as long as its case has shapes: the long ones first, so that no worker is left with one at the end.
    jobs.sort(key=lambda job: -job[1])
    # Workers start afresh: Triton's compilers, like autograd, do not survive a fork of a process that has used them.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        found = [row for part in pool.map(_compile, jobs) for row in part]
    return distinct(found)


def distinct(found: Iterable[Row]) -> list[Row]:
    """Each binary, and each promise of it, once: by kernel, configuration, dtype and target."""
    once = {}
    for row in found:
        once.setdefault((row.kernel, row.target, row.identity or row.config, row.error, row.declared, row.budget), row)
    order = {case.title: number for number, case in enumerate(CASES)}
    return sorted(once.values(), key=lambda r: (order.get(r.case, len(order)), r.kernel, r.config, r.dtype, TARGETS.index(r.target)))


def changed_modules() -> set[str]:
    """Modules of kernels/ that differ from the branch this one left, or on that branch itself from the commit before; none without git.

    A module is changed too where one that it takes Triton functions from is.
    """
    base = next((b for ref in ("origin/HEAD", "origin/main", "origin/master") if (b := _git("merge-base", "HEAD", ref))), "")
    if base == _git("rev-parse", "HEAD"):
        base = ""
    base = base or _git("rev-parse", "--verify", "--quiet", "HEAD~1") or "HEAD"
    paths = f"{_git('diff', '--name-only', base)}\n{_git('ls-files', '--others', '--exclude-standard')}".split()
    changed = {Path(path).stem for path in paths if re.fullmatch(r"kernels/\w+\.py", path)} - {"runtime", "native", "cpu"}
    for path in (ROOT / "kernels").glob("*.py"):
        if changed & set(re.findall(r"^from nanotrain\.kernels\.(\w+) import", path.read_text(), re.MULTILINE)):
            changed = changed | {path.stem}
    return changed


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "kernel": lambda r: r.kernel,
    "config": lambda r: r.config,
    "dtype": lambda r: r.dtype,
    "target": lambda r: r.target,
    "registers": lambda r: str(r.registers),
    "shared": lambda r: f"{r.shared:,}",
    "spills": lambda r: f"{r.spills:,}",
    "declared": lambda r: r.declared,
    "found": lambda r: r.found,
    "occupancy": lambda r: "-" if r.error else f"{r.occupancy:.0%}",
    "arguments": lambda r: "does not compile" if r.error else r.specialization,
}

_NUMBERS = ("registers", "shared", "spills", "occupancy")


def table(found: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [list(_COLUMNS), *([show(row) for show in _COLUMNS.values()] for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if name in _NUMBERS else cell.ljust(w) for cell, w, name in zip(line, widths, _COLUMNS, strict=True)).rstrip()
        for line in lines
    )


def write_csv(path: Path, found: Sequence[Row]) -> None:
    """The rows with all their fields."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, Row.__dataclass_fields__)
        writer.writeheader()
        writer.writerows(vars(row) for row in found)


def report(found: Sequence[Row]) -> int:
    """Print the table and every reason to fail; the exit status."""
    print(table(found))
    reasons = [reason for row in found for reason in row.reasons()]
    for reason in reasons:
        print(f"compile_gate: {reason}")
    print(f"{len(found)} kernels, {len(reasons)} broken budgets")
    return 1 if reasons else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where every budget is kept, 1 where one is broken, 2 where nothing can be compiled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_gate", description=__doc__.split("\n\n")[0].split(": ", 1)[1])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(dict.fromkeys(case.name for case in CASES))}")
    parser.add_argument("--all", action="store_true", help="every shape of every case")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table, with all fields, to FILE too")
    options = parser.parse_args(argv)
    try:
        found = rows(options.names, every_shape=True if options.all else None)
    except (RuntimeError, ValueError) as error:
        print(f"compile_gate: {error}", file=sys.stderr)
        return 2
    if options.csv is not None:
        write_csv(options.csv, found)
    return report(found)


if __name__ == "__main__":
    sys.exit(main())
