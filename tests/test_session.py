"""What a run keeps, and that going on from it loses and repeats nothing: validations, roll-backs, looks at the device, signals."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanotrain import checkpoint
from nanotrain.__main__ import main
from nanotrain.eval import bits_per_byte
from nanotrain.run import Run
from nanotrain.stages import pretrain
from tests.stages.test_pretrain import events, final_state, flags, rows_of, start

SAME = ("step", "loss", "lr", "grad_norm", "tokens")


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An undisturbed run of 24 steps with validations and checkpoints at steps of their own."""
    directory = tmp_path_factory.mktemp("session") / "whole"
    assert main(flags(data, directory, *EXTRA)) == 0
    return directory


EXTRA = ("--train.steps=24", "--train.val_every=5", "--train.val_tokens=300", "--checkpoint.every=10", "--checkpoint.keep=9")


def signal_in_validation(monkeypatch, number):
    """A SIGTERM while the validation of that number runs, the last one included."""
    original, count = bits_per_byte.score, [0]

    def score(*arguments, **options):
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(bits_per_byte, "score", score)


@pytest.mark.parametrize("number", [2, 5])
def test_a_validation_cut_short_by_a_signal_is_made_up_for(whole, data, tmp_path, monkeypatch, number):
    signal_in_validation(monkeypatch, number)
    assert main(flags(data, tmp_path / "r", *EXTRA)) == 0
    stopped = json.loads((tmp_path / "r/summary.json").read_text())
    assert stopped["reason"] == ("stopped by a signal" if number == 2 else "budget used") and stopped["val_bpb"] is None
    assert main(flags(data, tmp_path / "r", *EXTRA, "--resume=auto")) == 0
    assert final_state(tmp_path / "r") == final_state(whole)
    held = {p.name: checkpoint.read_manifest(p)["val_bpb"] for p in checkpoint.directories(tmp_path / "r/checkpoints")}
    assert held == {p.name: checkpoint.read_manifest(p)["val_bpb"] for p in checkpoint.directories(whole / "checkpoints")}
    kept = ("step", "val_loss", "val_bpb", "val_tokens")
    validations = [[[r[k] for k in kept] for r in rows_of(d, "val_bpb")] for d in (tmp_path / "r", whole)]
    assert validations[0] == validations[1] and [v[0] for v in validations[0]] == [5, 10, 15, 20, 24]


def test_a_kill_in_the_last_validation_loses_no_training(data, tmp_path, monkeypatch):
    def score(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(bits_per_byte, "score", score)
    assert main(flags(data, tmp_path / "r", "--train.steps=3")) == 130
    assert checkpoint.verify(tmp_path / "r/checkpoints/step-00000003")["step"] == 3


def test_a_checkpoint_is_ranked_by_the_validation_at_its_own_step(whole):
    measured = {r["step"]: r["val_bpb"] for r in rows_of(whole, "val_bpb")}
    held = {p.name: checkpoint.read_manifest(p)["val_bpb"] for p in checkpoint.directories(whole / "checkpoints")}
    assert held == {"step-00000010": measured[10], "step-00000020": measured[20], "step-00000024": None}


def test_going_on_from_a_finished_run_leaves_its_checkpoint_alone(whole, data):
    newest = whole / "checkpoints/step-00000024"
    before = (newest.stat().st_ino, final_state(whole))
    assert main(flags(data, whole, *EXTRA, "--resume=auto")) == 0
    assert (newest.stat().st_ino, final_state(whole)) == before
    assert [r["step"] for r in rows_of(whole)] == list(range(1, 25))
    assert [r["step"] for r in rows_of(whole, "val_bpb")] == [5, 10, 15, 20, 24]


def test_a_refused_resume_changes_nothing(whole, data, capsys):
    before = contents(whole)
    assert main(flags(data, whole, *EXTRA, "--resume=auto", "--model.width=64")) == 2
    assert "--model.width 64: the checkpoint" in capsys.readouterr().err
    after = contents(whole)
    assert {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)} <= {"lock", "log.txt", "events.jsonl"}


def test_every_step_has_its_row_however_seldom_the_host_looks(whole, data, tmp_path):
    assert main(flags(data, tmp_path / "r", *EXTRA, "--run.log_every=7")) == 0
    assert final_state(tmp_path / "r") == final_state(whole)
    assert [[r[k] for k in SAME] for r in rows_of(tmp_path / "r")] == [[r[k] for k in SAME] for r in rows_of(whole)]
    lines = [line for line in (tmp_path / "r/log.txt").read_text().splitlines() if " loss " in line]
    assert [int(line.split()[1]) for line in lines] == [1, 5, 7, 10, 14, 15, 20, 21, 24]


@pytest.mark.parametrize("steps,log_every", [(160, 1), (160, 9), (153, 1000)])
def test_a_spike_is_found_at_its_step_however_seldom_the_host_looks(data, tmp_path, monkeypatch, steps, log_every):
    original, spikes = pretrain.step, []

    def step(model, optimizer, batches, factor, seed):
        loss, result = original(model, optimizer, batches, factor, seed)
        if optimizer.steps == 150 and not spikes:
            spikes.append(factor)
            loss = loss + 50
        return loss, result

    monkeypatch.setattr(pretrain, "step", step)
    assert main(flags(data, tmp_path / "r", f"--train.steps={steps}", "--checkpoint.every=70", f"--run.log_every={log_every}")) == 0
    (event,) = events(tmp_path / "r", "spike")
    assert event["step"] == 150 and event["action"] == "rolled back to step-00000140" and event["cursor"] == 300
    assert [r["step"] for r in rows_of(tmp_path / "r")] == list(range(1, steps + 1))
    state = checkpoint.load_state(tmp_path / f"r/checkpoints/step-{steps:08d}")
    assert state["cursor"] == 2 * steps + 20 and state["tokens"] == steps * 64 and state["rollbacks"] == 1


def test_a_roll_back_with_no_budget_left_is_saved_as_it_is(data, tmp_path, monkeypatch):
    original, spikes = pretrain.step, []

    def step(model, optimizer, batches, factor, seed):
        loss, result = original(model, optimizer, batches, factor, seed)
        if optimizer.steps == 150 and not spikes:
            spikes.append(factor)
            os.kill(os.getpid(), signal.SIGTERM)
            loss = loss + 50
        return loss, result

    monkeypatch.setattr(pretrain, "step", step)
    assert main(flags(data, tmp_path / "r", "--train.steps=150", "--checkpoint.every=140")) == 0
    state = checkpoint.load_state(tmp_path / "r/checkpoints/step-00000140")
    assert state["step"] == 140 and state["rollbacks"] == 1 and state["cursor"] == 300 and state["tokens"] == 140 * 64
    assert main(flags(data, tmp_path / "r", "--train.steps=150", "--checkpoint.every=140", "--resume=auto")) == 0
    state = checkpoint.load_state(tmp_path / "r/checkpoints/step-00000150")
    assert state["rollbacks"] == 1 and state["cursor"] == 320 and len(events(tmp_path / "r", "spike")) == 1


def test_spikes_without_end_give_up_with_a_line(data, tmp_path, monkeypatch, capsys):
    original = pretrain.step

    def step(model, optimizer, batches, factor, seed):
        loss, result = original(model, optimizer, batches, factor, seed)
        return loss + 50 * (optimizer.steps >= 140), result

    monkeypatch.setattr(pretrain, "step", step)
    assert main(flags(data, tmp_path / "r", "--train.steps=160", "--checkpoint.every=135", "--train.max_rollbacks=2")) == 2
    assert "step 140: loss" in (error := capsys.readouterr().err) and "spiked after 2 roll-backs; lower --optim.lr" in error
    assert len(events(tmp_path / "r", "spike")) == 2


def test_early_stop_counts_validations_of_all_documents_too(data, tmp_path):
    rates = ("--optim.lr=1e-12", "--optim.embedding_lr=1e-12", "--optim.muon_lr=1e-12")
    extra = ("--train.steps=12", "--train.val_every=1", "--train.val_tokens=0", "--train.early_stop=2")
    assert main(flags(data, tmp_path / "r", *extra, *rates)) == 0
    assert "no better validation in 2" in json.loads((tmp_path / "r/summary.json").read_text())["reason"]
    assert rows_of(tmp_path / "r")[-1]["step"] < 12
    assert main(flags(data, tmp_path / "r", *extra, *rates, "--resume=auto")) == 0  # stopped is stopped
    assert rows_of(tmp_path / "r")[-1]["step"] < 12


@pytest.mark.parametrize("number", [None, signal.SIGINT])
def test_a_console_that_closes_ends_the_run_saved(data, tmp_path, number):
    process = start(flags(data, tmp_path / "r", "--train.steps=100000"))
    while "step         1" not in process.stdout.readline():
        pass
    process.stdout.close()
    if number is not None:
        process.send_signal(number)
    assert process.wait(timeout=60) == 0
    (path,) = checkpoint.directories(tmp_path / "r/checkpoints")
    assert checkpoint.verify(path)["step"] == rows_of(tmp_path / "r")[-1]["step"]


def test_a_tokenizer_left_half_copied_is_replaced(data, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/tokenizer.model").write_bytes((data / "tokenizer.model").read_bytes()[:1000])
    assert main(flags(data, tmp_path / "r", "--train.steps=1")) == 0
    assert (tmp_path / "r/tokenizer.model").read_bytes() == (data / "tokenizer.model").read_bytes()


def test_a_sample_that_the_console_cannot_show_ends_nothing(data, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nanotrain", *flags(data, tmp_path / "r", "--train.steps=2", "--train.sample_every=1", "--train.sample_prompt=▁∑")],
        capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert done.returncode == 0 and b"sample: '??" in done.stdout, done.stderr
    assert "sample: '▁∑" in (tmp_path / "r/log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(512, 8, 512), (256, 2, 1024)], ids=str)
def test_the_memory_plan_is_near_what_is_measured(data, tmp_path, dtype, shape):
    """In a process of its own. What libraries bring in with the first step (some 60 MiB) and keep for themselves is not planned: that is
    what the plan's quarter of free memory is for."""
    width, rows, length = shape
    process = subprocess.Popen(
        [sys.executable, "-m", "nanotrain", "pretrain", f"--data.dir={data}", f"--run.dir={tmp_path}/r", "--train.steps=1", f"--model.width={width}",
         "--model.layers=4", "--model.heads=8", f"--train.micro_batch={rows}", f"--train.length={length}", f"--train.dtype={dtype}",
         "--optim.name=adamw", "--run.device=cpu"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    started = time.monotonic()
    while process.poll() is None and not ((tmp_path / "r/events.jsonl").exists() and events(tmp_path / "r", "memory")):
        assert time.monotonic() - started < 900
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # the validation at the end would take most of the time, on a CPU without bf16 minutes
    assert process.wait(120) == 0, process.stderr.read()
    (event,) = events(tmp_path / "r", "memory")
    measured, planned = event["measured_bytes"] - (60 << 20), event["planned_bytes"]
    assert 0.75 < measured / planned < 1 / 0.75, event


def test_a_full_disk_names_the_file_whichever_it_is(data, tmp_path, capsys):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/log.txt").symlink_to("/dev/full")
    assert main(flags(data, tmp_path / "r", "--train.steps=3")) == 1
    assert capsys.readouterr().err == f"nanotrain pretrain: {tmp_path}/r/log.txt: No space left on device\n"


def test_a_disk_that_fills_under_the_command_line_is_one_line_and_the_older_checkpoint_stands(data, tmp_path):
    """The model's file fits under the limit on file sizes, the optimizer's, once Adam has seen more, does not fit beside it."""
    assert main(flags(data, tmp_path / "r", "--train.steps=5")) == 0
    size = (tmp_path / "r/checkpoints/step-00000005/optimizer.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-m", "nanotrain", *flags(data, tmp_path / "r", "--train.steps=9", "--resume=auto")],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, size - 100)),
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "optimizer.safetensors: File too large: checkpoint of step 9 not saved, step-00000005 stands; make room" in done.stderr
    assert [p.name for p in (tmp_path / "r/checkpoints").iterdir()] == ["step-00000005"]
    assert main(flags(data, tmp_path / "r", "--train.steps=9", "--resume=auto")) == 0


def test_a_model_that_does_not_fit_says_so_before_it_is_built(data, tmp_path):
    shape = ("--model.width=8192", "--model.layers=1", "--model.vocab_size=4_000_000", "--train.micro_batch=8")
    done = subprocess.run(
        [sys.executable, "-m", "nanotrain", *flags(data, tmp_path / "r", "--train.steps=1", *shape)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)),
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "out of memory; next: --model.recompute=selective; then --train.micro_batch=4 --train.accumulate=2" in done.stderr
    assert "--optim.name=muon" not in done.stderr  # it is on already
    assert "memory: plan " in done.stdout and "this may not fit" in done.stdout


def test_metrics_of_a_long_run_are_reopened_quickly(tmp_path):
    with Run(str(tmp_path / "r"), "test") as folder:
        (tmp_path / "r/metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(100_000)) + '{"step": 1')
        started = time.perf_counter()
        folder.open_metrics(50_000)
        assert time.perf_counter() - started < 5
        folder.metric({"step": 50_001})
    lines = (tmp_path / "r/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 50_002 and json.loads(lines[-1]) == {"step": 50_001}


def test_fp16_scales_its_loss_before_gradients_are_made(data, tmp_path):
    """The head makes gradients in its forward: with many tokens those of an unscaled mean are too small for fp16."""
    from tests.model.test_transformer import config
    from tests.stages.test_pretrain import batch_of

    c = config(vocab_size=512)
    generator = torch.Generator().manual_seed(0)
    batch = batch_of([torch.randint(0, 512, (64,), generator=generator).tolist() for _ in range(4)])
    errors = {}
    for scale in (1.0, 2.0**16):
        gradients = []
        for dtype in (torch.float64, torch.float16):
            model = pretrain.build_model(c, seed=0, dtype=torch.float16, device="cpu").to(dtype)
            pretrain.forward(model, batch, 64 * batch.counted, 0, scale).backward()
            gradients.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]) / scale)
        errors[scale] = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    assert errors[2.0**16] < 0.005 < errors[1.0], errors
