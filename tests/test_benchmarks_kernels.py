"""The benchmarks of kernels, as far as they can be shown without a GPU: what they refuse, and how they count."""

import csv
import itertools
import math
import os
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from nanotrain.kernels import attention_backward, attention_configs, attention_forward

from benchmarks import gpu, kernels, roofline, step
from benchmarks.cases import Case
from benchmarks.common import quantiles
from benchmarks.kernel_cases import CASES
from benchmarks.roofline import H100, Board, Point, Roof, picture, roof_of, stated
from nanotrain import environment

FACTS = {"machine": "here", "commit": "0123", "dirty": False, "power_cap_watts": "", "date": "2026-01-02"}


class FakeTimer:
    """Runs a call, and says that it took so long."""

    def __init__(self, *seconds):
        self.seconds, self.leads = itertools.cycle(seconds or (1e-3,)), []

    def __call__(self, call, lead):
        call()
        self.leads.append(lead)
        return next(self.seconds), 2e-3

    def peak(self, call):
        call()
        return 4096


def make(shape, dtype, device):
    return {"x": torch.randn(shape, dtype=dtype, device=device).requires_grad_(), "scale": torch.randn(shape[-1], device=device, dtype=dtype)}


def right(inputs):
    return inputs["x"] * inputs["scale"]


def case(wrong=None, peers=None, **options):
    """x times scale, whose gradient is the upstream one times scale; `wrong` serves in place of the kernel."""

    def call(inputs, impl):
        return (right if impl == "reference" or wrong is None else wrong)(inputs)

    def cost(shape, dtype):
        return 2 * shape[0] * shape[1] * dtype.itemsize, shape[0] * shape[1]

    options = dict(backward_cost=cost) | options
    return Case("times", "none", ((8, 16), (2, 3)), make, call, cost, peers={n: (lambda f=f: f) for n, f in (peers or {}).items()}, **options)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench(case, ...) -> (Bench, rows written)."""

    def run(one, timer=None, dtypes=(torch.float32,), seconds=math.inf, roof=H100):
        peers = tuple(one.peers)
        columns = (*kernels.COLUMNS, *(f"{peer}_{what}" for peer in peers for what in ("ms", "ratio", "peak_bytes")))
        path = tmp_path / "table.csv"
        path.unlink(missing_ok=True)
        table = kernels.Table(path, tuple(dict.fromkeys(columns)), FACTS, kernels.KEY)
        found = kernels.Bench("cpu", timer or FakeTimer(), roof, table, rounds=5)
        found.left = found.run(kernels.workloads([one], dtypes), seconds)
        found.points, found.commits = kernels.points_of(table, [one])
        return found, rows_in(path)

    return run


def rows_in(path):
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def test_percentiles():
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    assert quantiles([7.0, 7.0]) == (7.0, 7.0, 7.0)


def test_the_roof():
    roof = Roof("a GPU", 2e12, 400e12)
    assert roof.ridge == 200
    assert roof.seconds(2e12, 1) == 1.0 and roof.seconds(1, 800e12) == 2.0
    assert Roof("a GPU", 2e12, None).seconds(2e12, 1e30) == 1.0
    names = {"NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H100 PCIe": 2.0e12, "NVIDIA A100-SXM4-80GB": 2.039e12, "NVIDIA A100 80GB PCIe": 1.935e12,
             "NVIDIA A100-SXM4-40GB": 1.555e12, "NVIDIA GeForce RTX 4090": 1.008e12}  # fmt: skip
    assert {name: stated(name).bandwidth for name in names} == names
    # A GPU that the table lacks has the bandwidth that its clock and bus give, or no roof.
    assert roof_of("Something New", Board(bandwidth=1e12)) == Roof("Something New", 1e12, None)
    assert roof_of("Something New", Board()) is None


def test_one_table_of_peaks_for_the_roof_and_for_utilisation(monkeypatch):
    known = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA GH200 480GB": 989e12,
             "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None, "Something New": None}  # fmt: skip
    for name, flops in known.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert environment.peak_flops(torch.device("cuda")) == flops
        assert (stated(name).flops if flops else stated(name)) == flops
    assert environment.peak_flops(torch.device("cpu")) is None


def test_the_bandwidth_of_an_unknown_gpu_is_that_of_its_highest_clock(monkeypatch):
    nvml = types.SimpleNamespace(
        NVML_CLOCK_MEM=2, nvmlDeviceGetEnforcedPowerLimit=lambda handle: 350_000, nvmlDeviceGetMaxClockInfo=lambda handle, clock: 1000 * clock,
        nvmlDeviceGetMemoryBusWidth=lambda handle: 512, nvmlSystemGetDriverVersion=lambda: "580.1",
    )  # fmt: skip
    monkeypatch.setattr(roofline, "GpuWatch", lambda device: types.SimpleNamespace(nvml=nvml, handle=None))
    assert roofline.board(torch.device("cuda")) == Board(350.0, 2000, 256e9, "580.1")


# Where rows come from, and where they go


def test_the_stamp_names_a_commit_and_calls_only_sources_changed(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)

    monkeypatch.setattr(environment, "ROOT", tmp_path)
    found = kernels.stamp(Board())
    assert (found["commit"], found["dirty"], found["power_cap_watts"]) == ("", "", "")
    assert "power_cap" not in kernels.stamped(found) and "dirty" not in kernels.stamped(found)
    assert {"driver", "liger", "transformers", "triton"} <= found.keys() and kernels.stamp(Board(driver="580.1"))["driver"] == "580.1"
    found = kernels.stamp(Board(), "0123456789abcdef")  # of a copy
    assert (found["commit"], found["dirty"]) == ("0123456789ab", "")
    source, result = tmp_path / "a.py", tmp_path / "benchmarks" / "results" / "a.csv"
    result.parent.mkdir(parents=True)
    source.write_text("1"), result.write_text("1")
    git("init"), git("add", "."), git("commit", "-m", "first")
    head = environment.git("rev-parse", "HEAD")
    result.write_text("2")
    assert [kernels.stamp(Board())[name] for name in ("commit", "dirty")] == [head[:12], False]
    source.write_text("2")
    assert kernels.stamp(Board())["dirty"] is True and kernels.stamp(Board(), head[:7])["dirty"] is True
    assert kernels.stamp(Board(), "0123456")["dirty"] == ""  # nothing is known of another commit


def test_rows_take_the_place_of_those_they_are_the_same_as(tmp_path):
    path = tmp_path / "table.csv"
    columns, key = ("kernel", "shape", "ms"), ("kernel", "shape")
    table = kernels.Table(path, columns, {"commit": "old"}, key)
    assert not path.exists()
    table.write(dict(kernel="a", shape="8", ms=1.0)), table.write(dict(kernel="b", shape="8", ms=2.0))
    with pytest.raises(ValueError, match="no column other"):
        table.write(dict(kernel="a", other=1))
    table = kernels.Table(path, (*columns, "wrong"), {"commit": "new"}, key)
    table.write(dict(kernel="a", shape="8", wrong="it is")), table.write(dict(kernel="a", shape="9", ms=3.0))
    assert [tuple(row.values()) for row in rows_in(path)] == [
        ("a", "8", "", "it is", "new"), ("b", "8", "2.0", "", "old"), ("a", "9", "3.0", "", "new"),
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("my,notes\n1,2\n")
    with pytest.raises(ValueError, match="has no columns kernel, shape"):
        kernels.Table(path, columns, {}, key)
    assert path.read_text() == "my,notes\n1,2\n"


def test_a_run_of_one_kernel_leaves_the_others_in_table_and_picture(tmp_path):
    cases = [case(), replace(case(), name="other")]

    def run(chosen, commit):
        table = kernels.Table(tmp_path / "table.csv", kernels.COLUMNS, FACTS | {"commit": commit}, kernels.KEY)
        kernels.Bench("cpu", FakeTimer(), H100, table, rounds=2).run(kernels.workloads(chosen, [torch.float32]))
        return kernels.points_of(table, cases)

    assert run(cases, "old")[1] == ["old"]
    points, commits = run(cases[:1], "new")
    assert [point.label for point in points] == ["times", "times", "other", "other"] and commits == ["new", "old"]
    assert (points[0].nbytes, points[0].flops) == pytest.approx((1024, 128), rel=1e-3)
    assert "at commit new, old, the last 2026-01-02;" in kernels.note_of(FACTS, commits)


def test_the_picture_is_a_whole_svg_with_a_hollow_point_for_what_is_predicted():
    points = [Point("a<b", "forward", 1e9, 1e9, 5e-4, measured=True), Point("a<b", "backward", 1e9, 3e9, 6e-4, measured=False),
              Point("no FLOPs", "forward", 1e9, 0, 1e-4, measured=True)]  # fmt: skip
    text = picture(H100, points, "a & b")
    root = ElementTree.fromstring(text)
    circles = [element.get("class") for element in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert circles.count("forward") == circles.count("backward predicted") == 2  # in the picture, and in the legend
    share = H100.seconds(1e9, 1e9) / 5e-4
    labels = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert f"a<b forward {share:.0%}" in labels and "a<b backward" in labels and "a & b" in labels
    with pytest.raises(ValueError, match="nothing to draw"):
        picture(H100, points[2:])


def test_a_right_kernel_is_measured(bench):
    timer = FakeTimer(1e-3, 2e-3)  # of a peer and of ours in turn
    found, rows = bench(case(peers={"torch": right}), timer, dtypes=(torch.bfloat16, torch.float32))
    assert (found.failed, found.left) == (0, 0)
    # First shapes of all dtypes come first.
    assert [(r["shape"], r["dtype"], r["direction"]) for r in rows] == [
        (shape, dtype, way) for shape in ("8x16", "2x3") for dtype in ("bf16", "fp32") for way in ("forward", "backward")
    ]
    row = rows[2]
    assert row["wrong"] == "" and float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
    p50 = float(row["p50_ms"]) * 1e-3
    assert float(row["roof_share"]) == pytest.approx(H100.seconds(1024, 128) / p50, rel=1e-3)
    assert float(row["tflop_per_s"]) == pytest.approx(128 / p50 / 1e12, rel=1e-3)
    assert float(row["torch_ratio"]) == pytest.approx(float(row["torch_ms"]) / float(row["p50_ms"]), rel=1e-2)
    assert row["peak_bytes"] == row["torch_peak_bytes"] == "4096" and row["host_ms"] == "2.0" and row["commit"] == "0123"
    assert set(timer.leads) == {0.0, 3e-3}  # in the warm-up, and then by what the host took
    assert [p.measured for p in found.points] == [True, True]


def _nan(inputs):
    return torch.where(torch.arange(len(inputs["scale"])) == 1, math.nan, right(inputs))


def _gradient(inputs):
    return right(inputs) + (inputs["x"] - inputs["x"].detach())  # the right values, one too many in the gradient


def _raises(inputs):
    raise RuntimeError("no such kernel image\nand more")


WRONG = {
    "scaled": (lambda i: right(i) * 1.001, "output 0: error"),
    "one element": (lambda i: right(i) + torch.zeros_like(i["x"]).index_fill(0, torch.tensor([1]), 1e-4), "output 0: error"),
    "not a number": (_nan, "output 0: error nan"),
    "gradient": (_gradient, "gradient of x: error"),
    "shape": (lambda i: right(i)[:1], "RuntimeError: Mismatch in shape"),
    "too many": (lambda i: (right(i), right(i)), "RuntimeError: got 2 tensors and 1 gradients"),
    "dtype, forward alone": (lambda i: right(i).double(), "output 0 is (8, 16) torch.float64, not (8, 16) torch.float32"),
    "shape, forward alone": (lambda i: right(i)[:1], "output 0 is (1, "),
    "too many, forward alone": (lambda i: (right(i), right(i)), "returns output 0, output 1"),
    "raises": (_raises, "RuntimeError: no such kernel image"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_refused(bench, name, capsys):
    wrong, says = WRONG[name]
    found, rows = bench(case(wrong, **({"backward_cost": None} if name.endswith("forward alone") else {})))
    assert found.failed == 2 and not found.points
    assert "NOT REPORTED" in capsys.readouterr().out
    for row in rows:
        assert row["wrong"].startswith(says.replace("8, 16", row["shape"].replace("x", ", ")))
        assert not any(row[column] for column in ("p20_ms", "p50_ms", "p80_ms", "gb_per_s", "tflop_per_s", "roof_share", "host_ms"))


def test_inputs_are_made_anew_for_each_run(bench):
    """In-place kernels, and peers whose backward writes over what it was given, meet the same inputs each time."""
    seen = []

    class Destroys(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.save_for_backward(x, scale)
            return x * scale

        @staticmethod
        def backward(ctx, grad):
            x, scale = ctx.saved_tensors
            out = grad * scale
            seen.append((x.sum().item(), grad.sum().item()))
            x.data.zero_(), grad.zero_()
            return out, None

    found, rows = bench(case(peers={"destroys": lambda i: Destroys.apply(i["x"], i["scale"])}))
    assert not found.failed and all(row["destroys_ratio"] for row in rows)
    assert len(set(seen)) == 2  # one for each shape

    def in_place(inputs, impl):
        factor = 2 if impl == "reference" else found.factor
        with torch.no_grad():
            inputs["x"].mul_(factor)

    for found.factor, wrong in ((2, ""), (3, "input 0 after it: error")):
        case_in_place = Case("double", "none", ((8, 16),), make, in_place, lambda s, d: (1, 1), in_place=True)
        rows = bench(case_in_place)[1]
        assert [row["direction"] for row in rows] == ["forward"] and rows[0]["wrong"].startswith(wrong) and bool(rows[0]["wrong"]) == bool(wrong)


def test_a_peer_that_computes_something_else_or_fails_is_left_out(bench, capsys):
    found, rows = bench(case(peers={"torch": right, "other": lambda i: i["x"] + i["scale"], "fails": _raises}))
    assert not found.failed and all(row["torch_ratio"] and not row["other_ratio"] and not row["fails_ratio"] for row in rows)
    text = capsys.readouterr().out
    assert "other left out of times 8x16 fp32: output 0: error" in text and "fails left out of times 8x16 fp32: RuntimeError: no such" in text


SMALL = {"": (2, 40, 40, 4, 4, 16), "full": (2, 40, 40, 4, 4, 16), "grouped": (2, 40, 40, 4, 2, 16), "bias": (2, 40, 40, 4, 4, 16),
         "window": (1, 1100, 1100, 2, 2, 16), "packed": (1, 200, 200, 4, 1, 16), "prefix": (1, 600, 600, 2, 1, 16),
         "soft cap": (1, 40, 40, 2, 1, 16)}  # fmt: skip
"""Shapes for a CPU, by the variants of attention that have peers there."""


@pytest.mark.parametrize("variant", SMALL)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attentions_peers_do_the_same(variant, monkeypatch):
    """Those that a CPU runs: torch's operator, and FlexAttention as a formula, which has no backward there."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    one = next(c for c in CASES if (c.name, c.variant) == ("flash_attention", variant))
    peers = {name: function for name, function in one.installed_peers().items() if name in ("torch", "flex")}
    assert peers
    if "torch" in peers:
        assert kernels.Workload(one, SMALL[variant], torch.float32, "cpu").judge({"torch": peers["torch"]}) == {"torch": ""}
    if "flex" in peers:
        forward_alone = kernels.Workload(replace(one, backward_cost=None), SMALL[variant], torch.float32, "cpu")
        forward_alone.inputs = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in forward_alone.inputs.items()}
        assert forward_alone.judge({"flex": peers["flex"]}) == {"flex": ""}


def test_pipelined_specializes_no_warps_in_its_backward_either(monkeypatch):
    one, found, real = next(c for c in CASES if c.name == "flash_attention"), [], attention_configs.config
    for module in (attention_forward, attention_backward):
        monkeypatch.setattr(module, "config", lambda *arguments: found.append(real(*arguments)) or found[-1])
    work = kernels.Workload(one, (1, 20, 20, 1, 1, 16), torch.float32, "cpu")
    for function, specialized in ((lambda inputs: one.call(inputs, "triton"), True), (one.peers["pipelined"](), False)):
        found.clear()
        work.ready(function, "backward")()
        assert [c.specialized for c in found] == [specialized, specialized, False]  # the third kernel never


def test_decodings_peer_does_the_same():
    one = next(c for c in CASES if c.name == "decode_attention")
    work = kernels.Workload(one, (2, 1, 80, 4, 2, 16), torch.float32, "cpu")
    assert work.judge({"ours": lambda inputs: one.call(inputs, "triton"), "torch": one.peers["torch"]()}) == {"ours": "", "torch": ""}


def test_torch_compile_is_asked_for_first_shapes_alone(bench):
    rows = bench(case(peers={"torch": right, "torch.compile": right}), dtypes=(torch.float32, torch.float16))[1]
    found = {(row["shape"], bool(row["torch_ratio"]), bool(row["torch.compile_ratio"])) for row in rows}
    assert found == {("8x16", True, True), ("2x3", True, False)}


@pytest.mark.parametrize("who", ["ours", "peer"])
def test_a_lost_gpu_ends_the_run_and_blames_no_other_kernel(tmp_path, monkeypatch, capsys, who):
    lost = []

    def faults(inputs):
        lost.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def synchronize():
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    cases = [case(_raises), case(faults) if who == "ours" else case(peers={"peer": faults}), replace(case(), name="next")]
    cases[0] = replace(cases[0], name="before")  # wrong in a way that harms no other
    table = kernels.Table(tmp_path / "table.csv", kernels.COLUMNS, FACTS, kernels.KEY)
    bench = kernels.Bench("cpu", FakeTimer(), H100, table, rounds=2)
    assert kernels.conclude(bench, kernels.workloads(cases, [torch.float32]), math.inf, tmp_path / "roofline.svg") == 1
    wrong = f"the GPU was lost to {who}: RuntimeError: CUDA error"
    assert [(row["kernel"], row["wrong"][: len(wrong)]) for row in rows_in(table.path)[2:]] == [("times", wrong)] * 2
    assert f"stopped, for no call of this process can use the GPU after {who}: RuntimeError: CUDA error" in capsys.readouterr().err


def test_lines_fit_a_screen(bench, capsys):
    row = bench(case(peers={"torch": right, "torch.compile": right, "liger": right}))[1][0]
    capsys.readouterr()
    numbers = {name: float(value) for name, value in row.items() if value and name not in (*kernels.KEY, *FACTS)}
    text = kernels.line_of("linear_cross_entropy (mean)", row | numbers, ["ours", "torch", "torch.compile", "liger"])
    assert text.count("\n") == 1 and max(map(len, text.splitlines())) <= 120


def test_an_end_in_time_leaves_the_rest(bench):
    found, rows = bench(case(), seconds=0.0)
    assert found.left == 2 and rows == []


def test_without_a_gpu_the_gate_and_the_prediction_are_printed(tmp_path):
    code = (
        "import sys; from functools import partial; from benchmarks import compile_gate, kernels\n"
        "compile_gate.rows = partial(compile_gate.rows, targets=('sm_90',), workers=1)\n"
        "sys.exit(kernels.main(sys.argv[1:]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    arguments = ["geglu", "--dtype", "bf16", f"--svg={tmp_path / 'roof.svg'}"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    gate, predicted = done.stdout.split("\npredicted, not measured: ")
    assert "registers" in gate and "sm_90" in gate and "0 broken budgets" in gate
    assert "predicted us" in predicted and "of the roof" not in predicted and "GB/s" not in predicted
    row = next(line.split() for line in predicted.splitlines() if line.startswith("geglu") and "forward" in line)
    assert float(row[-1]) == pytest.approx(1e6 * float(row[-4]) * 1e6 / 3.35e12, rel=0.01)
    assert 'class="forward predicted"' in (tmp_path / "roof.svg").read_text()


def test_names_and_rounds_are_checked(capsys):
    assert kernels.main(["no_such"]) == 2 and "no kernel is named no_such" in capsys.readouterr().err
    assert kernels.main(["rms_norm", "--rounds=1"]) == 2 and "--rounds 1" in capsys.readouterr().err


def test_a_table_of_what_is_measured_needs_a_gpu(tmp_path, capsys):
    assert kernels.main(["rms_norm", f"--csv={tmp_path / 'none.csv'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gpu", "kernels", "step"])
def test_a_checkout_that_is_not_installed_is_told_how_to(name):
    done = subprocess.run([sys.executable, "-S", "-m", f"benchmarks.{name}"], capture_output=True, text=True, cwd=gpu.ROOT)
    assert done.returncode == 1 and "pip install -e . --no-deps --no-build-isolation" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [gpu, kernels, step])
def test_help_fits_a_screen_and_shows_defaults(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 90 and "default" in text and "--commit" in text
