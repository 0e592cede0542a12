"""Files that exist whole or not at all, and are on the disk when they are said to be."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a small file whole or not at all; text as UTF-8."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    temporary.replace(path)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's names, are on the disk. OSError where they cannot be."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
