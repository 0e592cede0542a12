"""A lossless sentencepiece tokenizer: decode(encode(x)) == x for every string.

sentencepiece with byte fallback and identity normalisation loses only two things: U+2581, which is its own sign for a
space, and lone surrogates, which UTF-8 cannot carry. Both are escaped before it and restored after it. Special tokens
are control symbols: no text ever encodes to them.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import sentencepiece

SPECIAL_TOKENS = (
    "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<image>", "<video>", "<audio>", *(f"<reserved_{i}>" for i in range(4)),
)  # fmt: skip
"""Besides <unk>, <bos> and <eos> (ids 0, 1, 2): pad, chat roles, fill-in-the-middle and placeholders, from id 3 on."""

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] or message['content'] is not string %}
        {{- raise_exception('a message needs a role (system, user, assistant, tool) and text as its content') }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""
"""How a chat is spelled for a model of ours, as a Jinja template: <bos><|user|>Hello<|end|><|assistant|>"""

_PROBE = "  \ta  b\r\n\n\0\ufb01 \xbd e\u0301 \u2581\ud800 \u4e16\ue000\U0001f600 0123 <bos><eos><unk>" + "".join(SPECIAL_TOKENS) + "  "
"""What a tokenizer must give back before it is trusted with a corpus."""

_ESCAPE = "\U000f5c00"
_UNSAFE = re.compile(f"[\u2581{_ESCAPE}\ud800-\udfff]")
_ESCAPED = re.compile(f"{_ESCAPE}(.)", re.DOTALL)
_SURROGATES = 0xF6000 - 0xD800  # surrogates move to a private plane after the escape character


def escape(text: str) -> str:
    """Text that sentencepiece carries without loss, and that UTF-8 can encode."""

    def replacement(match):
        character = match[0]
        if character == "\u2581":
            return _ESCAPE + "_"
        return _ESCAPE + (_ESCAPE if character == _ESCAPE else chr(ord(character) + _SURROGATES))

    return _UNSAFE.sub(replacement, text) if _UNSAFE.search(text) else text


def unescape(text: str) -> str:
    """The text that `escape` was given."""

    def replacement(match):
        code = match[1]
        if code == "_":
            return "\u2581"
        if code != _ESCAPE and 0xD800 <= ord(code) - _SURROGATES <= 0xDFFF:
            return chr(ord(code) - _SURROGATES)
        return code

    return _ESCAPED.sub(replacement, text) if _ESCAPE in text else text


class Tokenizer:
    """Text to token ids and back. `model` is the bytes of a sentencepiece model made by `train`.

    What the tokenizers of `nanotrain.hf_tokenizer` share with it:
    vocab_size                  ids are below it [tokens]
    unk, bos, eos, pad          ids of special tokens; here always there, None where a foreign tokenizer has none
    special                     ids of special tokens by their spelling
    stop_ids                    tokens that end a text or a turn
    add_bos                     whether a text starts with bos; no method here puts it there
    chat_template               a Jinja template of chats (see `nanotrain.hf_tokenizer.render_chat`), or None
    open_ended                  tokens after which the text of those before may still change
    """

    add_bos = True
    open_ended: frozenset[int] = frozenset()

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
        self.stop_ids = frozenset([self.eos, self.special["<|end|>"]])
        self.chat_template = CHAT_TEMPLATE
        # Ids of every token that no text encodes to, bos, eos and unk among them.
        control = (i for i in range(self.vocab_size) if self._processor.is_control(i) or self._processor.is_unknown(i))
        self.control = {self._processor.id_to_piece(i): i for i in control}
        self._spellings = spellings(self.control)

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

    @classmethod
    def accepts(cls, model: bytes) -> bool:
        """Whether the bytes of a model are such that `load` would take them."""
        try:
            return cls(model)._fault() is None
        except ValueError:
            return False

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
        """SHA-256 of the model's bytes. What decides ids, so a chat template is no part of it."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos or eos; special tokens in it are plain text."""
        return self._processor.encode(escape(text))

    def encode_chat(self, *parts: str) -> list[int]:
        """Token ids of a rendered chat: special tokens spelled in it are those tokens, but in every second part they are text."""
        ids: list[int] = []
        for number, part in enumerate(parts):
            for text in [part] if number % 2 else self._spellings.split(part):
                ids += [self.control[text]] if not number % 2 and text in self.control else self.encode(text)
        return ids

    def decode(self, ids: Iterable[int], *, escaped: bool = False) -> str:
        """Text of token ids; special tokens, and ids that no token has, are dropped.

        Bytes that are no UTF-8 become U+FFFD; `escaped` leaves escapes in.
        """
        text = self._processor.decode([i for i in ids if i < self.vocab_size])  # a model's vocabulary may be the larger
        return text if escaped else unescape(text)

    def piece(self, token: int) -> str:
        """A token's own spelling, special tokens included; empty for an id that no token has."""
        return self._processor.id_to_piece(token) if token < self.vocab_size else ""


def spellings(tokens: Iterable[str]) -> re.Pattern:
    """Finds special tokens in text, the longest where several start; one group, for `split` to keep them."""
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")") if tokens else re.compile("((?!))")


class StreamDecoder:
    """Text of tokens as they arrive: what later tokens could still change (half a character) is held back.

    All it gives together is what `tokenizer.decode` gives of all the tokens. `tokenizer` is a Tokenizer or one of
    `nanotrain.hf_tokenizer`.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def add(self, token: int | None, *, last: bool = False) -> str:
        """Take one more token (None is none), return the text that it completes."""
        if token is not None:
            self.ids.append(token)
        return "" if not last and token in self.tokenizer.open_ended else self._text(last)

    def finish(self) -> str:
        """What was held back, where no more tokens come."""
        return self._text(True)

    def _text(self, last: bool) -> str:
        raw = self.tokenizer.decode(self.ids, escaped=True)
        new = raw[len(self.shown) :]
        if not last:
            new = new.rstrip("\ufffd")
            if (len(new) - len(new.rstrip(_ESCAPE))) % 2:
                new = new[:-1]  # the second half of an escape is still to come
        self.shown += new
        if len(self.ids) > 64 and new and self.shown == raw:  # so that a long stream stays cheap; the last token tells that no text starts here
            self.ids = self.ids[-1:]
            self.shown = self.tokenizer.decode(self.ids, escaped=True)
        return unescape(new)


def train(texts: Iterable[str], *, vocab_size: int, kind: str = "bpe") -> Tokenizer:
    """Train on `texts`: "bpe" or "unigram", pieces may span spaces and line ends, digits stand alone.

    Scores of a unigram model are rounded to 1/16, so that sentencepiece's sums in float32 are exact (up to 2**20, half a
    million characters): ties, as of "##" "#" and "#" "##", then fall as they do in any other program that reads the model.

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
    return Tokenizer(_with_round_scores(out.getvalue()) if kind == "unigram" else out.getvalue())


def _with_round_scores(model: bytes, parts: int = 16) -> bytes:
    def score(field: Field) -> Field:
        if field.number != 2:
            return field
        return field._replace(value=struct.pack("<f", round(struct.unpack("<f", field.value)[0] * parts) / parts))

    def rounded(field: Field) -> Field:
        return field._replace(value=write_fields(map(score, read_fields(field.value)))) if field.number == PIECE else field

    return write_fields(map(rounded, read_fields(model)))


PIECE, TRAINER, NORMALIZER = 1, 2, 3
"""Fields of a sentencepiece model. A piece holds 1: its spelling, 2: its score (float32), 3: its type (1 where absent)."""


class Field(NamedTuple):
    """A field of a Protocol Buffers message. Where a message repeats one that is not a list, the last counts."""

    number: int
    kind: int
    """How it is written: 0 a number, 1 eight bytes, 2 bytes of any length, 5 four bytes."""
    value: int | bytes


def read_fields(message: bytes) -> Iterator[Field]:
    """Fields of a message, in order. ValueError where it is damaged."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    try:
        while at < len(message):
            key = number()
            if key & 7 == 0:
                yield Field(key >> 3, 0, number())
                continue
            size = {1: 8, 5: 4}[key & 7] if key & 7 != 2 else number()
            yield Field(key >> 3, key & 7, message[at : at + size])
            at += size
    except (IndexError, KeyError):
        raise ValueError(f"a damaged Protocol Buffers message (at byte {at} of {len(message)})") from None


def write_fields(fields: Iterable[Field]) -> bytes:
    """The message of `fields`."""

    def number(value: int) -> bytes:
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    def written(field: Field) -> bytes:
        key = number(field.number << 3 | field.kind)
        if field.kind == 0:
            return key + number(field.value)
        return key + (number(len(field.value)) if field.kind == 2 else b"") + field.value

    return b"".join(map(written, fields))


def _lines(texts: Iterable[str], lines: int = 20, characters: int = 4000) -> Iterator[str]:
    """Pieces of about twenty lines: sentencepiece learns line ends and indentation from them, and bounds its sentences."""
    for text in texts:
        held: list[str] = []
        size = 0
        for line in escape(text).splitlines(keepends=True):
            for start in range(0, len(line), characters):
                held.append(line[start : start + characters])
                size += len(held[-1])
                if len(held) >= lines or size >= characters:
                    yield "".join(held).replace("\0", "")
                    held, size = [], 0
        if held:
            yield "".join(held).replace("\0", "")
