"""prepare: text in, a lossless tokenizer and packed token shards out.

nanotrain prepare --data.dir=data/python
nanotrain prepare --data.source='docs/**/*.md,corpus.jsonl.gz' --data.dir=data/mine --data.vocab_size=8192
nanotrain prepare --data.source=more.txt --data.tokenizer=data/mine/tokenizer.model --data.dir=data/more
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from nanotrain import config as configs
from nanotrain.data.pack import is_validation, pack
from nanotrain.data.shards import write_index
from nanotrain.data.sources import Corrupt, Document, expand, python_corpus_name, read_documents
from nanotrain.tokenizer import Tokenizer, train


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
    tokenizer_text: int = 64
    """Text to train the tokenizer on at most [MB], drawn from the training split by hash."""
    vocab_size: int = 4096
    """Vocabulary to train [tokens]."""
    max_corrupt: int = 100
    """Unreadable lines or files to skip before giving up."""
    cores: int = 0
    """Worker processes; 0 is every core this process may use."""


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
    target = Path(c.dir)
    if target.exists() and not target.is_dir():
        raise ValueError(f"--data.dir {c.dir}: exists and is no directory")
    if target.is_dir() and any(target.iterdir()) and not (target / "index.json").exists():
        raise ValueError(f"--data.dir {c.dir}: not empty and no data directory; choose another")


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

    def sample(self, limit: int) -> Iterator[str]:
        """Training texts of about `limit` bytes in all, chosen by hash."""
        total = sum(p.stat().st_size for p in expand(self.c.source)) if self.c.source != "python" else 0
        share = min(1.0, limit / max(1, total))
        for document in self.documents():
            if not is_validation(document, self.c.val_share) and int.from_bytes(document.split_key[8:16], "big") <= share * 2**64:
                yield document.text


def build(c: SourceConfig, directory: Path) -> dict:
    """Write a whole data directory; returns its index."""
    cores = c.cores or len(os.sched_getaffinity(0))
    corpus = Corpus(c)
    started = time.monotonic()
    if c.tokenizer == "train":
        print(f"prepare: training a {c.tokenizer_kind} tokenizer of {c.vocab_size} tokens", flush=True)
        tokenizer = train(corpus.sample(c.tokenizer_text * 1_000_000), vocab_size=c.vocab_size, kind=c.tokenizer_kind)
        print(f"prepare: tokenizer trained in {time.monotonic() - started:.1f} s", flush=True)
    else:
        tokenizer = Tokenizer.load(c.tokenizer)
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
    target = Path(c.dir)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        index = build(c, temporary)
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    facts = index["facts"]
    print(f"prepare: {facts['source']}, corpus {facts['corpus_sha256'][:12]}, {facts['corrupt']} unreadable pieces skipped")
    for split, t in facts["totals"].items():
        ratio = t["bytes"] / t["tokens"]
        print(f"prepare: {split:5} {t['documents']:>7,} documents {t['bytes']:>13,} bytes {t['tokens']:>12,} tokens ({ratio:.2f} bytes per token)")
    print(f"prepare: wrote {target}")
    return 0
