"""A lossless sentencepiece tokenizer: decode(encode(x)) == x for every string.

sentencepiece with byte fallback and identity normalisation loses only two things: U+2581, which is its own sign for a
space, and lone surrogates, which UTF-8 cannot carry. Both are escaped before it and restored after it. Special tokens
are control symbols: no text ever encodes to them.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

SPECIAL_TOKENS = (
    "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<image>", "<video>", "<audio>", *(f"<reserved_{i}>" for i in range(4)),
)  # fmt: skip
"""Besides <unk>, <bos> and <eos> (ids 0, 1, 2): pad, chat roles, fill-in-the-middle and placeholders, from id 3 on."""

_PROBE = "  \ta  b\r\n\n\0\ufb01 \xbd e\u0301 \u2581\ud800 \u4e16\ue000\U0001f600 0123 <bos><eos><unk>" + "".join(SPECIAL_TOKENS) + "  "
"""What a tokenizer must give back before it is trusted with a corpus."""

_ESCAPE = "\U000f5c00"
_UNSAFE = re.compile(f"[\u2581{_ESCAPE}\ud800-\udfff]")
_ESCAPED = re.compile(f"{_ESCAPE}(.)", re.DOTALL)
_SURROGATES = 0xF6000 - 0xD800  # surrogates move to a private plane after the escape character


def _escape(text: str) -> str:
    def replacement(match):
        character = match[0]
        if character == "\u2581":
            return _ESCAPE + "_"
        return _ESCAPE + (_ESCAPE if character == _ESCAPE else chr(ord(character) + _SURROGATES))

    return _UNSAFE.sub(replacement, text) if _UNSAFE.search(text) else text


def _unescape(text: str) -> str:
    def replacement(match):
        code = match[1]
        if code == "_":
            return "\u2581"
        if code != _ESCAPE and 0xD800 <= ord(code) - _SURROGATES <= 0xDFFF:
            return chr(ord(code) - _SURROGATES)
        return code

    return _ESCAPED.sub(replacement, text) if _ESCAPE in text else text


class Tokenizer:
    """Text to token ids and back. `model` is the bytes of a sentencepiece model made by `train`."""

    def __init__(self, model: bytes):
        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"not a sentencepiece model ({len(model)} bytes): {error}") from None
        self.vocab_size = self._processor.vocab_size()
        self.unk, self.bos, self.eos = self._processor.unk_id(), self._processor.bos_id(), self._processor.eos_id()
        self.special = {name: self._processor.piece_to_id(name) for name in SPECIAL_TOKENS}
        self.pad = self.special["<pad>"]

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a model file. ValueError naming the file where it is missing, damaged, or not lossless with our special tokens."""
        try:
            tokenizer = cls(Path(path).read_bytes())
        except OSError as error:
            raise ValueError(f"tokenizer {path}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"tokenizer {path}: {error}") from None
        if fault := tokenizer._fault():
            raise ValueError(f"tokenizer {path}: {fault}; use one that nanotrain prepare trained")
        return tokenizer

    def _fault(self) -> str | None:
        """What makes this model, perhaps trained by another program, unfit: every later figure of bits per byte would be wrong."""
        specials = {"<unk>": self.unk, "<bos>": self.bos, "<eos>": self.eos} | self.special
        missing = [name for name, token in specials.items() if token < 0 or (token == self.unk and name != "<unk>")]
        if missing:
            return f"has no special token {' '.join(missing)}"
        ids = self.encode(_PROBE)
        if self.decode(ids + ids) != _PROBE + _PROBE:  # twice: a space put before each text shows only where two meet
            return "does not give back the text it was given"
        if forged := [name for name, token in specials.items() if token in ids]:
            return f"makes special tokens out of text: {' '.join(forged)}"
        return None

    def fingerprint(self) -> str:
        """SHA-256 of the model's bytes."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos or eos; special tokens in it are plain text."""
        return self._processor.encode(_escape(text))

    def decode(self, ids: Iterable[int], *, escaped: bool = False) -> str:
        """Text of token ids; special tokens are dropped. Bytes that are no UTF-8 become U+FFFD; `escaped` leaves escapes in."""
        text = self._processor.decode(list(ids))
        return text if escaped else _unescape(text)

    def piece(self, token: int) -> str:
        """A token's own spelling, special tokens included."""
        return self._processor.id_to_piece(token)


class StreamDecoder:
    """Text of tokens as they arrive: what later tokens could still change (half a character) is held back."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def add(self, token: int, *, last: bool = False) -> str:
        """Take one more token, return the text that it completes."""
        self.ids.append(token)
        raw = self.tokenizer.decode(self.ids, escaped=True)
        safe = raw if last else raw.rstrip("\ufffd")
        if not last and (len(safe) - len(safe.rstrip(_ESCAPE))) % 2:
            safe = safe[:-1]  # the second half of an escape is still to come
        new = _unescape(safe[len(self.shown) :])
        self.shown = safe
        if len(self.ids) > 64 and safe == raw and "\n" in new:  # start afresh, so that a long stream stays cheap
            self.ids, self.shown = [], ""
        return new


def train(texts: Iterable[str], *, vocab_size: int, kind: str = "bpe") -> Tokenizer:
    """Train on `texts`: "bpe" or "unigram", pieces may span spaces and line ends, digits stand alone.

    Raises ValueError where the texts are too small for the vocabulary asked for.
    """
    threads = 4  # never a matter of the machine: unigram sums by thread, so another number gives another model
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts), model_writer=out, vocab_size=vocab_size, model_type=kind, num_threads=threads,
            byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, split_by_whitespace=False, split_digits=True, character_coverage=0.9995,
            max_sentence_length=1 << 24, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, bos_piece="<bos>", eos_piece="<eos>",
            control_symbols=list(SPECIAL_TOKENS), minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--data.vocab_size {vocab_size}: too many for this text; use fewer tokens or more text (--data.tokenizer_text); sentencepiece: {reason}"
        ) from None
    return Tokenizer(out.getvalue())


def _lines(texts: Iterable[str], lines: int = 20, characters: int = 4000) -> Iterator[str]:
    """Pieces of about twenty lines: sentencepiece learns line ends and indentation from them, and bounds its sentences."""
    for text in texts:
        held: list[str] = []
        size = 0
        for line in _escape(text).splitlines(keepends=True):
            for start in range(0, len(line), characters):
                held.append(line[start : start + characters])
                size += len(held[-1])
                if len(held) >= lines or size >= characters:
                    yield "".join(held).replace("\0", "")
                    held, size = [], 0
        if held:
            yield "".join(held).replace("\0", "")
