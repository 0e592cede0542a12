"""Packed token shards on disk: one flat file of token ids, one of document boundaries, and an index with fingerprints.

A data directory holds
    tokenizer.model                     the sentencepiece model
    train-00000.bin, val-00000.bin      token ids, uint16 or uint32, documents end to end: bos, text, eos
    train-00000.npy, ...                int64 (documents, 2): first token of each document, bytes of its original text
    index.json                          counts and SHA-256 of every file, fingerprints of tokenizer and data; written last
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

import numpy as np

FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One pair of files: `tokens` ids, `documents` documents made of `bytes` bytes of text."""

    name: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    boundaries_sha256: str


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Writes documents of one split into shards of at most `shard_tokens` tokens."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int = 1 << 28):
        self.directory, self.split, self.dtype, self.shard_tokens = directory, split, np.dtype(dtype), shard_tokens
        self.shards: list[Shard] = []
        self._file = None

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append a document's ids (bos and eos included) that stand for `text_bytes` bytes of text."""
        if self._file is not None and self._tokens + len(ids) > self.shard_tokens:
            self._end_shard()
        if self._file is None:
            self._name = f"{self.split}-{len(self.shards):05d}"
            self._file = (self.directory / f"{self._name}.bin").open("wb")
            self._hash, self._tokens, self._boundaries = hashlib.sha256(), 0, []
        raw = ids.astype(self.dtype).tobytes()
        self._file.write(raw)
        self._hash.update(raw)
        self._boundaries.append((self._tokens, text_bytes))
        self._tokens += len(ids)

    def _end_shard(self) -> None:
        self._file.close()
        self._file = None
        path = self.directory / f"{self._name}.npy"
        table = np.array(self._boundaries, dtype=np.int64).reshape(-1, 2)
        np.save(path, table, allow_pickle=False)
        self.shards.append(Shard(self._name, self._tokens, len(table), int(table[:, 1].sum()), self._hash.hexdigest(), file_sha256(path)))

    def close(self) -> list[Shard]:
        """Finish the last shard; returns all of them."""
        if self._file is not None:
            self._end_shard()
        return self.shards


def write_index(directory: Path, *, dtype: np.dtype, vocab_size: int, tokenizer_sha256: str, splits: dict[str, list[Shard]], facts: dict) -> dict:
    """Write index.json atomically; its `data_sha256` covers every shard of every split. Returns the index."""
    table = {split: [vars(shard) for shard in shards] for split, shards in splits.items()}
    hashes = json.dumps({s: [(x["sha256"], x["boundaries_sha256"]) for x in shards] for s, shards in table.items()}, sort_keys=True)
    index = dict(
        format=FORMAT, dtype=np.dtype(dtype).name, vocab_size=vocab_size, tokenizer_sha256=tokenizer_sha256,
        data_sha256=hashlib.sha256(hashes.encode()).hexdigest(), splits=table, facts=facts,
    )  # fmt: skip
    temporary = directory / ".index.json.tmp"
    temporary.write_text(json.dumps(index, indent=1) + "\n")
    temporary.replace(directory / "index.json")
    return index


class TokenShards:
    """The shards of one split, memory-mapped, as one array of tokens in their order."""

    def __init__(self, directory: str | Path, split: str, *, verify: bool = True):
        """Raises ValueError naming the file for what is missing, truncated or (with `verify`) not what the index hashed."""
        self.directory = Path(directory)
        self.index = read_index(self.directory)
        self.shards = [Shard(*(entry[f.name] for f in fields(Shard))) for entry in self.index["splits"].get(split, [])]
        self.vocab_size = self.index["vocab_size"]
        self.tokens = sum(s.tokens for s in self.shards)
        self.bytes = sum(s.bytes for s in self.shards)
        if not self.tokens:
            raise ValueError(f"{self.directory}: no tokens in split {split!r}; run nanotrain prepare on more text")
        dtype = np.dtype(self.index["dtype"])
        self._maps, boundaries = [], []
        for shard in self.shards:
            path, table = self.directory / f"{shard.name}.bin", self.directory / f"{shard.name}.npy"
            for file, size, expected in ((path, shard.tokens * dtype.itemsize, shard.sha256), (table, None, shard.boundaries_sha256)):
                if not file.is_file():
                    raise ValueError(f"{file}: missing; run nanotrain prepare again")
                if size is not None and file.stat().st_size != size:
                    raise ValueError(f"{file}: {file.stat().st_size} bytes, the index says {size} (truncated?); run nanotrain prepare again")
                if verify and file_sha256(file) != expected:
                    raise ValueError(f"{file}: its SHA-256 is not the index's {expected[:12]}... (damaged or changed); run nanotrain prepare again")
            self._maps.append(np.memmap(path, dtype=dtype, mode="r").view(np.ndarray))  # memmap's own slices are slow
            boundaries.append(np.load(table, allow_pickle=False))
        self._first = np.concatenate([[0], np.cumsum([s.tokens for s in self.shards])])
        self.document_starts = np.concatenate([b[:, 0] + f for b, f in zip(boundaries, self._first, strict=False)])
        self.document_bytes = np.concatenate([b[:, 1] for b in boundaries])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64. Raises ValueError with shard and offset for an id outside the vocabulary."""
        parts = []
        shard = int(np.searchsorted(self._first, start, "right")) - 1
        while start < stop:
            first, end = self._first[shard], min(stop, self._first[shard + 1])
            part = self._maps[shard][start - first : end - first].astype(np.int64)
            if part.size and part.max() >= self.vocab_size:
                at = int(np.argmax(part >= self.vocab_size))
                where = f"{self.directory / self.shards[shard].name}.bin, token {start - first + at}"
                raise ValueError(f"{where}: id {part[at]} outside the vocabulary of {self.vocab_size}; run nanotrain prepare again")
            parts.append(part)
            start, shard = end, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document, bos to eos, as int64."""
        stop = self.document_starts[number + 1] if number + 1 < len(self.document_starts) else self.tokens
        return self.read(int(self.document_starts[number]), int(stop))


def read_index(directory: Path) -> dict:
    """The index of a data directory. ValueError naming the file where it is missing, unreadable or of another format."""
    path = directory / "index.json"
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; run nanotrain prepare --data.dir={directory} first") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); run nanotrain prepare again") from None
    _expect(path, index, dict(format=int))
    if index["format"] != FORMAT:
        raise ValueError(f"{path}: format {index['format']}, this version reads {FORMAT}; run nanotrain prepare again")
    _expect(path, index, dict(dtype=str, vocab_size=int, tokenizer_sha256=str, data_sha256=str, splits=dict, facts=dict))
    if index["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"{path}: damaged: dtype {index['dtype']!r}, not uint16 or uint32; run nanotrain prepare again")
    for split in index["splits"]:
        _expect(path, index["splits"], {split: list})
        for entry in index["splits"][split]:
            _expect(path, entry, get_type_hints(Shard))
    return index


def _expect(path: Path, table: object, kinds: dict[str, type]) -> None:
    """Raise ValueError unless `table`, read from the JSON at `path`, has keys of these kinds."""
    for key, kind in kinds.items():
        if not isinstance(table, dict) or type(table.get(key)) is not kind:
            raise ValueError(f"{path}: damaged: no {key!r} of type {kind.__name__} where one belongs; run nanotrain prepare again")
