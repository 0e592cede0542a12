"""prepare: text in, a lossless tokenizer and packed token shards out.

nanotrain prepare --data.dir=data/python
nanotrain prepare --data.source='docs/**/*.md,corpus.jsonl.gz' --data.dir=data/mine --data.vocab_size=8192
nanotrain prepare --data.source=more.txt --data.tokenizer=data/mine/tokenizer.model --data.dir=data/more
"""

from __future__ import annotations

import hashlib
import heapq
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from nanotrain import config as configs
from nanotrain.data.pack import is_validation, pack
from nanotrain.data.shards import write_index
from nanotrain.data.sources import Corrupt, Document, digest, python_corpus_name, read_documents
from nanotrain.data.workers import in_order
from nanotrain.tokenizer import Tokenizer, train

FILES = re.compile(r"index\.json|tokenizer\.model|(train|val)-\d{5,}\.(bin|npy)")
"""What a data directory holds."""
PIECE = 1 << 11
"""Length of the pieces that documents are cut into for the tokenizer to train on some of them [characters]."""


@dataclass(frozen=True)
class SourceConfig:
    """What to read and how to cut it into tokens."""

    source: str = "python"
    """`python` (the running interpreter's standard library) or files, globs, directories of .txt .md .py .jsonl .jsonl.gz, separated by commas."""
    dir: str = "data/python"
    """Directory the tokenizer and shards are written to; an earlier one there is replaced whole."""
    text_field: str = "text"
    """Field of a .jsonl record that holds the text."""
    val_share: float = 0.1
    """Documents held out for validation, chosen by their hash [share]."""
    tokenizer: str = "train"
    """`train`, or a tokenizer.model to use as it is."""
    tokenizer_kind: Literal["bpe", "unigram"] = "unigram"
    """Kind of sentencepiece model to train."""
    tokenizer_text: int = 3
    """Text to train the tokenizer on at most [MB], drawn from the training split by hash.
    On two cores unigram takes about 6 s per MB, and more per MB the more there is; bpe takes 0.3 s per MB."""
    vocab_size: int = 4096
    """Vocabulary to train [tokens]."""
    max_corrupt: int = 100
    """Unreadable lines and files to skip before giving up [pieces]."""
    cores: int = 0
    """Workers that tokenise [processes]; 0 is one for every core this process may use."""


@dataclass(frozen=True)
class Config:
    """Keys of `nanotrain prepare`."""

    data: SourceConfig = field(default_factory=SourceConfig)


def check(c: SourceConfig) -> None:
    """Raise ValueError naming the flag for values that make no sense, before anything is read or written."""
    if not 0 < c.val_share < 1:
        raise ValueError(f"--data.val_share {c.val_share}: must lie between 0 and 1")
    if not 300 <= c.vocab_size < 1 << 20:
        raise ValueError(f"--data.vocab_size {c.vocab_size}: must lie in [300, 1048576): 256 bytes and the special tokens are part of it")
    configs.at_least(c, "data", 1, "tokenizer_text")
    configs.at_least(c, "data", 0, "max_corrupt", "cores")
    target = Path(c.dir).resolve()
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"--data.dir {c.dir}: holds the working directory, and would be replaced whole; choose another")
    if target.exists() and not target.is_dir():
        raise ValueError(f"--data.dir {c.dir}: exists and is no directory")
    names = sorted(p.name for p in target.iterdir()) if target.exists() else []
    if names and "index.json" not in names:
        raise ValueError(f"--data.dir {c.dir}: not empty and no data directory; choose another")
    if strange := [name for name in names if not FILES.fullmatch(name)]:
        raise ValueError(f"--data.dir {c.dir}: holds {strange[0]}, no file of a data directory, and would be replaced whole; choose another")


class Corpus:
    """The documents of a source, which may be gone through several times; facts are of the last time."""

    def __init__(self, c: SourceConfig):
        self.c, self.corrupt_count = c, 0
        self.hash = hashlib.sha256()

    def documents(self, say=None) -> Iterator[Document]:
        corrupt = Corrupt(self.c.max_corrupt, say or (lambda line: None))
        self.hash = hashlib.sha256()
        for document in read_documents(self.c.source, self.c.text_field, corrupt):
            self.hash.update(document.text.encode("utf-8", "surrogatepass") + b"\0")
            yield document
        self.corrupt_count = corrupt.count

    def sample(self, limit: int) -> list[str]:
        """Training text of at most `limit` bytes in all: the pieces of documents whose hashes are smallest, in the hashes' order."""
        kept: list[tuple[int, str]] = []
        size = 0
        for document in self.documents():
            if not is_validation(document, self.c.val_share):
                for start in range(0, len(document.text), PIECE):
                    piece = document.text[start : start + PIECE]
                    key = digest(piece)[8:]  # the bytes before those may have put it into this split
                    heapq.heappush(kept, (-int.from_bytes(key, "big"), piece))
                    size += _bytes(piece)
                    while size > limit:
                        size -= _bytes(heapq.heappop(kept)[1])
        return [piece for _, piece in sorted(kept)]


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def train_tokenizer(c: SourceConfig, corpus: Corpus) -> Tokenizer:
    """A tokenizer for the corpus."""
    print(f"prepare: choosing text of {c.source} to train the tokenizer on", flush=True)
    texts = corpus.sample(c.tokenizer_text * 1_000_000)
    size = sum(map(_bytes, texts)) / 1e6
    print(f"prepare: training a {c.tokenizer_kind} tokenizer of {c.vocab_size} tokens on {size:.1f} MB", flush=True)
    started = time.monotonic()
    work = partial(train, vocab_size=c.vocab_size, kind=c.tokenizer_kind)
    # In a process of its own: sentencepiece heeds no signal, and could not be stopped.
    with closing(in_order(work, [texts], processes=1, remedy="use a smaller --data.tokenizer_text")) as results:
        tokenizer = next(results)
    print(f"prepare: tokenizer trained in {time.monotonic() - started:.1f} s", flush=True)
    return tokenizer


def build(c: SourceConfig, directory: Path) -> dict:
    """Write a whole data directory; returns its index."""
    cores = c.cores or len(os.sched_getaffinity(0))
    corpus = Corpus(c)
    tokenizer = train_tokenizer(c, corpus) if c.tokenizer == "train" else Tokenizer.load(c.tokenizer)
    (directory / "tokenizer.model").write_bytes(tokenizer.model)
    started = time.monotonic()
    with tqdm(desc="prepare: tokens", unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar:
        splits = pack(corpus.documents(bar.write), tokenizer, directory, val_share=c.val_share, cores=cores, progress=bar.update)
        seconds = time.monotonic() - started
    total = {s: {k: sum(getattr(x, k) for x in shards) for k in ("documents", "bytes", "tokens")} for s, shards in splits.items()}
    for split in ("train", "val"):
        if not total[split]["tokens"]:
            raise ValueError(f"--data.source {c.source}: no document fell into the {split} split; use more documents or change --data.val_share")
    facts = dict(
        source=python_corpus_name() if c.source == "python" else c.source, corpus_sha256=corpus.hash.hexdigest(), corrupt=corpus.corrupt_count,
        val_share=c.val_share, totals=total,
    )  # fmt: skip
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    index = write_index(directory, dtype=dtype, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.fingerprint(), splits=splits, facts=facts)
    size = sum(t["bytes"] for t in total.values())
    print(f"prepare: {size / 1e6:.1f} MB of text in {seconds:.1f} s ({size / 1e6 / seconds:.1f} MB/s on {cores} cores)")
    return index


def main(argv: list[str]) -> int:
    """Command line of the stage."""
    config, _ = configs.parse(Config, argv, command="prepare")
    return run(config)


def run(config: Config) -> int:
    """Build in a temporary directory beside the target, then put it in place at once."""
    c = config.data
    check(c)
    target = Path(c.dir).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    handler = signal.signal(signal.SIGTERM, _unwind)
    try:
        _tidy(target)
        temporary.mkdir()
        index = build(c, temporary)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    finally:
        _tidy(target)
        signal.signal(signal.SIGTERM, handler)
    facts = index["facts"]
    print(f"prepare: {facts['source']}, corpus {facts['corpus_sha256'][:12]}, {facts['corrupt']} unreadable pieces skipped")
    for split, t in facts["totals"].items():
        ratio = t["bytes"] / t["tokens"]
        print(f"prepare: {split:5} {t['documents']:>7,} documents {t['bytes']:>13,} bytes {t['tokens']:>12,} tokens ({ratio:.2f} bytes per token)")
    print(f"prepare: wrote {c.dir}")
    return 0


def _unwind(number: int, frame) -> None:
    raise SystemExit(128 + number)


def _tidy(target: Path) -> None:
    """Remove what prepares that are over left beside `target`; where one was cut off between its renames, put the old data back."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.(tmp|old)-(\d{{1,9}})")
    for path in sorted(target.parent.iterdir()):
        match = ours.fullmatch(path.name)
        if match and not _at_work(int(match[2])):
            if match[1] == "old" and not target.exists():
                path.rename(target)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _at_work(process: int) -> bool:
    """Whether another process of this number lives; where it is this one's own, an earlier one had it (a container starts over)."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
