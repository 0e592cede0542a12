"""C++ of csrc/, compiled on first use: the only door to it.

A library is kept under ~/.cache/nanotrain/native, named after all that decides what it holds (source, compiler, flags, processor) and
followed by its own SHA-256, so that a damaged one is found before it is loaded. It is built under a file lock, aside, and renamed. The
folder must be the user's alone, for what lies in it is run; where none can be had, a library is built for this process only.

There is one OpenMP runtime in the process, torch's: libraries are linked to the file that torch has loaded.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

import torch

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
COMPILERS = ("g++", "c++", "clang++")
_SECONDS = 120
"""After which a compiler is taken to hang."""


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The library of csrc/<name>.cpp; None, said once on stderr with the reason, where it cannot be had."""
    try:
        return build(name, folder=_folder())
    except (OSError, RuntimeError) as error:
        print(f"nanotrain: no native {name}, PyTorch's operators serve, several times slower: {error}", file=sys.stderr)
        return None


def build(name: str, *, folder: Path | None, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Load csrc/<name>.cpp from `folder`, compiled first where it is not there or is damaged; without a folder for this process only.

    `flags` come after the usual ones. Raises RuntimeError with the first line of the compiler's error, or where there is no compiler.
    """
    sources = {path.name: path.read_bytes() for path in _sources(name)}
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(f"no C++ compiler ({', '.join(COMPILERS)}) is on the PATH; install one, g++ for instance")
    runtime = openmp_runtime()
    openmp = () if runtime is None else ("-fopenmp",)
    command = [compiler, *FLAGS, *openmp, *flags]
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_SECONDS).stdout
    key = hashlib.sha256()
    for part in (*sources.values(), version, "\0".join(command).encode(), str(runtime).encode(), _processor().encode()):
        key.update(len(part).to_bytes(8, "little") + part)
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nanotrain-")))
        path = folder / f"{name}-{key.hexdigest()[:32]}.so"
        if not _whole(path):
            lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            with suppress(OSError):  # a file system without locks: two may compile, each renames a whole library
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _whole(path):
                _compile(command, sources, runtime, path)
        return ctypes.CDLL(str(path))


def _compile(command: list[str], sources: dict[str, bytes], runtime: Path | None, path: Path) -> None:
    """Make the library of the first of `sources`, which may include the others."""
    with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as aside:
        for name, source in sources.items():
            (Path(aside) / name).write_bytes(source)
        code, part, made = Path(aside) / next(iter(sources)), Path(aside) / "part.o", Path(aside) / "library.so"
        # In two steps, the second without -fopenmp: it would link the compiler's own runtime beside torch's.
        runtimes = [] if runtime is None else [str(runtime)]
        for step in ([*command, "-c", str(code), "-o", str(part)], [command[0], "-shared", str(part), *runtimes, "-o", str(made)]):
            try:
                done = subprocess.run(step, capture_output=True, text=True, errors="replace", timeout=_SECONDS, stdin=subprocess.DEVNULL)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"{command[0]} took over {_SECONDS} s") from None
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
                reason = next((line for line in lines if "error" in line), lines[0])
                raise RuntimeError(f"{command[0]}: {reason.replace(aside, 'csrc')}")
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(made, path)


def _whole(path: Path) -> bool:
    """Whether a library is there and is what was built."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _sources(name: str) -> list[Path]:
    """csrc/<name>.cpp and all headers; csrc/ lies beside this package, in a checkout and installed."""
    folder = Path(__file__).resolve().parent.parent / "csrc"
    if not (folder / f"{name}.cpp").is_file():
        raise RuntimeError(f"csrc/{name}.cpp is missing from the installation")
    return [folder / f"{name}.cpp", *sorted(folder.glob("*.h"))]


def _folder() -> Path | None:
    """Where libraries are kept: under the user's home, or else the temporary directory; None where neither can be trusted."""
    with suppress(OSError, RuntimeError):  # no home at all is a RuntimeError
        if (folder := private(Path.home() / ".cache" / "nanotrain" / "native")) is not None:
            return folder
    with suppress(OSError):
        return private(Path(tempfile.gettempdir()) / f"nanotrain-{os.getuid()}")
    return None


def private(folder: Path) -> Path | None:
    """The folder, made if it is missing, where it is this user's and nobody else can write to it or to what leads to it; else None."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    trusted = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if trusted else None


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part")}))


@cache
def openmp_runtime() -> Path | None:
    """The file of the OpenMP runtime that torch has loaded; None where there is none that g++'s code could call (one thread then)."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        address = ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, *_, path = line.split(maxsplit=5)
            first, last = (int(edge, 16) for edge in span.split("-"))
            if first <= address < last:
                return Path(path)
    except (OSError, AttributeError, ValueError):  # another system, or a torch without OpenMP
        pass
    return None
