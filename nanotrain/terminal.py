"""What the stages that talk with a person print: text that a model wrote, and remarks beside it."""

from __future__ import annotations

import re
import sys

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` that a terminal shows and does not obey: control characters but line ends and tabs spelled as \\x1b, carriage returns left out."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text.replace("\r", ""))


def write(text: str) -> None:
    """Print text that a model wrote, at once: as it is into a pipe or file, `printable` on a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def aside(line: str) -> None:
    """Print a remark, on standard error."""
    print(line, file=sys.stderr)
