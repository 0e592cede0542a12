"""Libraries of csrc/: built once, whole or not at all, from a folder that is the user's own, on the one OpenMP runtime there is."""

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from nanotrain.kernels import native

pytestmark = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="no C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the library in it."""
    folder = tmp_path_factory.mktemp("native")
    native.build("decode", folder=folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A folder of its own with a copy of the library, which nobody has loaded."""
    for path in folder.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.fixture
def fresh():
    """`library` as in a process that has not called it."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def made(folder):
    return sorted(folder.glob("*.so"))


def refuse(*arguments):
    raise AssertionError("compiled again")


def test_what_is_there_is_loaded_and_nothing_is_written(copy, monkeypatch):
    monkeypatch.setattr(native, "_compile", refuse)
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    copy.chmod(0o500)
    assert native.build("decode", folder=copy).decode_step
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:5000] + b"x" + b[5001:]])
def test_a_damaged_library_is_built_again(copy, damage, folder, monkeypatch):
    monkeypatch.setattr(native, "_compile", lambda command, sources, runtime, path: shutil.copy(made(folder)[0], path))
    (path,) = made(copy)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert native.build("decode", folder=copy).decode_step
    assert native._whole(path) and [p.suffix for p in sorted(copy.iterdir())] == [".lock", ".so"]


def test_the_name_follows_flags_and_compiler(copy, monkeypatch):
    monkeypatch.setattr(native, "_compile", lambda command, sources, runtime, path: shutil.copy(made(copy)[0], path))
    native.build("decode", folder=copy, flags=("-O1",))
    assert len(made(copy)) == 2
    monkeypatch.setattr(native, "_processor", lambda: "another")
    native.build("decode", folder=copy)
    assert len(made(copy)) == 3


def test_two_processes_build_it_once(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo compiled >> {tmp_path}/log;; esac\nexec {shutil.which(native.COMPILERS[0])} "$@"\n')
    compiler.chmod(0o700)
    (tmp_path / "kept").mkdir()
    code = f"""
from pathlib import Path
from nanotrain.kernels import native
native.COMPILERS = ({str(compiler)!r},)
print(native.build("decode", folder=Path({str(tmp_path / "kept")!r}), flags=("-O0",)).decode_step is not None)
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["True\n"] * 2
    assert (tmp_path / "log").read_text().split() == ["compiled"] and len(made(tmp_path / "kept")) == 1


def test_one_openmp_runtime_is_loaded():
    code = """
import torch
from nanotrain.kernels import native
torch.ones(1 << 20).sum()
assert native.library("decode")
print(*{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/")[-1]}, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ([str(native.openmp_runtime())] if native.openmp_runtime() else [])


def test_a_failed_compile_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match=r"error.*nowhere\.h") as caught:
        native.build("decode", folder=tmp_path, flags=("-include", "nowhere.h"))
    assert "\n" not in str(caught.value) and not made(tmp_path) and not list(tmp_path.glob(".building*"))


@pytest.mark.parametrize(
    "what,value,message",
    [
        ("COMPILERS", ("no-such-compiler",), "no C++ compiler (no-such-compiler) is on the PATH"),
        ("FLAGS", ("-include", "nowhere.h"), "nowhere.h"),
        ("_folder", lambda: Path("/proc/none"), "No such file"),
    ],
)
def test_what_cannot_be_had_is_said_once(what, value, message, monkeypatch, capsys, fresh):
    monkeypatch.setattr(native, what, value)
    assert native.library("decode") is None and native.library("decode") is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said and "PyTorch's operators serve" in said


def test_without_a_folder_it_is_built_for_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert native.build("decode", folder=None, flags=("-O0",)).decode_step and not list(tmp_path.iterdir())


def test_only_the_users_own_folder_is_trusted(tmp_path, monkeypatch):
    folder = native.private(tmp_path / "new" / "folder")
    assert folder == tmp_path / "new" / "folder" and stat.S_IMODE(folder.stat().st_mode) == 0o700
    for mode in (0o770, 0o702, 0o777):
        folder.chmod(mode)
        assert native.private(folder) is None
    folder.chmod(0o755)
    assert native.private(folder) == folder
    (tmp_path / "link").symlink_to(folder)
    assert native.private(tmp_path / "link") is None
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert native.private(folder) is None


def test_without_a_home_the_temporary_directory_serves(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "file")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert native._folder() == tmp_path / f"nanotrain-{os.getuid()}"
    native._folder().chmod(0o777)
    assert native._folder() is None


def test_the_runtime_is_where_torch_calls_it():
    if native.openmp_runtime() is not None:
        assert ctypes.CDLL(str(native.openmp_runtime())).GOMP_parallel
