"""Workers answer in order, and whatever ends, they or the work, nothing hangs and nothing is left running."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from functools import partial

import numpy as np
import pytest

from nanotrain.data.pack import pack
from nanotrain.data.shards import ShardWriter
from nanotrain.data.sources import Document, digest
from nanotrain.data.workers import in_order
from nanotrain.tokenizer import Tokenizer


@contextmanager
def at_most(seconds):
    """TimeoutError inside where it takes longer."""

    def ring(number, frame):
        raise TimeoutError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def work(item):
    """What the workers of these tests do, by the item they are sent."""
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "answer half and die":
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes(50_000_000)
    if item == "fail":
        raise ValueError("the item's own fault")
    if item == "sleep":
        time.sleep(60)
    time.sleep(0.02 * (item % 3))
    return item * item


def test_answers_come_in_order_and_little_is_read_ahead():
    taken = []

    def items():
        for number in range(30):
            taken.append(number)
            yield number

    for number, result in enumerate(in_order(work, items(), processes=2, remedy="")):
        assert result == number * number and len(taken) <= number + 9
    assert not multiprocessing.active_children()


def test_an_error_of_the_work_is_raised_here():
    with at_most(20), pytest.raises(ValueError, match="the item's own fault"):
        list(in_order(work, [1, "fail", 2], processes=1, remedy=""))
    assert not multiprocessing.active_children()


def stalled():
    yield "answer half and die"
    time.sleep(1.5)
    yield 1


@pytest.mark.parametrize("items", [lambda: [1, "die", 2, 3], stalled], ids=["at work", "in an answer"])
def test_a_worker_that_dies_is_one_line(items):
    with at_most(20), pytest.raises(ValueError, match=r"^a worker process died \(out of memory\?\); buy more$"):
        list(in_order(work, items(), processes=1, remedy="buy more"))
    assert not multiprocessing.active_children()


def test_workers_end_at_once_when_no_more_is_asked_for():
    with at_most(20), closing(in_order(work, [3, "sleep", "sleep"], processes=1, remedy="")) as results:
        assert next(results) == 9
    assert not multiprocessing.active_children()


def test_workers_end_when_this_process_is_killed():
    code = (
        "import itertools, multiprocessing\n"
        "from nanotrain.data.workers import in_order\n"
        "for _ in in_order(abs, itertools.count(), processes=2, remedy=''):\n"
        "    print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(workers := parent.stdout.readline().split()) < 2:
        assert parent.poll() is None
    parent.kill()
    deadline = time.monotonic() + 20
    while any(map(running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert parent.communicate()[1] == ""


def running(pid) -> bool:
    """Whether a process is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def endless():
    text = "def f(x):\n    return x\n" * 4000
    while True:
        yield Document("d", text, digest(text))


@pytest.fixture
def pack_endlessly(data, tmp_path):
    tokenizer = Tokenizer.load(data / "tokenizer.model")
    return partial(pack, tokenizer=tokenizer, directory=tmp_path, val_share=0.1, cores=2, progress=lambda n: None)


def test_packing_ends_when_a_worker_is_killed(pack_endlessly):
    def documents():
        for number, document in enumerate(endless()):
            if number == 50:
                multiprocessing.active_children()[0].kill()
            yield document

    with at_most(20), pytest.raises(ValueError, match=r"a worker process died .*fewer --data.cores"):
        pack_endlessly(documents())


def test_packing_ends_when_writing_fails_after_a_stall(pack_endlessly, monkeypatch):
    def add(self, ids: np.ndarray, text_bytes: int):
        time.sleep(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", add)
    with at_most(20), pytest.raises(OSError, match="No space left"):
        pack_endlessly(endless())
    assert not multiprocessing.active_children()
