"""Where text comes from: the running Python's own standard library, or the user's files, as a stream of documents.

What cannot be read is named (file:line), counted and skipped; too much of it stops the work.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib.util
import json
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz")
MAX_DOCUMENT = 1 << 26
"""Longest document or line read [bytes]; a longer one counts as corrupt and never enters memory whole."""


@dataclass(frozen=True)
class Document:
    """One text. `split_key` decides between training and validation: documents that share it land on the same side."""

    name: str
    text: str
    split_key: bytes


class Corrupt:
    """Names, counts and limits what could not be read."""

    def __init__(self, quota: int, say: Callable[[str], None]):
        self.quota, self.say, self.count = quota, say, 0

    def __call__(self, where: str, why: str) -> None:
        self.count += 1
        self.say(f"skipped {where}: {why}")
        if self.count > self.quota:
            raise ValueError(f"{where}: {why}; more than --data.max_corrupt {self.quota} unreadable pieces, mend the data or raise the quota")


def digest(text: str) -> bytes:
    """SHA-256 of a text (lone surrogates included)."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def read_documents(source: str, text_field: str, corrupt: Corrupt) -> Iterator[Document]:
    """Documents of `source`: "python", or files, globs and directories separated by commas, in sorted order.

    Raises ValueError naming --data.source where nothing matches.
    """
    if source == "python":
        yield from python_documents()
        return
    for path in expand(source):
        lines = path.name.endswith((".jsonl", ".jsonl.gz"))
        for name, text in _json_lines(path, text_field, corrupt) if lines else _whole_file(path, corrupt):
            if text:
                yield Document(name, text, digest(text))


def expand(source: str) -> list[Path]:
    """The files that files, globs and directories (searched through) separated by commas stand for."""
    found: list[Path] = []
    for pattern in filter(None, source.split(",")):
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        elif path.is_file():
            matches = [path]
        else:
            matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not matches:
            raise ValueError(
                f"--data.source {pattern}: no such file, glob or directory with {' '.join(SUFFIXES)}; the word `python` is the built-in text"
            )
        for match in matches:
            if not match.name.endswith(SUFFIXES):
                raise ValueError(f"--data.source {match}: unknown kind of file; one of {' '.join(SUFFIXES)}")
        found += matches
    return list(dict.fromkeys(found))


def _whole_file(path: Path, corrupt: Corrupt) -> Iterator[tuple[str, str]]:
    try:
        size = path.stat().st_size
        if size > MAX_DOCUMENT:
            corrupt(f"{path}:1", f"a document of {size} bytes, the limit is {MAX_DOCUMENT}; split it, or use .jsonl")
            return
        raw = path.read_bytes()
    except OSError as error:
        corrupt(f"{path}:1", error.strerror or str(error))
        return
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        corrupt(f"{path}:{line}", f"not UTF-8: {error.reason}")
    else:
        yield str(path), text


def _json_lines(path: Path, text_field: str, corrupt: Corrupt) -> Iterator[tuple[str, str]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(MAX_DOCUMENT + 1):
                number += 1
                where = f"{path}:{number}"
                if len(line) > MAX_DOCUMENT:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_DOCUMENT)
                    corrupt(where, f"a line longer than {MAX_DOCUMENT} bytes")
                    continue
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except UnicodeDecodeError as error:
                    corrupt(where, f"not UTF-8: {error.reason}")
                except (ValueError, RecursionError) as error:  # a ValueError of its own kind: an integer of thousands of digits
                    corrupt(where, f"broken JSON: {error}")
                else:
                    text = record.get(text_field) if isinstance(record, dict) else None
                    if isinstance(text, str):
                        yield where, text
                    else:
                        corrupt(where, f"no text in field {text_field!r} (--data.text_field)")
    except (OSError, EOFError, zlib.error) as error:
        corrupt(f"{path}:{number + 1}", f"cannot be read on: {error}")


def python_documents() -> Iterator[Document]:
    """The running interpreter's standard library without its tests, and the topics of its reference, a document each.

    Twins get one split key, so that no held-out document has its near-copy in training: modules that differ by a leading
    `_py` or `_` (decimal, _pydecimal), and documents that share at least half of the shorter one's long lines.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    texts: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if left_out.isdisjoint(parts) and parts != ("pydoc_data", "topics.py"):
            try:
                text = path.read_bytes().decode()
            except (OSError, UnicodeDecodeError):
                continue  # a few files are in other encodings on purpose
            if text.strip():
                texts["/".join(parts)] = text
    topics = importlib.import_module("pydoc_data.topics").topics if importlib.util.find_spec("pydoc_data") else {}
    texts |= {f"topic/{name}": topics[name] for name in sorted(topics)}
    if len(texts) < 100:
        raise ValueError(f"--data.source python: no standard library sources under {root}; pass your own files")
    groups = _twins(texts)
    keys = {name: digest(texts[min(members)]) for members in groups for name in members}
    for name, text in texts.items():
        yield Document(name, text, keys[name])


def python_corpus_name() -> str:
    """Which text `python` stands for on this machine."""
    return f"the standard library of Python {sys.version.split()[0]}"


def _twins(texts: dict[str, str]) -> list[list[str]]:
    """The names in groups of near-copies."""
    parent = {name: name for name in texts}

    def find(name):
        while parent[name] != name:
            name = parent[name]
        return name

    lines = {name: {line for line in map(str.strip, text.splitlines()) if len(line) >= 20} for name, text in texts.items()}
    modules: dict[str, str] = {}
    holders: dict[str, list[str]] = {}
    for name, own in lines.items():
        module = name.removesuffix(".py").removesuffix("/__init__").removeprefix("_py").lstrip("_")
        parent[find(name)] = find(modules.setdefault(module, name))
        for line in own:
            holders.setdefault(line, []).append(name)
    shared: Counter[tuple[str, str]] = Counter()
    for names in holders.values():
        if 1 < len(names) <= 200:  # a line in more documents than that marks no twin
            for i, first in enumerate(names):
                shared.update((first, second) for second in names[i + 1 :])
    for (first, second), count in shared.items():
        if count >= max(3, 0.5 * min(len(lines[first]), len(lines[second]))):
            parent[find(second)] = find(first)
    groups: dict[str, list[str]] = {}
    for name in texts:
        groups.setdefault(find(name), []).append(name)
    return list(groups.values())
