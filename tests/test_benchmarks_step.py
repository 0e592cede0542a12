"""The benchmark of a whole step: its rows, its peers, who they are refused for, and where time is said to go."""

import importlib.util
import math
import types
from dataclasses import replace

import pytest
import torch

from benchmarks import step
from nanotrain.optim import OptimConfig
from tests.test_benchmarks_kernels import rows_in


@pytest.fixture(scope="module")
def ours():
    return step.Ours(step.task_of("nano", "cpu"))


def test_a_tiny_step_gives_sane_rows(tmp_path, monkeypatch, capsys):
    def absent(task, liger):
        raise ImportError("No module named 'peer'")

    class Other(step.Ours):
        def step(self):
            return 1.5 * super().step()

    monkeypatch.setattr(step, "MUON", OptimConfig(name="lion"))  # whose products in bf16 are slow on a CPU

    monkeypatch.setattr(step, "Peer", lambda task, liger: absent(task, liger) if liger else Other(task))
    monkeypatch.setattr(step, "peak_flops", lambda device: 1e9)
    path = tmp_path / "step.csv"
    assert step.main(["--model", "nano", "--steps", "2", f"--csv={path}"]) == 0
    assert "tiny, on a CPU" in capsys.readouterr().out
    rows = rows_in(path)
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("step", "peer", "part", "kernel off", "kernel off, muon")}
    assert list(dict.fromkeys(row["kind"] for row in rows)) == list(kinds)  # what is asked for most comes first
    (row,) = kinds["step"]
    assert int(row["tokens_per_s"]) == pytest.approx(64 / float(row["p50_ms"]) * 1e3, rel=0.01) and int(row["peak_bytes"]) > 0
    six = float(row["mfu_6n"])
    assert six < float(row["mfu_causal"]) < float(row["mfu_full"])
    assert float(row["mfu_causal"]) - six == pytest.approx(float(row["mfu_full"]) - float(row["mfu_causal"]), abs=3e-4, rel=1e-2)
    shares = {row["name"]: float(row["share"]) for row in kinds["part"]}
    assert all(row["mean_ms"] and not row["p50_ms"] for row in kinds["part"])
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3) and all(shares[part] > 0 for part in step.PARTS)
    names = [row["name"] for row in kinds["kernel off"]]
    assert {"rms_norm", "swiglu", "flash_attention", "linear_cross_entropy", "adamw_", "every kernel"} <= set(names)
    assert all(float(row["ratio"]) > 0 for row in kinds["kernel off"])
    assert [row["name"] for row in kinds["kernel off, muon"]] == ["lion_", "every kernel"]
    other, missing, muon = kinds["peer"]
    assert muon["name"] == "ours, muon" and float(muon["ratio"]) > 0 and float(muon["gap"]) < 1e-4
    assert "not the same step" in other["missing"] and not other["p50_ms"] and missing["missing"] == "No module named 'peer'"


def test_no_row_is_begun_after_the_time_is_over(tmp_path, capsys):
    assert step.main(["--model", "nano", "--seconds=0", f"--csv={tmp_path / 'step.csv'}"]) == 0
    assert "--seconds 0 are over" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert list(step.within(60.0, iter([1, 2]))) == [1, 2]


OTHERS = {
    **{f"weights by seed {seed}": dict(seed=seed) for seed in (1, 2, 3)},
    "twice the rate": dict(c=replace(step.OPTIM, lr=2 * step.OPTIM.lr)),
    "not a number": dict(scale=math.nan),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_peer_that_trains_another_model_or_otherwise_is_refused(ours, monkeypatch, name):
    """The first loss at random weights is about ln V, whatever the weights: it alone would let all of these through."""
    task, other, build = ours.task, dict(OTHERS[name]), step.build_model
    first = step.opening(step.Ours(task))
    seed, scale = other.pop("seed", 0), other.pop("scale", 1.0)
    monkeypatch.setattr(step, "build_model", lambda c, **options: build(c, **options | dict(seed=seed)))
    peer = step.Ours(task, **other)
    peer.model.head.weight.data.mul_(scale)
    row = step.against(task, ours, first, name, lambda: peer, 2)
    assert "not the same step" in row["missing"]


def test_the_same_step_is_the_same(ours):
    first = step.opening(step.Ours(ours.task))
    assert step.difference(first, step.opening(step.Ours(ours.task))) == (0.0, "")
    # In bf16, as a peer's autocast differs from ours.
    gap, why = step.difference(first, step.opening(step.Ours(replace(ours.task, dtype=torch.bfloat16))))
    assert 0 < gap < step.SAME_NORM and why == ""


def test_a_peers_peak_memory_is_read_before_ours_steps(ours):
    did = []

    class Stub:
        def __init__(self, name):
            twin = step.Ours(ours.task)
            self.step = lambda: did.append(name) or twin.step()
            self.gradient_norm, self.close = twin.gradient_norm, twin.close
            self.peak_bytes = lambda: did.append("peak") or 1

    row = step.against(ours.task, Stub("ours"), step.opening(step.Ours(ours.task)), "peer", lambda: Stub("peer"), 2)
    assert row["peak_bytes"] == 1 and did[: step.OPENING + 1] == ["peer"] * step.OPENING + ["peak"] and did.count("ours") == 3


def test_large_models_need_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert step.main(["--model", "gpt2-124m"]) == 2
    assert capsys.readouterr().err == "step: gpt2-124m needs a GPU; here only --model nano can run\n"


def test_flops_of_pretraining_are_one_of_the_conventions(monkeypatch):
    monkeypatch.setattr(step, "peak_flops", lambda device: 1e15)
    task, c = step.Task(step.task_of("gpt2-124m", "cuda").c, 16, 1024, "cpu"), step.task_of("gpt2-124m", "cuda").c
    # As Loop.log counts: 6 N + 6 layers heads head_dim length.
    flops = 6 * 124_439_808 + 6 * c.layers * c.heads * c.head_dim * 1024
    assert task.utilisation(0.1)["mfu_causal"] == pytest.approx(16 * 1024 / 0.1 * flops / 1e15, abs=1e-4)


def test_a_kernel_is_switched_off_and_on(ours):
    holder = types.SimpleNamespace(kernel=lambda x, *, impl="auto": impl)
    with step.swapped([(holder, "kernel")], step.off):
        assert holder.kernel(1) == "reference"
    assert holder.kernel(1) == "auto"
    places = step.kernels_of(ours.model)
    # Attention is called through each layer's seam, the optimizer's kernel from its module.
    assert sum(name == "attend" for _, name in places["flash_attention"]) == ours.task.c.layers
    assert any(owner is step.optim for owner, _ in places["adamw_"])


def test_time_goes_to_the_part_that_took_it():
    """A clock that only the parts' own work moves, forward and backward."""
    clock = [0.0]

    class Works(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = seconds
            clock[0] += seconds
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            clock[0] += 10 * ctx.seconds
            return grad * 1, None

    line = step.Timeline(lambda: clock[0], lambda a, b: b - a)
    works = {part: line.around(part, Works.apply) for part in ("a", "b")}
    outer = line.around("c", lambda x: works["a"](Works.apply(x, 5.0), 7.0))  # what a part calls is its own
    x = torch.ones(3, requires_grad=True)
    line.enter(None)
    residual = Works.apply(x, 100.0)
    y = works["b"](works["a"](residual, 1.0), 2.0)
    y = outer(residual + y)
    clock[0] += 1000.0
    y.sum().backward()
    with torch.no_grad():
        works["a"](x, 0.5)
    line.enter(None)
    assert line.seconds() == dict.fromkeys(step.PARTS, 0.0) | {"a": 11.5, "b": 22.0, "c": 132.0, "rest": 2100.0}


@pytest.mark.extras
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="extra: pip install -e '.[peers]'")
@pytest.mark.parametrize("model", ["nano", "gpt2-124m"])
def test_transformers_trains_the_same_model(model):
    task = step.task_of(model, "cpu")
    peer, ours = step.Transformers(task), step.Ours(task)
    losses = [(peer.step(), ours.step()) for _ in range(6)]
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-5) and losses[-1][0] == pytest.approx(losses[-1][1], rel=1e-3)


@pytest.mark.extras
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="extra: pip install -e '.[peers]'")
def test_a_peer_has_a_process_of_its_own(ours):
    row = step.against(ours.task, ours, step.opening(step.Ours(ours.task)), "transformers", lambda: step.Peer(ours.task, liger=False), 2)
    assert "missing" not in row and row["peak_bytes"] > 0 and row["ratio"] > 0
