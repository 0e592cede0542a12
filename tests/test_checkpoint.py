"""A checkpoint exists whole or not at all: damage is named, kills and failing disks leave the one before."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch

from nanotrain import checkpoint
from nanotrain.checkpoint import Damaged


def tensors(step=0):
    g = torch.Generator().manual_seed(step)
    return {
        "model": {"a": torch.randn(40, 3, generator=g), "b.c": torch.randn(5, generator=g).bfloat16(), "empty": torch.empty(0, 4)},
        "optimizer": {
            "steps": torch.tensor(float(step)),
            "strided": torch.randn(4, 6, generator=g).T,
            "flag": torch.tensor([True, False]),
            "i": torch.arange(3),
            "d": torch.randn(2, generator=g).double(),
            "h": torch.randn(2, generator=g).half(),
        },
    }


def save(parent, step, **state):
    return checkpoint.save(parent, step, tensors(step), {"step": step} | state)


def load(path):
    groups = tensors(99)
    for name, group in groups.items():
        checkpoint.load_tensors(path / f"{name}.safetensors", group)
    return groups


def equal(a, b):
    return all(torch.equal(a[g][n], b[g][n]) for g in a for n in a[g])


def test_round_trip_and_other_readers(tmp_path):
    path = save(tmp_path, 7, note="x")
    assert path.name == "step-00000007" and sorted(os.listdir(path)) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert checkpoint.verify(path)["step"] == 7 and checkpoint.load_state(path)["note"] == "x"
    assert equal(load(path), tensors(7))
    theirs = safetensors.torch.load_file(path / "model.safetensors")
    assert all(torch.equal(theirs[n], t) for n, t in tensors(7)["model"].items())
    assert os.listdir(tmp_path) == ["step-00000007"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["truncate", "flip", "delete", "empty"])
def test_every_damage_is_named_and_the_older_one_used(tmp_path, file, how):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    target = newer / file
    raw = bytearray(target.read_bytes())
    if how == "delete":
        target.unlink()
    else:
        raw[len(raw) // 2] ^= 1
        target.write_bytes({"truncate": bytes(raw[:-3]), "flip": bytes(raw), "empty": b""}[how])
    with pytest.raises(Damaged) as caught:
        checkpoint.verify(newer)
    # A bit flipped in the manifest may show as a file that does not match it.
    assert file in str(caught.value) or file == "manifest.json"
    said = []
    assert checkpoint.latest(tmp_path, said.append) == older and len(said) == 1 and str(newer) in said[0]


def test_every_single_bit_of_a_shard_counts(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"model": {"a": torch.zeros(3)}}, {})
    file = path / "model.safetensors"
    raw = file.read_bytes()
    for bit in range(0, 8 * len(raw), 7):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(flipped))
        with pytest.raises(Damaged):
            checkpoint.verify(path)


def test_a_pickle_named_safetensors_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    file = tmp_path / "model.safetensors"
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="model.safetensors: no readable safetensors file"):
        checkpoint.load_tensors(file, {"a": torch.zeros(1)})
    assert not (tmp_path / "ran").exists()


def test_an_unknown_dtype_in_a_header_is_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F13", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="m.safetensors: no readable safetensors file"):
        checkpoint.load_tensors(tmp_path / "m.safetensors", {"a": torch.zeros(1)})


@pytest.mark.parametrize(
    "targets,message",
    [
        ({"a": torch.zeros(2), "z": torch.zeros(1)}, "tensor 'z' is missing"),
        ({}, "tensor 'a' is unknown"),
        ({"a": torch.zeros(3)}, r"'a' is \(2,\) torch.float32, expected \(3,\)"),
        ({"a": torch.zeros(2).half()}, "expected .* torch.float16"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, targets, message):
    path = checkpoint.save(tmp_path, 1, {"model": {"a": torch.zeros(2)}}, {})
    with pytest.raises(ValueError, match=message):
        checkpoint.load_tensors(path / "model.safetensors", targets)


def test_a_manifest_cannot_point_outside(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 0, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match="outside the checkpoint"):
        checkpoint.verify(path)


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    for step, bpb in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        path = save(tmp_path, step, val_bpb=bpb)
    assert [p.name[-1] for p in checkpoint.retain(tmp_path, 2, path)] == ["1", "3"]
    assert [p.name[-1] for p in checkpoint.directories(tmp_path)] == ["2", "4", "5"]


def test_retention_never_removes_the_only_good_one(tmp_path):
    """After a roll-back past damaged ones, a newly saved one may be older than they are."""
    paths = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    for path in paths[2:]:
        (path / "state.json").write_text("{}")
    assert list(checkpoint.retain(tmp_path, 1, paths[1])) == [paths[0], paths[2]]
    assert checkpoint.latest(tmp_path, lambda line: None) == paths[1]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    path = save(tmp_path, 1)
    (path / "state.json").unlink()
    checkpoint.verify(save(tmp_path, 1))


def test_fingerprints_see_every_bit():
    base = checkpoint.fingerprint(tensors(), {"step": 1})
    assert base == checkpoint.fingerprint(tensors(), {"step": 1}) != checkpoint.fingerprint(tensors(), {"step": 2})
    changed = tensors()
    changed["optimizer"]["h"].view(torch.int16)[0] ^= 1
    assert checkpoint.fingerprint(changed, {"step": 1}) != base


SAVER = textwrap.dedent("""
    import sys; from pathlib import Path
    from nanotrain import checkpoint
    from tests.test_checkpoint import save
    parent = Path(sys.argv[1])
    list(checkpoint.retain(parent, 1, save(parent, 2)))
""")
CALLS = ("fsync", "rename", "unlink", "unlinkat", "rmdir")
strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (apt-get install strace)")


def run_saver(directory, *trace, **options):
    prefix = ("strace", "-f", "-qq", *trace) if trace else ()
    return subprocess.run([*prefix, sys.executable, "-c", SAVER, str(directory)], capture_output=True, text=True, timeout=120, **options)


@strace
def test_killed_at_every_fsync_rename_and_unlink_of_a_save(tmp_path):
    save(tmp_path / "count", 1)
    log = tmp_path / "log"
    assert run_saver(tmp_path / "count", "-e", "trace=" + ",".join(CALLS), "-o", str(log)).returncode == 0
    totals = {name: sum(f" {name}(" in line for line in log.read_text().splitlines()) for name in CALLS}
    # Four files, their directory and its parent are synced; one rename puts them in place, one hides what is removed.
    assert totals["fsync"] == 6 and totals["rename"] >= 2 and totals["unlink"] + totals["unlinkat"] >= 4, totals
    for name, total in totals.items():
        for when in range(1, total + 1):
            directory = tmp_path / f"{name}-{when}"
            save(directory, 1)
            killed = run_saver(directory, "-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={when}", "-o", os.devnull)
            assert killed.returncode != 0, (name, when)
            good = checkpoint.latest(directory, pytest.fail)
            assert good is not None and equal(load(good), tensors(int(good.name[-1]))), (name, when)
            checkpoint.clean(directory)
            assert all(p.name.startswith("step-") for p in directory.iterdir())


@strace
def test_killed_while_it_replaces_one_of_the_same_step_a_good_one_of_that_step_stands(tmp_path):
    for when in (1, 2, 3):
        directory = tmp_path / str(when)
        save(directory, 1)
        save(directory, 2)
        killed = run_saver(directory, "-e", "trace=rename", "-e", f"inject=rename:signal=SIGKILL:when={when}", "-o", os.devnull)
        assert killed.returncode != 0, when  # the old one aside, the new one in its place, the one before (step 1) removed
        checkpoint.clean(directory)
        good = checkpoint.latest(directory, pytest.fail)
        assert good is not None and good.name[-1] == "2" and equal(load(good), tensors(2))
        assert all(p.name.startswith("step-") for p in directory.iterdir())


@strace
@pytest.mark.parametrize(
    "fault,message", [("fsync:error=EIO:when=1", "Input/output error"), ("fsync:error=ENOSPC:when=4", "No space left on device")]
)
def test_a_failing_disk_raises_and_leaves_the_older_one(tmp_path, fault, message):
    save(tmp_path / "c", 1)
    failed = run_saver(tmp_path / "c", "-e", "trace=fsync", "-e", f"inject={fault}", "-o", os.devnull)
    assert failed.returncode == 1 and message in failed.stderr and "/c/.tmp-step-00000002" in failed.stderr
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-00000001"]
    checkpoint.verify(tmp_path / "c/step-00000001")


def test_a_write_cut_short_by_a_full_disk_raises_and_leaves_the_older_one(tmp_path):
    save(tmp_path / "c", 1)
    failed = run_saver(tmp_path / "c", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)))
    assert failed.returncode == 1 and "File too large" in failed.stderr and "model.safetensors" in failed.stderr
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-00000001"]
    checkpoint.verify(tmp_path / "c/step-00000001")
