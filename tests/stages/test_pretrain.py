"""The main loop: what a step computes, what a run leaves behind, and that nothing it can meet loses anything."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from nanotrain import checkpoint
from nanotrain.__main__ import main
from nanotrain.config import parse, read_toml
from nanotrain.data.loader import Batch
from nanotrain.model.build import build_model
from nanotrain.model.transformer import ModelConfig
from nanotrain.optim import OptimConfig, Optimizer, schedule_factor
from nanotrain.stages import pretrain
from nanotrain.stages.pretrain import Config
from tests.conftest import TINY
from tests.model.test_transformer import config as model_config


def rows_of(path, kind="loss"):
    return [r for r in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if kind in r]


def events(path, kind):
    return [r for r in map(json.loads, (path / "events.jsonl").read_text().splitlines()) if r["event"] == kind]


def final_state(path):
    return json.loads((path / "summary.json").read_text())["state_sha256"]


def flags(data, directory, *more):
    return ["pretrain", f"--data.dir={data}", f"--run.dir={directory}", *TINY, *more]


def batch_of(documents):
    """Documents (token lists) packed into one batch, each predicting its own next tokens."""
    lengths = [len(d) for d in documents]
    tokens = torch.tensor(sum(documents, []))[None]
    labels = torch.tensor(sum([[*d[1:], -100] for d in documents], []))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    counted = (labels[0] != -100).nonzero()[:, 0]
    return Batch(
        tokens,
        labels,
        positions,
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        positions,
        counted,
        len(counted),
        max(lengths),
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_accumulation_of_eight_equals_one_batch_of_eight_with_uneven_documents(name):
    g = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 50, (n,), generator=g).tolist() for n in (2, 9, 5, 30, 3, 17, 4, 11)]
    results = []
    for batches in ([batch_of(documents)], [batch_of([d]) for d in documents]):
        model = build_model(model_config(), seed=0, dtype=torch.float64, device="cpu")
        optimizer = Optimizer(model, OptimConfig(name=name))
        for _ in range(3):
            loss, outcome = pretrain.step(model, optimizer, batches, 1.0, 0)
        results.append((loss, outcome.grad_norm, *model.parameters()))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_loss_is_the_mean_over_counted_tokens():
    model = build_model(model_config(), seed=0, dtype=torch.float64, device="cpu")
    documents = [[1, 2, 3], [4, 5]]
    loss, _ = pretrain.step(model, Optimizer(model, OptimConfig(name="adamw", lr=1e-12)), [batch_of(documents)], 1.0, 0)
    total = 0.0
    for d in documents:
        log_p = torch.log_softmax(model.head.logits(model(torch.tensor([d]), torch.arange(len(d))[None])), -1)[0]
        total -= sum(float(log_p[i, d[i + 1]]) for i in range(len(d) - 1))
    assert math.isclose(float(loss), total / 3, rel_tol=1e-6)


FINISHED = ("--train.steps=60", "--checkpoint.every=20", "--train.val_every=30", "--train.val_tokens=2000", "--train.sample_every=40",
            "--optim.muon_lr=0.05")  # fmt: skip


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run of 60 steps on real text."""
    directory = tmp_path_factory.mktemp("run") / "r"
    assert main(flags(data, directory, *FINISHED)) == 0
    return directory


def test_loss_on_real_text_falls(finished):
    losses = [r["loss"] for r in rows_of(finished)]
    assert len(losses) == 60 and losses[0] > 6.1 and sum(losses[-10:]) / 10 < losses[0] - 1.0


def test_a_run_leaves_everything_behind(finished, data):
    for row in rows_of(finished):
        assert {
            "step",
            "loss",
            "lr",
            "grad_norm",
            "tokens",
            "tokens_per_s",
            "step_s",
            "data_s",
            "clipped",
            "skipped",
            "peak_memory_bytes",
        } <= row.keys()
    validations = rows_of(finished, "val_bpb")
    assert [v["step"] for v in validations] == [30, 60] and validations[1]["val_bpb"] < validations[0]["val_bpb"]
    assert validations[1]["val_tokens"] > validations[0]["val_tokens"] and validations[1]["val_loss"] > 0
    assert rows_of(finished)[-1]["tokens"] == 60 * 64
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-00000040", "step-00000060"]
    environment = json.loads((finished / "env.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__ and "git_commit" in environment
    log = (finished / "log.txt").read_text()
    assert "memory: plan" in log and "planned" in log and "sample:" in log and "linear scaling rule suggests" in log
    assert (finished / "tokenizer.model").read_bytes() == (data / "tokenizer.model").read_bytes()
    measured = events(finished, "memory")[0]
    assert measured["measured_bytes"] > 0 < measured["planned_bytes"]
    (sample,) = events(finished, "sample")
    assert sample["step"] == 40 and sample["prompt"] == "def " and sample["text"].startswith("def ") and f"sample: {sample['text']!r}\n" in log


def test_a_run_says_what_it_starts_from(finished, data):
    (start,) = events(finished, "start")
    index = json.loads((data / "index.json").read_text())
    totals = index["facts"]["totals"]
    for key, value in dict(
        step=0, preset="nano", dtype="float32", device="cpu", budget={"steps": 60}, vocab_size=512, source=index["facts"],
        tokenizer_sha256=index["tokenizer_sha256"], data_sha256=index["data_sha256"], train_tokens=totals["train"]["tokens"],
        val_tokens=totals["val"]["tokens"], val_documents=totals["val"]["documents"], val_bytes=totals["val"]["bytes"],
    ).items():  # fmt: skip
        assert start[key] == value, key
    plan = start["plan"]
    assert plan["total"] == sum(plan[k] for k in ("parameters", "gradients", "optimizer", "activations", "workspace")) < plan["available"]
    assert plan["parameters"] == 4 * start["parameters"] and start["train_rows"] > 1000
    assert plan["total"] == events(finished, "memory")[0]["planned_bytes"]


@pytest.mark.parametrize("extra", [(), ("--train.dtype=bfloat16",)], ids=["float32", "bfloat16"])
def test_update_ratios_are_measured_and_change_no_bit(data, tmp_path, extra):
    for every in (0, 1, 3):
        assert main(flags(data, tmp_path / str(every), "--train.steps=7", f"--train.ratios_every={every}", *extra)) == 0
    measured = {every: {r["step"]: r["update_ratio"] for r in rows_of(tmp_path / str(every), "update_ratio")} for every in (0, 1, 3)}
    assert [list(measured[every]) for every in (0, 1, 3)] == [[], [1, 2, 3, 4, 5, 6, 7], [1, 3, 6]]
    assert all(measured[3][step] == measured[1][step] for step in (1, 3, 6))
    assert all(1e-6 < r < 1 for r in measured[1][4].values() if r is not None) and "blocks.0.attention.q_proj.weight" in measured[1][4]
    assert len({final_state(tmp_path / str(every)) for every in (0, 1, 3)}) == 1


def test_its_config_reruns_it_exactly(finished, tmp_path):
    assert main(["pretrain", f"--config={finished}/config.toml", f"--run.dir={tmp_path}/again"]) == 0
    assert final_state(tmp_path / "again") == final_state(finished)
    first, second = (read_toml(Config, f"{d}/config.toml") for d in (finished, tmp_path / "again"))
    assert {k for k in first if first[k] != second[k]} == {"run.dir"}


def test_sample_streams_from_a_run(finished, capsys):
    assert (
        main(["sample", f"--run.dir={finished}", "--prompt=def \t▁", "--sampling.max_tokens=12", "--sampling.temperature=0", "--run.device=cpu"]) == 0
    )
    captured = capsys.readouterr()
    assert captured.out.startswith("def \t▁") and "12 tokens" in captured.err
    assert main(["sample", f"--run.dir={finished}/nothing"]) == 2 and "nothing: no such directory; train a model first" in capsys.readouterr().err


VARIANTS = {
    "plain": (),
    "dropout": ("--model.dropout=0.2", "--model.embedding_dropout=0.1", "--train.accumulate=2"),
    "bf16": ("--train.dtype=bfloat16",),
    "fp16": ("--train.dtype=float16",),
    "adamw": ("--optim.name=adamw", "--optim.weight_decay=0.1"),
    "lion": ("--optim.name=lion", "--train.dtype=bfloat16", "--optim.masters=false", "--optim.moments=bfloat16"),
    "adafactor": ("--optim.name=adafactor", "--train.accumulate=2"),
    "tokens": ("--train.steps=0", "--train.tokens=1280"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_equals_the_undisturbed_one_bit_for_bit(variant, data, tmp_path):
    """Stopped after step 8 by a signal, as a scheduler would, then continued."""
    extra = ("--train.steps=20", *VARIANTS[variant])
    assert main(flags(data, tmp_path / "whole", *extra)) == 0
    stop_after(8, flags(data, tmp_path / "cut", *extra))
    assert main(flags(data, tmp_path / "cut", *extra, "--resume", "auto")) == 0
    assert final_state(tmp_path / "cut") == final_state(tmp_path / "whole")
    steps = [r["step"] for r in rows_of(tmp_path / "cut")]
    assert steps == list(range(1, 21))
    same = ("step", "loss", "lr", "grad_norm", "tokens")
    assert [[r[k] for k in same] for r in rows_of(tmp_path / "cut")] == [[r[k] for k in same] for r in rows_of(tmp_path / "whole")]


def stop_after(step, arguments):
    """Run in this process, with a SIGTERM to ourselves once `step` is done."""
    original = pretrain.Loop.between_steps

    def between_steps(self):
        if self.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.Loop, "between_steps", between_steps)
        assert main(arguments) == 0


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "nanotrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(directory, step, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if rows_of(directory)[-1]["step"] >= step:
                return
        except (OSError, IndexError, ValueError):
            pass
        time.sleep(0.005)
    raise AssertionError(process.stdout.read())


def test_killed_at_random_moments_it_ends_in_the_same_state(data, tmp_path):
    extra = ("--train.steps=150", "--checkpoint.every=10", "--model.dropout=0.1")
    assert main(flags(data, tmp_path / "whole", *extra)) == 0
    draw, kills = random.Random(0), 0
    for target in (15, 60, 110):
        process = start(flags(data, tmp_path / "killed", *extra, "--resume=auto"))
        wait_for(tmp_path / "killed", target, process)
        time.sleep(draw.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3
    assert main(flags(data, tmp_path / "killed", *extra, "--resume=auto")) == 0
    assert final_state(tmp_path / "killed") == final_state(tmp_path / "whole")
    assert [r["step"] for r in rows_of(tmp_path / "killed")] == list(range(1, 151))
    assert not [p for p in (tmp_path / "killed/checkpoints").iterdir() if not p.name.startswith("step-")]


def test_sigterm_saves_and_exits_zero_a_second_one_exits_now(data, tmp_path):
    process = start(flags(data, tmp_path / "r", "--train.steps=100000"))
    wait_for(tmp_path / "r", 3, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "SIGTERM: finishing this step and saving" in out and "Traceback" not in out
    step = rows_of(tmp_path / "r")[-1]["step"]
    assert checkpoint.verify(tmp_path / f"r/checkpoints/step-{step:08d}")["step"] == step

    process = start(
        flags(
            data, tmp_path / "s", "--train.steps=100000", "--model.width=512", "--train.length=1024", "--train.micro_batch=64", "--run.log_every=100"
        )
    )
    while "memory: plan" not in process.stdout.readline():
        pass
    time.sleep(0.5)  # inside the first, long step
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM
    assert not list((tmp_path / "s").glob("checkpoints/*"))


def test_a_run_directory_has_one_owner(data, tmp_path, capsys):
    process = start(flags(data, tmp_path / "r", "--train.steps=100000"))
    wait_for(tmp_path / "r", 1, process)
    assert main(flags(data, tmp_path / "r", "--train.steps=5")) == 2
    error = capsys.readouterr().err
    assert f"in use by process {process.pid} on" in error and error.count("\n") == 1
    process.kill()
    process.wait()
    assert main(flags(data, tmp_path / "r", "--train.steps=2")) == 0  # a dead owner holds nothing


def test_a_step_that_is_not_finite_is_skipped_and_written_down(data, tmp_path, monkeypatch):
    original, before = pretrain.step, {}

    def step(model, optimizer, batches, factor, seed):
        if optimizer.steps == 4 and not before:
            before.update({n: p.detach().clone() for n, p in model.named_parameters()})
            with torch.no_grad():
                good = model.embed.weight[0].clone()
                model.embed.weight[0] = math.nan
            model.head.weight.register_hook(lambda g: g * math.nan)
            result = original(model, optimizer, batches, factor, seed)
            with torch.no_grad():
                model.embed.weight[0] = good
            model.head.weight._backward_hooks.clear()
            assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
            return result
        return original(model, optimizer, batches, factor, seed)

    monkeypatch.setattr(pretrain, "step", step)
    assert main(flags(data, tmp_path / "r", "--train.steps=10", "--train.ratios_every=5")) == 0
    rows = rows_of(tmp_path / "r", "skipped")
    (skipped,) = [r for r in rows if r["skipped"]]
    assert skipped["step"] == 5 and set(skipped["update_ratio"].values()) == {0.0} and len(events(tmp_path / "r", "skipped")) == 1
    state = checkpoint.load_state(tmp_path / "r/checkpoints/step-00000010")
    assert state["cursor"] == 20  # the data moved on
    with checkpoint._open(tmp_path / "r/checkpoints/step-00000010/optimizer.safetensors") as file:
        assert float(file.get_tensor("steps")) == 9  # the optimizer's count did not


def test_never_finite_gives_up_with_a_line(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain.losses, "next_token", lambda head, hidden, *a, **k: hidden.sum() * math.nan)
    assert main(flags(data, tmp_path / "r", "--train.steps=100", "--train.max_skipped=7")) == 2
    assert "step 7: 7 non-finite steps in a row; lower --optim.lr" in capsys.readouterr().err


def test_a_loss_spike_rolls_back_and_skips_its_data(data, tmp_path, monkeypatch):
    original, spikes = pretrain.step, []

    def step(model, optimizer, batches, factor, seed):
        loss, result = original(model, optimizer, batches, factor, seed)
        if optimizer.steps == 150 and not spikes:
            spikes.append(factor)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(-3)
            loss = loss + 50
        return loss, result

    monkeypatch.setattr(pretrain, "step", step)
    assert main(flags(data, tmp_path / "r", "--train.steps=160", "--checkpoint.every=70", "--train.spike_lr=0.5")) == 0
    (event,) = events(tmp_path / "r", "spike")
    assert event["step"] == 150 and event["action"] == "rolled back to step-00000140" and event["cursor"] == 300
    rows = rows_of(tmp_path / "r")
    assert [r["step"] for r in rows] == list(range(1, 161)) and max(r["loss"] for r in rows) < 10
    assert checkpoint.load_state(tmp_path / "r/checkpoints/step-00000160")["cursor"] == 300 + 40
    assert rows[-15]["lr"] / rows[139]["lr"] < 0.75


@pytest.mark.parametrize(
    "change,message",
    [
        (("--model.width=64",), "--model.width 64: the checkpoint"),
        (("--train.dtype=bfloat16",), "--train.dtype bfloat16: the checkpoint"),
        (("--run.seed=5",), "--run.seed 5"),
        (("--optim.name=adamw",), "is of another model or optimizer"),
        (("--train.length=16",), "--train.length 16"),
    ],
)
def test_resume_refuses_what_does_not_fit(finished, data, tmp_path, capsys, change, message):
    shutil.copytree(finished, tmp_path / "r")
    before = sorted((tmp_path / "r").rglob("*safetensors"))
    assert main(flags(data, tmp_path / "r", "--train.steps=70", *change, "--resume=auto")) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted((tmp_path / "r").rglob("*safetensors")) == before


@pytest.mark.parametrize("what", ["tokenizer", "data"])
def test_resume_refuses_changed_data_and_tokenizer_with_both_hashes(finished, data, corpus, tmp_path, capsys, what):
    shutil.copytree(finished, tmp_path / "r")
    source = f"{corpus}/[a-i]*.py" if what == "data" else corpus
    flag = f"--data.tokenizer={data}/tokenizer.model" if what == "data" else "--data.tokenizer_kind=bpe"
    assert (
        main(
            [
                "prepare",
                f"--data.source={source}",
                f"--data.dir={tmp_path}/other",
                "--data.vocab_size=512",
                flag,
                "--data.cores=1",
                "--data.val_share=0.2",
            ]
        )
        == 0
    )
    assert main(flags(tmp_path / "other", tmp_path / "r", "--train.steps=70", "--resume=auto")) == 2
    error = capsys.readouterr().err
    held = checkpoint.load_state(tmp_path / "r/checkpoints/step-00000060")[f"{what}_sha256"][:16]
    given = json.loads((tmp_path / "other/index.json").read_text())[f"{what}_sha256"][:16]
    assert f"the {what} changed" in error and held in error and given in error and held != given


def test_a_damaged_checkpoint_is_passed_over_loudly(finished, data, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "r")
    newest = tmp_path / "r/checkpoints/step-00000060/model.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[-1] ^= 1
    newest.write_bytes(raw)
    assert main(flags(data, tmp_path / "r", *FINISHED, "--resume=auto")) == 0
    out = capsys.readouterr().out
    assert "damaged checkpoint passed over" in out and "a bit flipped?" in out and "resumed from" in out and "step-00000040" in out
    assert final_state(tmp_path / "r") == final_state(finished)
    for path in (tmp_path / "r/checkpoints").iterdir():
        (path / "manifest.json").unlink()
    assert main(flags(data, tmp_path / "r", "--train.steps=60", "--resume=auto")) == 2
    assert "no checkpoint in" in capsys.readouterr().err


def test_a_finished_directory_is_not_overwritten(finished, data, capsys):
    assert main(flags(data, finished, "--train.steps=60")) == 2
    assert "holds a run already (step-00000060); add --resume auto" in capsys.readouterr().err


def test_torn_and_later_metric_lines_are_dropped(finished, data, tmp_path):
    shutil.copytree(finished, tmp_path / "r")
    with (tmp_path / "r/metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "loss": 1.0}\n{"step": 62, "lo')
    assert main(flags(data, tmp_path / "r", "--train.steps=62", "--optim.muon_lr=0.05", "--resume=auto")) == 0
    steps = [r["step"] for r in rows_of(tmp_path / "r")]
    assert steps == list(range(1, 63)) and rows_of(tmp_path / "r")[60]["loss"] != 1.0


def test_full_and_read_only_disks_are_one_line(data, tmp_path, nanotrain, monkeypatch, capsys):
    original = checkpoint._write

    def write(path, parts):
        if "step-00000020" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return original(path, parts)

    monkeypatch.setattr(checkpoint, "_write", write)
    assert main(flags(data, tmp_path / "r", "--train.steps=30", "--checkpoint.every=10")) == 1
    error = capsys.readouterr().err
    assert (
        "model.safetensors: No space left on device: checkpoint of step 20 not saved, step-00000010 stands; make room" in error
        and error.count("\n") == 1
    )
    monkeypatch.undo()
    whole = nanotrain(*flags(data, "/proc/nowhere/r", "--train.steps=3"))
    assert whole.returncode == 1 and whole.stderr.count("\n") == 1 and "/proc/nowhere" in whole.stderr


def test_early_stop_plateau_and_seconds(data, tmp_path):
    assert (
        main(
            flags(
                data,
                tmp_path / "a",
                "--train.steps=500",
                "--train.val_every=1",
                "--train.val_tokens=10",
                "--train.early_stop=2",
                "--optim.lr=1e-9",
                "--optim.muon_lr=1e-9",
                "--train.plateau=1",
                "--train.spike_sigma=0",
            )
        )
        == 0
    )
    assert "no better validation in 2" in json.loads((tmp_path / "a/summary.json").read_text())["reason"] and events(tmp_path / "a", "plateau")
    assert main(flags(data, tmp_path / "b", "--train.steps=0", "--train.seconds=1.5")) == 0
    rows = rows_of(tmp_path / "b")
    spent = sum(r["step_s"] for r in rows[:-1])
    assert spent < 1.5 <= json.loads((tmp_path / "b/summary.json").read_text())["seconds"]  # however busy the machine is
    share = min(1.0, (spent + rows[-2]["step_s"]) / 1.5)  # the last step is expected to take as long as the one before
    assert math.isclose(rows[-1]["lr"], 0.01 * schedule_factor(OptimConfig(), share), rel_tol=0.05, abs_tol=1e-4)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_out_of_memory_names_the_next_rung(data, tmp_path, monkeypatch, capsys, recompute):
    def step(*arguments):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(pretrain, "step", step)
    assert main(flags(data, tmp_path / "r", "--train.steps=3", f"--model.recompute={recompute}")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out of memory" in error and "--train.micro_batch=1 --train.accumulate=2" in error
    nexts = {"none": "--model.recompute=selective", "selective": "--model.recompute=full", "full": "--train.micro_batch=1"}
    assert error.split("next: ")[1].startswith(nexts[recompute])


@pytest.mark.parametrize(
    "change,message",
    [
        ((), "--train.steps, --train.tokens, --train.seconds: set exactly one"),
        (("--train.steps=1", "--train.tokens=1"), "set exactly one"),
        (("--train.steps=1", "--parallel.dp=2"), "--parallel.dp 2"),
        (("--train.steps=1", "--resume=yes"), "--resume yes"),
        (("--train.steps=1", "--train.micro_batch=0"), "--train.micro_batch 0"),
        (("--train.steps=1", "--model.vocab_size=7"), "--model.vocab_size 7"),
        (("--train.steps=1", "--train.val_stride=99"), "--train.val_stride 99"),
        (("--train.steps=1", "--train.early_stop=2"), "--train.early_stop 2: counts validations"),
        (("--train.steps=1", "--checkpoint.keep=0"), "--checkpoint.keep 0"),
        (("--train.steps=1", "--train.spike_sigma=-1"), "--train.spike_sigma -1"),
        (("--train.steps=1", "--train.ratios_every=-1"), "--train.ratios_every -1: must be at least 0"),
        (("--train.steps=1", "--log.wandbs=p"), "--log.wandbs: unknown key; did you mean --log.wandb?"),
        (("--train.steps=1", "--model.positions=learned", "--model.context=8"), "--train.length 32"),
        (("--train.steps=1", "--model.positions=learned", "--model.context=32", "--train.sample_every=1", f"--train.sample_prompt={'1' * 31}"),
         "--train.sample_prompt: its 32 tokens leave no room in --model.context 32"),
    ],
)  # fmt: skip
def test_bad_configurations_stop_before_anything_is_written(data, tmp_path, capsys, change, message):
    assert main(flags(data, tmp_path / "r", *change)) == 2
    assert message in capsys.readouterr().err
    left = {p.name: p.stat().st_size for p in (tmp_path / "r").iterdir()} if (tmp_path / "r").exists() else {}
    assert left.keys() <= {"lock", "log.txt", "events.jsonl"} and not left.get("log.txt")


def test_torchrun_starts_a_stage(data, tmp_path):
    arguments = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=1",
        "-m",
        "nanotrain",
        *flags(data, tmp_path / "r", "--train.steps=2"),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(rows_of(tmp_path / "r")) == 2, done.stderr


def test_the_plan_counts_what_is_kept(data):
    from nanotrain.memory import plan

    config, _ = parse(Config, [*TINY, "--train.steps=1"], command="pretrain")
    c = replace(config.model.resolved(frozenset(["width", "layers", "heads"])), vocab_size=512)
    assert isinstance(c, ModelConfig)
    one = plan(c, OptimConfig(name="adamw"), dtype=torch.bfloat16, length=64, rows=1, accumulate=1, device=torch.device("cpu"))
    more = plan(c, OptimConfig(), dtype=torch.bfloat16, length=64, rows=5, accumulate=4, device=torch.device("cpu"))
    count = one.parameters // 2
    # Masters and two moments in fp32, and three numbers.
    assert one.optimizer == 12 * count + 12 and one.gradients == 2 * count and more.gradients == 6 * count and more.optimizer < one.optimizer
    # Once for all rows: RoPE's two tables (512 positions, 8 frequencies) in fp32. The head's weight gradient is a part of the workspace.
    once = 2 * 512 * 8 * 4
    assert abs(more.total - more.fixed - once - 5 * (one.activations_per_row - once)) < 5
    assert 1 < more.largest_micro_batch / one.largest_micro_batch < one.activations_per_row / more.activations_per_row * 1.01
