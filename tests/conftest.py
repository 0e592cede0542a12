"""A small real corpus, prepared once for the whole session: a few modules of this Python's own library.

Without a GPU, Triton's kernels run in its interpreter, which must be said before triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from nanotrain.__main__ import main

MODULES = (
    "abc",
    "ast",
    "bisect",
    "calendar",
    "cmd",
    "code",
    "colorsys",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "dis",
    "fractions",
    "getopt",
    "glob",
    "heapq",
    "inspect",
    "keyword",
    "linecache",
    "nturl2path",
    "numbers",
    "opcode",
    "pprint",
    "queue",
    "quopri",
    "random",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A directory of .py files."""
    directory = tmp_path_factory.mktemp("corpus")
    for name in MODULES:
        (directory / f"{name}.py").write_bytes((Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_bytes())
    return directory


@pytest.fixture(scope="session")
def data(corpus, tmp_path_factory) -> Path:
    """The corpus prepared: a vocabulary of 512 tokens, about 150 thousand of them."""
    directory = tmp_path_factory.mktemp("prepared") / "data"
    assert (
        main(["prepare", f"--data.source={corpus}", f"--data.dir={directory}", "--data.vocab_size=512", "--data.cores=1", "--data.val_share=0.2"])
        == 0
    )
    return directory


TINY = (
    "--model.width=32",
    "--model.layers=2",
    "--model.heads=2",
    "--train.length=32",
    "--train.micro_batch=2",
    "--train.dtype=float32",
    "--train.val_every=0",
    "--run.device=cpu",
    "--run.log_every=1",
)
"""Flags of a model small enough for any test."""


@pytest.fixture
def nanotrain():
    """Run the command line in a process of its own: nanotrain(*arguments) -> finished process with text output."""

    def call(*arguments, timeout=120, **options):
        return subprocess.run(
            [sys.executable, "-m", "nanotrain", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            **options,
        )

    return call
