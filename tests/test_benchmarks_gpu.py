"""The one command for a GPU: parts in their time, side by side, and what it says without a GPU or a package."""

import sys
import time

import pytest
import torch

from benchmarks import gpu


def part(name, weight, code, needs=()):
    return gpu.Part(name, weight, lambda seconds: [sys.executable, "-c", code.replace("SECONDS", repr(seconds))], needs)


def test_a_part_that_hangs_is_cut_short_and_the_next_ones_run(tmp_path, capsys):
    hang = (
        "import subprocess, sys, time; print('begins', flush=True)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); time.sleep(99)"
    )
    began = time.monotonic()
    found = gpu.run([part("hangs", 1, hang), part("fails", 1, "raise SystemExit(3)"), part("works", 1, "print('SECONDS')")], 9.0, tmp_path)
    assert time.monotonic() - began < 9.0
    assert [(outcome.name, outcome.code) for outcome in found] == [("hangs", None), ("fails", 3), ("works", 0)]
    assert found[0].seconds == pytest.approx(3.0, abs=1.5)
    assert (tmp_path / "hangs.log").read_text() == "begins\n" and str(found[1]).endswith("failed, exit status 3")
    # What a quick part leaves, the next ones have.
    assert float((tmp_path / "works.log").read_text()) > 3.0
    text = capsys.readouterr().out
    assert "gpu: hangs, at most 3 s of 9 s left" in text and "begins" in text and "cut short" in text


def test_a_part_whose_packages_are_not_installed_is_not_run(tmp_path):
    found = gpu.run([part("lacks", 1, "raise SystemExit(3)", ("csv", "no_such_package")), part("works", 1, "pass")], 30.0, tmp_path)
    assert str(found[0]).endswith("not run: no_such_package not installed") and found[0].code is None and found[1].code == 0


def test_test_files_run_side_by_side_the_longest_first(tmp_path, capfd):
    names = [path.name for path in gpu.test_files()]
    assert {"test_graphs.py", "test_norm.py", "test_optimizers.py"} <= set(names) and not any("native" in name for name in names)
    sizes = [path.stat().st_size for path in gpu.test_files()]
    assert sizes == sorted(sizes, reverse=True) and all(path.is_file() for path in gpu.test_files())
    files = [tmp_path / "test_good.py", tmp_path / "test_bad.py"]
    files[0].write_text("def test(): pass"), files[1].write_text("def test(): assert 0")
    assert gpu.run_tests(files[:1]) == 0 and gpu.run_tests(files) == 1
    text = capfd.readouterr().out
    assert "test_good: 1 passed" in text and "test_bad: 1 failed" in text and text.endswith("2 files, failed: test_bad\n")


def test_parts_pass_the_commit_on(tmp_path):
    commands = [part.command(100.0) for part in gpu.parts(tmp_path, "0123456")]
    assert ["--commit=0123456" in command for command in commands] == [False, True, True]
    assert all("--seconds=80" in command for command in commands[1:])


def test_the_command_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_sums_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for code, status in (("pass", 0), ("raise SystemExit(1)", 1)):
        monkeypatch.setattr(gpu, "parts", lambda out, commit, code=code: [part("only", 1, code)])
        assert gpu.main(["--minutes=1", f"--out={tmp_path}"]) == status
        assert (tmp_path / "summary.txt").read_text().startswith("only ")
    assert [p.name for p in gpu.parts(tmp_path, None)] == ["only"]
