"""prepare: what the tokenizer learns from, and that an end at any moment leaves the old data or the new, and nothing beside."""

import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanotrain import config as configs
from nanotrain.__main__ import main
from nanotrain.data.pack import is_validation
from nanotrain.data.shards import TokenShards
from nanotrain.stages import prepare
from nanotrain.stages.prepare import PIECE, Corpus, SourceConfig
from tests.data.test_workers import running


def size(texts):
    return sum(len(t.encode()) for t in texts)


@pytest.mark.parametrize("form", [".py", ".jsonl.gz"])
def test_the_tokenizer_learns_from_no_more_text_than_asked_for(corpus, tmp_path, form, monkeypatch):
    texts = [p.read_text() for p in sorted(corpus.iterdir())]
    if form == ".py":
        source = corpus
    else:
        source = tmp_path / "corpus.jsonl.gz"
        source.write_bytes(gzip.compress("\n".join(json.dumps({"text": t}) for t in texts).encode()))
    c = Corpus(SourceConfig(source=str(source), val_share=0.2))
    limit = size(texts) // 4
    sample = c.sample(limit)
    assert limit - 4 * PIECE < size(sample) <= limit and sample == c.sample(limit)
    documents = list(c.documents())
    training = [d.text for d in documents if not is_validation(d, 0.2)]
    assert all(any(piece in text for text in training) for piece in sample)
    assert sorted("".join(c.sample(10**9))) == sorted("".join(training))
    monkeypatch.setattr(prepare, "read_documents", lambda *a: reversed(documents))  # what is chosen depends on the text alone
    assert len(set(c.sample(limit)) ^ set(sample)) <= 4


def test_the_built_in_text_is_bounded_too():
    assert 990_000 < size(Corpus(SourceConfig()).sample(1_000_000)) <= 1_000_000


def test_copies_are_chosen_alike_and_short_documents_as_often_as_parts_of_long_ones(tmp_path):
    lines = [{"text": f"short document {n} " * 9} for n in range(2000)]
    lines += [{"text": "".join(f"long document {n} {i} " * 9 for i in range(2000))} for n in range(3)]
    source = tmp_path / "corpus.jsonl"
    source.write_text("\n".join(json.dumps(x) for x in lines + lines))
    c = Corpus(SourceConfig(source=str(source), val_share=0.5))
    sample = c.sample(60_000)
    assert sample == c.sample(60_000)
    assert sum(sample.count(piece) == 2 for piece in sample) >= len(sample) - 1  # all but the last to fit
    training = [d.text for d in c.documents() if not is_validation(d, 0.5)]
    expected = size(sample) * size(t for t in training if t.startswith("short")) / size(training)
    assert 0.5 * expected < size(t for t in sample if t.startswith("short")) < 2 * expected


def test_every_number_has_a_unit_and_bad_ones_are_refused_by_name(corpus, tmp_path, capsys):
    docs = configs.field_docs(SourceConfig)
    numeric = [f.name for f in dataclasses.fields(SourceConfig) if f.type in ("int", "float")]
    assert len(numeric) == 5
    for name in numeric:
        assert re.search(r"\[\w+\]", docs[name]), name
    for flag in ("--data.cores=-1", "--data.max_corrupt=-1", "--data.tokenizer_text=0"):
        assert main(["prepare", f"--data.source={corpus}", f"--data.dir={tmp_path}/x/y", flag]) == 2
        assert capsys.readouterr().err.startswith(f"nanotrain prepare: {flag.replace('=', ' ')}: must be at least")
    assert not list(tmp_path.iterdir())


def test_only_what_prepare_wrote_is_replaced(data, corpus, tmp_path, capsys, monkeypatch):
    work = tmp_path / "work"
    shutil.copytree(data, work)
    (work / "thesis.txt").write_text("years of work")
    flags = ["prepare", f"--data.source={corpus}", f"--data.tokenizer={data}/tokenizer.model", "--data.cores=1"]
    assert main([*flags, f"--data.dir={work}"]) == 2
    assert "holds thesis.txt, no file of a data directory" in capsys.readouterr().err
    (work / "thesis.txt").unlink()
    monkeypatch.chdir(work)
    assert main([*flags, "--data.dir=."]) == 2
    assert "--data.dir .: holds the working directory" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    work.rename(tmp_path / "disk/work")
    work.symlink_to(tmp_path / "disk/work")
    assert main([*flags, f"--data.dir={work}"]) == 0  # the directory a link leads to is what is replaced
    assert work.is_symlink() and sorted(os.listdir(tmp_path)) == ["disk", "work"] and os.listdir(tmp_path / "disk") == ["work"]


def a_dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_an_earlier_prepare_left_is_put_back_or_removed(data, corpus, tmp_path, capsys):
    dead = a_dead_process()
    shutil.copytree(data, tmp_path / f".d.old-{dead}")  # killed between its two renames
    shutil.copytree(data, tmp_path / f".d.tmp-{dead}")
    (tmp_path / f".d.tmp-{os.getpid()}").mkdir()  # this process's number, in an earlier life of the container
    others = {f".d.tmp-{os.getppid()}", ".dd.tmp-1", f".d.tmp-{dead}x"}  # alive, another's, and no name of ours
    for name in others:
        (tmp_path / name).mkdir()
    assert main(["prepare", f"--data.source={corpus}", f"--data.dir={tmp_path}/d", f"--data.tokenizer={tmp_path}/none"]) == 2
    assert "No such file" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"d", *others}
    assert TokenShards(tmp_path / "d", "train").tokens


def test_an_end_between_the_two_renames_puts_the_old_data_back(data, corpus, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "d")
    before = (tmp_path / "d/index.json").read_bytes()
    rename = Path.rename

    def interrupted(self, target):
        if ".tmp-" in self.name:
            raise SystemExit(143)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(SystemExit):
        main(["prepare", f"--data.source={corpus}", f"--data.dir={tmp_path}/d", f"--data.tokenizer={data}/tokenizer.model", "--data.cores=1"])
    assert [p.name for p in tmp_path.iterdir()] == ["d"] and (tmp_path / "d/index.json").read_bytes() == before


@pytest.mark.parametrize("phase", ["training the tokenizer", "writing shards"])
def test_sigterm_leaves_the_old_data_and_nothing_beside_it(data, corpus, tmp_path, phase):
    shutil.copytree(data, tmp_path / "data/d")
    before = (tmp_path / "data/d/index.json").read_bytes()
    source = tmp_path / "corpus.jsonl"
    texts = [p.read_text() for p in corpus.iterdir()]
    source.write_text("\n".join(json.dumps({"text": f"{n} {t}"}) for n in range(100) for t in texts))
    tokenizer = "train" if phase == "training the tokenizer" else data / "tokenizer.model"
    flags = [f"--data.source={source}", f"--data.dir={tmp_path}/data/d", f"--data.tokenizer={tokenizer}", "--data.cores=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nanotrain", "prepare", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    shards = tmp_path / f"data/.d.tmp-{process.pid}/train-00000.bin"
    if phase == "training the tokenizer":
        while "training a unigram tokenizer of 4096 tokens on 3.0 MB" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(1)
    while phase == "writing shards" and not shards.exists():
        assert process.poll() is None
        time.sleep(0.02)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert workers
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors
    assert time.monotonic() - started < 5
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["d"] and (tmp_path / "data/d/index.json").read_bytes() == before
    while any(map(running, workers)):  # Python's own resource tracker ends a moment later
        assert time.monotonic() - started < 10
        time.sleep(0.05)
