"""The compile gate: its table of a real kernel on four targets, and that it fails on every budget that is broken.

Kernels are decorated for the interpreter in this process, so what compiles runs in processes of its own.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nanotrain.kernels import attention, attention_configs

from benchmarks import compile_gate
from benchmarks.cases import results, upstream, wanted
from benchmarks.compile_gate import occupancy
from benchmarks.kernel_cases import CASES, select
from benchmarks.paper_gpu import TARGETS, paper_gpu

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=ROOT, env=env)


def test_the_table_of_a_kernel_on_four_targets(tmp_path):
    done = run("-m", "benchmarks.compile_gate", "--csv", tmp_path / "gate.csv", "swiglu")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for column in ("kernel", "config", "dtype", "target", "registers", "shared", "spills", "declared", "found", "occupancy"):
        assert column in lines[0].split()
    with (tmp_path / "gate.csv").open() as file:
        rows = list(csv.DictReader(file))
    version = rows[0]["triton"]
    assert version[0].isdigit() and lines[-1] == f"{len(rows)} kernels compiled by Triton {version}, 0 broken budgets"
    assert len(rows) == len(lines) - 2 and max(map(len, lines)) <= 160
    for target in TARGETS:
        for dtype in ("float32", "bfloat16", "float16"):
            kernels = {row["kernel"] for row in rows if (row["target"], row["dtype"]) == (target, dtype)}
            assert any("forward" in name for name in kernels) and any("backward" in name for name in kernels)
    for row in rows:
        assert 8 <= int(row["registers"]) <= 256 and row["spills"] == "0" and row["declared"] == row["found"] == "-"
        assert 0 < float(row["occupancy"]) <= 1 and "warps=" in row["config"] and "D" in row["specialization"]


BROKEN = '''
"""Kernels that break a budget each, and the gate's reasons, as JSON."""
import json
import re
import torch
from benchmarks.cases import Case
from benchmarks.compile_gate import TARGETS, compile_case, report
from benchmarks.kernel_cases import select
from benchmarks.paper_gpu import paper_gpu
from nanotrain.kernels.norm import rms_norm
from nanotrain.kernels.runtime import jit, launch, tl, triton


@jit
def _plain_kernel(x, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    tl.store(x + offset, tl.load(x + offset) + 1)


@jit
def _spilling_kernel(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offset = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    values = tl.load(x + offset)
    tl.store(x + offset, values * tl.sum(values))


@jit
def _product_kernel(x, depth, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    row, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    left = x + row[:, None] * depth + k[None, :]
    right = x + row[None, :] * depth + k[:, None]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK_K):
        total = tl.dot(tl.load(left + start), tl.load(right + start), total)
    tl.store(x + row[:, None] * BLOCK + row[None, :], total.to(x.dtype.element_ty))


@jit
def _specialized_kernel(x, BLOCK: tl.constexpr, SPECIALIZED: tl.constexpr):
    for start in tl.range(0, 4, warp_specialize=SPECIALIZED):  # no tile is copied, so there is nothing to specialize for
        tl.store(x + start * BLOCK + tl.arange(0, BLOCK), start)


@jit
def _meaningless_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), missing)


def case(call, **options):
    make = lambda shape, dtype, device: {"x": torch.empty(shape, dtype=dtype, device=device)}
    return Case("broken", "none", ((1 << 20,),), make, lambda inputs, impl: call(inputs["x"]), lambda shape, dtype: (0, 0), **options)


def refused(x):
    raise ValueError("this launcher takes no such tensor")


def plain(x):
    launch(_plain_kernel, (1,), x, BLOCK=128)


def spilling(x):
    launch(_spilling_kernel, (1,), x, ROWS=256, COLUMNS=128, num_warps=1)


def product(x, stages=2, block_k=64):
    launch(_product_kernel, (1,), x, 4096, BLOCK=128, BLOCK_K=block_k, num_warps=4, num_stages=stages)


float32, bfloat16 = torch.float32, torch.bfloat16
declared = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
has_product = {"product": lambda kernel, dtype, target: declared[target]}
cases = {
    "kept": [(case(plain), float32, t) for t in TARGETS] + [(case(product, **has_product), bfloat16, t) for t in TARGETS],
    "spills": [(case(spilling), float32, t) for t in TARGETS],
    "spills within its budget": [(case(spilling, stack={("_spilling_kernel", t): 1 << 16}), float32, t) for t in TARGETS],
    "shared": [(case(lambda x: product(x, 6, 128), **has_product), bfloat16, t) for t in ("sm_80", "sm_90", "sm_100")],
    "lacks": [(case(plain, product=lambda *_: "wgmma"), float32, "sm_90")],
    "unspecialized": [(case(lambda x: launch(_specialized_kernel, (1,), x, BLOCK=128, SPECIALIZED=True)), float32, "sm_90")],
    "undeclared": [(case(product), bfloat16, t) for t in TARGETS],
    "meaningless": [(case(lambda x: (launch(_meaningless_kernel, (1,), x, BLOCK=16), plain(x))), float32, "sm_80")],
    "refused": [(case(refused), float32, "sm_80")],
    "idle": [(case(lambda x: None), float32, "sm_80")],
}
found = {}
for name, jobs in cases.items():
    rows = [row for c, dtype, target in jobs for row in compile_case(c, c.shapes[0], dtype, target)]
    found[name] = {"status": report(rows), "rows": len(rows), "reasons": [reason for row in rows for reason in row.reasons()]}

found["hopper"] = []
for c in select(["flash_attention"]):
    if c.variant in ("", "full"):
        found["hopper"] += [
            [r.kernel, r.config, r.found, r.specialized, r.spills] for r in compile_case(c, c.shapes[0], bfloat16, "sm_90") if "delta" not in r.kernel
        ]

found["atomics"] = {}
for c in select(["flash_attention"]):
    if c.variant in ("", "atomics"):
        inputs = c.make(c.shapes[0], bfloat16, "meta")
        with paper_gpu("sm_90") as binaries:
            out = c.call(inputs, "triton")
            torch.autograd.grad(out, [inputs[name] for name in "qkv"], torch.empty_like(out))
        found["atomics"][c.variant] = [b.kernel for b in binaries if re.search(r"\\b(atom|red)\\.", b.assembly)]

found["specializations"] = []
memory = torch.empty(1024, device="meta")
for x in (memory[:256].view(4, 64), memory[:252].view(4, 63), memory[1:257].view(4, 64)):
    with paper_gpu("sm_90") as binaries:
        for _ in range(2):
            rms_norm(x, memory[: x.shape[1]], impl="triton")
    found["specializations"].append([[b.kernel, b.config, b.specialization, b.identity] for b in binaries])
found["restored"] = triton.runtime.driver._active is None and triton.JITFunction.run.__name__ == "run"
print("JSON", json.dumps(found))
'''


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict:
    """What the gate says of each set of kernels in BROKEN."""
    script = tmp_path_factory.mktemp("broken") / "broken_kernels.py"
    script.write_text(BROKEN)
    done = run(script, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.split("JSON ")[1])


def test_kept_budgets_pass(broken):
    for name, kernels in (("kept", 8), ("spills within its budget", 4)):
        assert broken[name] == {"status": 0, "rows": kernels, "reasons": []}


@pytest.mark.parametrize(
    ("name", "count", "reason"),
    [
        ("spills", 4, "bytes, its budget is 0"),
        ("shared", 3, "bytes of shared memory, sm_"),
        ("lacks", 1, "declares the matrix instruction wgmma, found -"),
        ("unspecialized", 1, "asks for specialized warps, found no setmaxnreg"),
        ("undeclared", 4, "declares the matrix instruction -, found "),
        ("meaningless", 1, "does not compile: CompilationError: NameError('missing is not defined')"),
        ("refused", 1, "does not compile: ValueError: this launcher takes no such tensor"),
        ("idle", 1, "does not compile: RuntimeError: the call launched no kernel"),
    ],
)
def test_a_broken_budget_fails_with_a_line_that_says_why(broken, name, count, reason):
    assert broken[name]["status"] == 1
    reasons = broken[name]["reasons"]
    assert len(reasons) == count and all(reason in line and "\n" not in line for line in reasons)


def test_a_kernel_that_does_not_compile_hides_no_other(broken):
    assert broken["meaningless"]["rows"] == 2


def test_attention_on_hopper_has_specialized_warps(broken):
    """Forward and backward of heads of 128 channels, causal, and of 64, full; the compiler cannot specialize the kernel that owns queries."""
    assert len(broken["hopper"]) == 6
    for kernel, config, *found in broken["hopper"]:
        specialized = "queries" not in kernel
        assert ("SPECIALIZED=True" in config.split()) == specialized and found == ["wgmma", specialized, 0]
    assert {config.split()[1] for _, config, *_ in broken["hopper"]} == {"D=64", "D=128"}


def test_specialized_warps_share_128_rows():
    """Two groups of warps take half of them each: of 64 both would compute all."""
    for target, kernels in attention_configs._SPECIALIZED.items():
        for kernel, rows in kernels.items():
            for _, *tiles in rows:
                owned = [(queries if kernel == "forward" else keys) for queries, keys, *_ in filter(None, tiles)]
                assert target == "interpreter" or owned == [128]


def test_only_what_need_not_repeat_adds_by_atomics(broken):
    assert broken["atomics"] == {"": [], "atomics": ["_attention_keys_backward_kernel"]}


CRASHES = """
import os, signal, sys
import torch
from benchmarks import compile_gate
from benchmarks.cases import Case
from nanotrain.kernels.runtime import jit, launch, tl, triton


@jit
def _plain_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 1)


@jit
def _deadly_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 2)


def crash(function, *arguments, **options):
    if function is _deadly_kernel and options["BLOCK"] == 32:
        os.kill(os.getpid(), signal.SIGSEGV)
    return run(function, *arguments, **options)


def call(inputs, impl):
    launch(_plain_kernel, (1,), inputs["x"], BLOCK=len(inputs["x"]))
    launch(_deadly_kernel, (1,), inputs["x"], BLOCK=len(inputs["x"]))


run = triton.JITFunction.run
triton.JITFunction.run = crash
compile_gate.CASES = [Case("deadly", "none", (), lambda shape, dtype, device: {"x": torch.empty(shape, device=device)}, call, None)]
if __name__ == "__main__":
    calls = [(0, (size,), torch.float32, "sm_90") for size in (16, 32, 64)]
    sys.exit(compile_gate.report(compile_gate.compile_calls(calls, workers=1)))
elif len(sys.argv) > 1:
    sys.exit(3)
"""


def test_a_crash_of_the_compiler_is_a_row_and_hides_no_other_call(tmp_path):
    """The crash takes a process that compiles with it, as LLVM's do; with an argument such a process does not even begin."""
    (tmp_path / "crashes.py").write_text(CRASHES)
    done = run(tmp_path / "crashes.py", PYTHONPATH=str(ROOT))
    assert done.returncode == 1, done.stderr
    *table, reason, last = done.stdout.splitlines()
    assert [(line.split()[0], line.split()[9]) for line in table[1:]] == [
        ("plain", "BLOCK=16"), ("deadly", "BLOCK=16"), ("deadly", "BLOCK=32"), ("plain", "BLOCK=64"), ("deadly", "BLOCK=64"),
    ]  # fmt: skip
    assert reason == (
        "compile_gate: _deadly_kernel (deadly, BLOCK=32, float32, sm_90, shape 32): does not compile: it ends the compiler's process (SIGSEGV)"
    )
    assert last.startswith("5 kernels") and last.endswith("1 broken budgets")
    done = run(tmp_path / "crashes.py", "now", PYTHONPATH=str(ROOT))
    assert done.returncode == 1 and "RuntimeError: a process for the compiler ended before it began (exit status 3)" in done.stderr


def test_the_signature_is_the_launchers(broken):
    """An odd width, and an x that begins off a multiple of 16 bytes, are other specializations of the same configuration."""
    aligned, odd, shifted = broken["specializations"]
    assert [len(binaries) for binaries in (aligned, odd, shifted)] == [1, 1, 1]  # the second call of each launches the same
    (aligned,), (odd,), (shifted,) = aligned, odd, shifted
    assert aligned[:2] == odd[:2] == shifted[:2] and len({aligned[3], odd[3], shifted[3]}) == 3
    assert aligned[2].startswith("*fp32D") and not shifted[2].startswith("*fp32D")
    assert aligned[2].count("i32D") > odd[2].count("i32D")


def test_the_paper_gpu_leaves_triton_as_it_was(broken):
    assert broken["restored"]


def test_an_interpreted_process_is_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), paper_gpu("sm_90"):
        pass
    done = run("-m", "benchmarks.compile_gate", "swiglu", TRITON_INTERPRET="1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("compile_gate: ") and done.stderr.count("\n") == 1 and "TRITON_INTERPRET is set" in done.stderr


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no target sm_12; there are sm_80"), paper_gpu("sm_12"):
        pass
    with pytest.raises(ValueError, match="no kernel is named swigloo; there are rms_norm"):
        select(["swigloo"])


def test_occupancy():
    # NVIDIA's calculator: registers are given out by 256 to a warp, shared memory by 128 bytes, with 1 KiB more for every block.
    assert occupancy("sm_90", registers=32, shared=0, warps=8) == 1.0
    assert occupancy("sm_90", registers=33, shared=0, warps=8) == 48 / 64
    assert occupancy("sm_80", registers=128, shared=0, warps=8) == 16 / 64
    assert occupancy("sm_80", registers=32, shared=48 << 10, warps=4) == 12 / 64
    assert occupancy("sm_80", registers=32, shared=163 << 10, warps=4) == 4 / 64
    assert occupancy("sm_80", registers=32, shared=164 << 10, warps=4) == 0.0
    assert occupancy("sm_100", registers=16, shared=0, warps=1) == 32 / 64  # of at most 32 blocks
    assert occupancy("sm_100", registers=32, shared=0, warps=4, columns=256) == 8 / 64
    # A SIMD of gfx942 has 512 vector registers of each lane for at most 8 wavefronts, 7 with many scalar registers; a compute unit has 4 SIMDs.
    assert occupancy("gfx942", registers=64, shared=0, warps=4) == 1.0
    assert occupancy("gfx942", registers=65, shared=0, warps=4) == 28 / 32
    assert occupancy("gfx942", registers=64, shared=0, warps=4, scalars=112) == 28 / 32
    assert occupancy("gfx942", registers=64, shared=32 << 10, warps=8) == 16 / 32
    assert occupancy("gfx942", registers=512, shared=0, warps=8) == 0.0


def test_every_shape_of_what_has_changed(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *arguments], check=True, cwd=tmp_path, capture_output=True)

    monkeypatch.setattr(compile_gate, "ROOT", tmp_path)
    assert compile_gate.changed_modules() == set()  # no repository
    (tmp_path / "kernels").mkdir()
    for name in ("runtime", "random", "norm", "gated"):
        (tmp_path / "kernels" / f"{name}.py").write_text("")
    (tmp_path / "kernels" / "dropout.py").write_text("from nanotrain.kernels.random import philox\n")
    (tmp_path / "kernels" / "block.py").write_text("from nanotrain.kernels.dropout import dropout_add\n")
    (tmp_path / "kernels" / "norm.py").write_text("from nanotrain.kernels.runtime import jit\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    assert compile_gate.changed_modules() == set()  # no commit before this one
    (tmp_path / "kernels" / "gated.py").write_text("# committed\n")
    git("commit", "-qam", "gated")
    (tmp_path / "kernels" / "embedding.py").write_text("# not yet tracked\n")
    assert compile_gate.changed_modules() == {"gated", "embedding"}
    (tmp_path / "kernels" / "random.py").write_text("# used by dropout\n")
    (tmp_path / "kernels" / "cpu.py").write_text("# for CPUs\n")
    assert compile_gate.changed_modules() == {"gated", "embedding", "random", "dropout", "block"}
    git("update-ref", "refs/remotes/origin/main", "HEAD~1")
    git("commit", "-qam", "random")
    assert "gated" in compile_gate.changed_modules() and "norm" not in compile_gate.changed_modules()
    (tmp_path / "kernels" / "runtime.py").write_text("# used by all\n")
    assert "norm" in compile_gate.changed_modules()
    git("checkout", "-q", "--", ".")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "attention_cases.py").write_text("# other shapes\n")
    assert {"attention", "decode"} <= compile_gate.changed_modules() and "norm" not in compile_gate.changed_modules()
    (tmp_path / "benchmarks" / "kernel_cases.py").write_text("# other shapes\n")
    assert {case.module for case in CASES} <= compile_gate.changed_modules()


def test_cases_name_what_there_is():
    for case in CASES:
        assert (ROOT / "kernels" / f"{case.module}.py").is_file(), case.title
    titles = [case.title for case in CASES]
    assert len(titles) == len(set(titles))


def test_what_is_always_compiled_reaches_every_kernel(monkeypatch):
    """In every dtype in which the other shapes reach it, and every kernel that there is."""
    reached = set()

    def launched(kernel, *arguments, **options):
        reached.add((kernel.__name__, str(dtype)))

    for module in [module for name, module in sys.modules.items() if name.startswith("nanotrain.kernels.")]:
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", launched)
    monkeypatch.setattr(attention_configs, "architecture", lambda device: "sm_90")
    for always in (True, False):
        for case in CASES:
            for shape in case.shapes[: case.always] if always else case.shapes[case.always :]:
                for dtype in case.dtypes:
                    inputs = case.make(shape, dtype, "meta")
                    outputs = [x for x in results(case.call(inputs, "triton")) if x.requires_grad]
                    if outputs:
                        torch.autograd.grad(outputs, wanted(inputs), upstream(outputs))
        if always:
            first = set(reached)
    assert first == reached
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    written = {name for text in sources for name in re.findall(r"^@jit(?:\([^)]*\)+)?\ndef (_\w+_kernel)\(", text, re.MULTILINE)}
    assert {name for name, _ in first} == written


def test_the_bytes_of_embedding_are_of_rows_that_occur():
    case = next(case for case in CASES if case.name == "embedding")
    tokens, vocabulary, width = shape = (20000, 5000, 8)
    torch.manual_seed(0)
    occurring = len(case.make(shape, torch.float32, "cpu")["tokens"].unique())
    assert occurring < 0.9 * vocabulary
    assert case.cost(shape, torch.float32)[0] == pytest.approx(4 * width * (occurring + tokens) + 8 * tokens, rel=0.005)


@pytest.mark.parametrize("T,S", [(1, 1), (9, 9), (5, 14), (14, 5)])
@pytest.mark.parametrize("options", [{}, {"causal": False}, *({"window": window} for window in (1, 4, 9, 20))])
def test_the_pairs_that_attention_counts(T, S, options):
    i, j = torch.arange(T)[:, None] + S - T, torch.arange(S)
    pairs = ((j <= i) | (not options.get("causal", True))) & (j > i - options.get("window", 100))
    found = attention.cost((2, T, S, 6, 3, 16, 8), torch.float16, **options)
    assert found == (2 * 2 * (T * 6 + S * 3) * (16 + 8), 2 * 2 * 6 * pairs.sum().item() * (16 + 8))


def test_the_cost_of_attentions_cases():
    """Documents never see each other, a prefix is seen by all, and a backward makes 5 products for the forward's 2."""
    cases = {case.variant: case for case in CASES if case.name == "flash_attention"}
    for variant, shape in (("packed", (1, 640, 640, 4, 1, 16)), ("prefix", (2, 640, 640, 4, 1, 16)), ("bias", (2, 40, 40, 4, 1, 16))):
        case = cases[variant]
        inputs = case.make(shape, torch.float16, "cpu")
        i, j = torch.arange(shape[1])[:, None], torch.arange(shape[1])
        visible = (j <= i) | (j < {"prefix": 512, "bias": 40}.get(variant, 0))
        if variant == "packed":
            document = torch.bucketize(torch.arange(shape[1]), inputs["cu_seqlens"][1:], right=True)
            visible &= document[:, None] == document
            assert tuple(inputs["cu_seqlens"].diff()) == inputs["lengths"] and len(set(inputs["lengths"])) > 8
        (nbytes, flops), (backward_bytes, backward_flops) = (f(shape, torch.float16) for f in (case.cost, case.backward_cost))
        assert flops == 4 * 16 * 4 * shape[0] * visible.sum() and backward_flops == 2.5 * flops
        tensors = {name: 2 * inputs[name].numel() for name in ("q", "k", "v", "bias") if name in inputs}
        assert nbytes == sum(tensors.values()) + tensors["q"]
        assert backward_bytes == 2 * (sum(tensors.values()) + tensors["q"]) + 4 * shape[0] * 4 * shape[1]


def test_the_bytes_of_a_window_are_of_keys_that_are_read():
    case = next(case for case in CASES if case.title == "decode_attention (window, soft cap)")
    B, _, _, H, K, D = shape = case.shapes[0]
    assert case.cost(shape, torch.float16)[0] == 2 * B * D * (2 * 4096 * K + 2 * H)


def test_torchs_orthogonalisation_is_the_same_kind_of_matrix(monkeypatch):
    """In fp32 here: what it is on a GPU's bf16 is not compared, as its coefficients are others."""
    case = next(case for case in CASES if case.name == "orthogonalize")
    assert set(case.unlike) <= case.peers.keys()
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    matrices = torch.randn(3, 24, 60)
    for matrix, found in zip(matrices, case.peers["torch.optim"]()({"matrices": matrices}), strict=True):
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        assert (left.T @ found @ right.T - torch.eye(24)).abs().max() < 0.4
