"""Documents to packed token shards, on all cores: batches of texts go to worker processes, arrays of ids come back in order."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from nanotrain.data.shards import Shard, ShardWriter
from nanotrain.data.sources import Document
from nanotrain.tokenizer import Tokenizer

_BATCH = 1 << 18
"""Characters sent to a worker at once."""


def is_validation(document: Document, share: float) -> bool:
    """Whether the hash of the document (of its twins' group) puts it into the validation split."""
    return int.from_bytes(document.split_key[:8], "big") < share * 2**64


def pack(documents: Iterable[Document], tokenizer: Tokenizer, directory: Path, *, val_share: float, cores: int, progress) -> dict[str, list[Shard]]:
    """Tokenise `documents` into shards of splits "train" and "val" under `directory`.

    uint16 ids where the vocabulary fits, else uint32. `progress(n)` is told of every n bytes done.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    writers = {split: ShardWriter(directory, split, dtype) for split in ("train", "val")}
    slots = threading.Semaphore(4 * cores)  # bounds what is read ahead of the workers
    encode = partial(_encode_batch, tokenizer.model)
    with multiprocessing.get_context("spawn").Pool(cores) if cores > 1 else nullcontext() as pool:
        batches = _batches(documents, val_share, slots)
        for batch in pool.imap(encode, batches) if pool else map(encode, batches):
            slots.release()
            for split, text_bytes, ids in batch:
                writers[split].add(np.frombuffer(ids, dtype=np.int32), text_bytes)
                progress(text_bytes)
    return {split: writer.close() for split, writer in writers.items()}


def _batches(documents: Iterable[Document], val_share: float, slots: threading.Semaphore) -> Iterator[list[tuple[str, str]]]:
    held: list[tuple[str, str]] = []
    size = 0
    for document in documents:
        held.append(("val" if is_validation(document, val_share) else "train", document.text))
        size += len(document.text)
        if size >= _BATCH:
            slots.acquire()
            yield held
            held, size = [], 0
    if held:
        slots.acquire()
        yield held


@lru_cache(1)
def _tokenizer(model: bytes) -> Tokenizer:
    return Tokenizer(model)


def _encode_batch(model: bytes, batch: list[tuple[str, str]]) -> list[tuple[str, int, bytes]]:
    t = _tokenizer(model)
    return [
        (split, len(text.encode("utf-8", "surrogatepass")), np.array([t.bos, *t.encode(text), t.eos], dtype=np.int32).tobytes())
        for split, text in batch
    ]
