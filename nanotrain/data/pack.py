"""Documents to packed token shards, on all cores: batches of texts go to worker processes, arrays of ids come back in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from nanotrain.data.shards import Shard, ShardWriter
from nanotrain.data.sources import Document
from nanotrain.data.workers import in_order
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
    encode, batches = partial(_encode_batch, tokenizer), _batches(documents, val_share)
    results = in_order(encode, batches, processes=cores, remedy="use fewer --data.cores") if cores > 1 else (encode(batch) for batch in batches)
    with closing(results):
        for batch in results:
            for split, text_bytes, ids in batch:
                writers[split].add(np.frombuffer(ids, dtype=np.int32), text_bytes)
                progress(text_bytes)
    return {split: writer.close() for split, writer in writers.items()}


def _batches(documents: Iterable[Document], val_share: float) -> Iterator[list[tuple[str, str]]]:
    held: list[tuple[str, str]] = []
    size = 0
    for document in documents:
        held.append(("val" if is_validation(document, val_share) else "train", document.text))
        size += len(document.text)
        if size >= _BATCH:
            yield held
            held, size = [], 0
    if held:
        yield held


def _encode_batch(t: Tokenizer, batch: list[tuple[str, str]]) -> list[tuple[str, int, bytes]]:
    return [
        (split, len(text.encode("utf-8", "surrogatepass")), np.array([t.bos, *t.encode(text), t.eos], dtype=np.int32).tobytes())
        for split, text in batch
    ]
