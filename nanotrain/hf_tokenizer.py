"""Tokenizers of Hugging Face directories, in and out, and chats spelled by their templates.

In: `load_hf_tokenizer` gives a tokenizer with the interface of `nanotrain.tokenizer.Tokenizer` (listed there), one of
    Tokenizer        where tokenizer.model is one of ours
    JsonTokenizer    tokenizer.json, run by the `tokenizers` package (`pip install 'nanotrain[hf]'`)
    PieceTokenizer   tokenizer.model, a sentencepiece model as of Llama 2, Mistral or Gemma, where that package is missing
Out: `save_hf_tokenizer` writes what AutoTokenizer of transformers loads; a foreign tokenizer is written back byte for byte.

Foreign tokenizers need not be lossless; they read lone surrogates as U+FFFD. Where transformers reads special tokens out of
any text, `encode` here never does: a spelling in text is text. `encode_chat` reads them, for rendered chats.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import sentencepiece

from nanotrain.tokenizer import NORMALIZER, PIECE, TRAINER, Field, Tokenizer, escape, read_fields, spellings, write_fields

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip
"""What of a directory belongs to its tokenizer."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""Spellings of the tokens that stand for a byte each, where no other token fits."""


def load_hf_tokenizer(directory: str | Path):
    """The tokenizer of a Hugging Face directory. ValueError naming the file where it is missing or unfit."""
    directory = Path(directory)
    try:
        files = {name: (directory / name).read_bytes() for name in (*FILES, "config.json") if (directory / name).is_file()}
    except OSError as error:
        raise ValueError(f"tokenizer {error.filename}: {error.strerror}") from None
    model = _object(files, "config.json", directory)
    files.pop("config.json", None)
    if "generation_config.json" not in files and "eos_token_id" in model:  # transformers too then takes the model's word for what ends a text
        files["generation_config.json"] = _json({key: model.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
    try:
        return _from_files(files, directory)
    except (AttributeError, KeyError, OverflowError, TypeError) as error:  # the files may come from anywhere
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"tokenizer {directory}: its JSON files hold something of the wrong type ({reason})") from None


def _from_files(files: dict[str, bytes], directory: Path):
    settings = _Settings(files, directory)
    pieces = files.get("tokenizer.model")
    if pieces is not None and Tokenizer.accepts(pieces):
        tokenizer = Tokenizer(pieces)
        tokenizer.chat_template = settings.chat_template or tokenizer.chat_template
        return tokenizer
    if "tokenizer.json" in files and importlib.util.find_spec("tokenizers") is not None:
        return JsonTokenizer(files, directory)
    if pieces is not None and not _is_ranks(pieces):
        return PieceTokenizer(files, directory)
    if "tokenizer.json" in files:
        raise ValueError(f"tokenizer {directory / 'tokenizer.json'}: needs the tokenizers package; pip install 'nanotrain[hf]'")
    raise ValueError(f"tokenizer {directory}: holds no tokenizer.json and no sentencepiece tokenizer.model")


def _object(files: Mapping[str, bytes], name: str, directory: Path) -> dict:
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"tokenizer {directory / name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"tokenizer {directory / name}: a JSON object is expected, not {type(value).__name__}")
    return value


def _json(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"


def _is_ranks(model: bytes) -> bool:
    """Whether a tokenizer.model is a list of base64 and rank, as Llama 3 puts beside its tokenizer.json, and no sentencepiece model."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", model) is not None


class _Settings:
    """What the JSON files beside a tokenizer say of it. ValueError naming the file that is broken."""

    def __init__(self, files: Mapping[str, bytes], directory: Path):
        names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
        self.config, self.names, self.generation = (_object(files, name, directory) for name in names)
        added = self.config.get("added_tokens_decoder") or {}
        if odd := [token for token in added if not token.isdecimal()]:
            raise ValueError(f"tokenizer {directory / names[0]}: added_tokens_decoder {odd[0]!r}: must be a token's id")
        self.added: dict[int, dict] = {int(token): {**entry} for token, entry in added.items()}
        """Tokens besides the model's own, by id: content, special, lstrip, rstrip ..."""
        if not self.added:
            special = set(self.named())
            added = _object(files, "added_tokens.json", directory)
            self.added = {token: {"content": name, "special": name in special} for name, token in added.items()}
        template = self.config.get("chat_template")
        if "chat_template.jinja" in files:
            template = files["chat_template.jinja"].decode("utf-8", "replace")
        if isinstance(template, list):  # named templates, of which "default" is for plain chats
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        self.chat_template: str | None = template

    def named(self) -> dict[str, None]:
        """Spellings of all special tokens that have a role, each once."""
        roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
        found = [self.spelling(f"{role}_token") for role in roles]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            extra = self.config.get(key) or self.names.get(key) or []
            found += map(_content, extra.values() if isinstance(extra, dict) else extra)
        return dict.fromkeys(name for name in found if name)

    def spelling(self, key: str) -> str | None:
        """The token that stands under a key as "eos_token"."""
        return _content(self.config.get(key) or self.names.get(key))


def _content(token: str | dict | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


class _Foreign:
    """What JsonTokenizer and PieceTokenizer share. They set `vocab_size`, `special` and `_ids` (ids by spelling) first."""

    open_ended: frozenset[int] = frozenset()
    vocab_size: int
    special: dict[str, int]
    _ids: Mapping[str, int]

    def _read_roles(self, files: Mapping[str, bytes], settings: _Settings, own: Mapping[str, int]) -> None:
        """Attributes that both kinds take from the files beside; `own` are ids by role that the model itself names."""
        self.files, self.chat_template = dict(files), settings.chat_template
        self._dropped = frozenset(self.special.values())

        def ids(role: str) -> list[int]:
            named, more = self._ids.get(settings.spelling(f"{role}_token")), settings.generation.get(f"{role}_token_id")
            found = (named, own.get(role), *(more if isinstance(more, list) else [more]))
            return [i for i in found if isinstance(i, int) and i >= 0]  # older configs say -1 for none

        self.unk, self.bos, self.eos, self.pad = (next(iter(ids(role)), None) for role in ("unk", "bos", "eos", "pad"))
        self.stop_ids = frozenset(ids("eos"))

    def decode(self, ids: Iterable[int], *, escaped: bool = False) -> str:
        """Text of token ids; special tokens are dropped. `escaped` gives it as `nanotrain.tokenizer.escape` does."""
        text = self._decode([i for i in ids if i not in self._dropped])
        return escape(text) if escaped else text


def _scalar(text: str) -> str:
    """Text without lone surrogates, which UTF-8 cannot carry."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if _SURROGATE.search(text) else text


class JsonTokenizer(_Foreign):
    """A tokenizer.json, run by the `tokenizers` package. `files` are by name (FILES), `directory` is for messages."""

    def __init__(self, files: Mapping[str, bytes], directory: str | Path = "."):
        import tokenizers

        settings, path = _Settings(files, Path(directory)), Path(directory) / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
            described = json.loads(files["tokenizer.json"])
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"tokenizer {path}: tokenizers {tokenizers.__version__} cannot read it: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        known = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
        for entry in settings.added.values():  # transformers adds these too
            if entry["content"] not in known:
                self._tokenizer.add_tokens([tokenizers.AddedToken(entry["content"], **{k: v for k, v in entry.items() if k in flags})])
        for name in settings.named():
            if name not in known or not known[name].special:
                self._tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])

        self._ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in sorted(added.items()) if token.special}
        if '"ByteFallback"' in json.dumps(described.get("decoder")):  # one wrong byte makes a whole run of byte tokens U+FFFD
            self.open_ended = frozenset([*(self._ids[b] for b in _BYTES if b in self._ids), *self.special.values()])
        self._read_roles(files, settings, {})
        self.add_bos = self.bos is not None and self._tokenizer.encode("").ids[:1] == [self.bos]  # the post-processor alone decides
        self._fingerprint = _fingerprint(files["tokenizer.json"], [(i, t.content, t.special) for i, t in sorted(added.items())])

    def fingerprint(self) -> str:
        """SHA-256 of what decides ids: tokenizer.json and the added tokens."""
        return self._fingerprint

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos or eos; special tokens in it are plain text."""
        return self._encode(text, special=False)

    def encode_chat(self, *parts: str) -> list[int]:
        """Token ids of a rendered chat: special tokens spelled in it are those tokens, but in every second part they are text."""
        ids: list[int] = []
        for number, part in enumerate(parts):
            special = number % 2 == 0
            # A later part is encoded after a line end, taken off again, so that no space is put before it as before a text.
            lead = self._encode("\n", special=False) if number else []
            new = self._encode("\n" + part, special=special) if number else self._encode(part, special=special)
            ids += new[len(lead) :] if new[: len(lead)] == lead else self._encode(part, special=special)
        return ids

    def _encode(self, text: str, *, special: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(_scalar(text), add_special_tokens=False).ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """A token's own spelling, special tokens included; empty for an id that no token has."""
        return self._tokenizer.id_to_token(token) or ""


class PieceTokenizer(_Foreign):
    """A sentencepiece model not of ours, with the added tokens of the files beside it. `directory` is for messages.

    As sentencepiece does, a space is put before each text (`add_dummy_prefix`) and taken off the decoded text; in a chat also
    before each stretch between added tokens, unless tokenizer_config.json holds `"legacy": false`.
    """

    def __init__(self, files: Mapping[str, bytes], directory: str | Path = "."):
        settings, path = _Settings(files, Path(directory)), Path(directory) / "tokenizer.model"
        added = {entry["content"]: (token, entry) for token, entry in settings.added.items()}
        special = {name for name, (_, entry) in added.items() if entry.get("special")} | set(settings.named())
        model = files["tokenizer.model"]
        try:
            plain = write_fields(_without_forgery(field, special) for field in read_fields(model))
            # A later field overrides an earlier one: the same model, but no space is put before a text.
            inner = plain + write_fields([Field(NORMALIZER, 2, write_fields([Field(3, 0, 0)]))])
            self._first, self._inner = (sentencepiece.SentencePieceProcessor(model_proto=m) for m in (plain, inner))
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"tokenizer {path}: not a sentencepiece model ({len(model)} bytes): {error}") from None
        sp = self._first
        self._legacy = settings.config.get("legacy") is not False
        self._prefixed = next((f.value for f in _normalizer(model) if f.number == 3), 1) == 1

        own = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
        self._added = {name: token for name, (token, _) in added.items()} | {n: own[n] for n in special if n in own}
        self._names = {token: name for name, token in self._added.items()}
        self._ids = own | self._added
        self.vocab_size = max(self._ids.values()) + 1
        unspelled = {piece: i for piece, i in own.items() if sp.is_control(i) or sp.is_unknown(i)}
        self.special = unspelled | {name: token for name, token in self._added.items() if name in special}
        self._taken = {name for name in self._added if name not in special and name not in own}  # found in any text
        self._patterns = [self._pattern(names, added) for names in (self._taken, self._taken | set(self.special))]
        roles = {"unk": sp.unk_id(), "bos": sp.bos_id(), "eos": sp.eos_id(), "pad": sp.pad_id()}
        self._read_roles(files, settings, {role: token for role, token in roles.items() if token >= 0})
        self.add_bos = self.bos is not None and settings.config.get("add_bos_token") is not False
        self._fingerprint = _fingerprint(model, sorted((t, n, n in self.special) for n, t in self._added.items()))

    @staticmethod
    def _pattern(names: Iterable[str], added: Mapping[str, tuple[int, dict]]) -> re.Pattern:
        """As `spellings`, with the white space that some added tokens swallow."""
        entries = {name: added[name][1] if name in added else {} for name in names}
        if not any(e.get("lstrip") or e.get("rstrip") for e in entries.values()):
            return spellings(entries)
        longest = sorted(entries.items(), key=lambda entry: -len(entry[0]))
        either = (r"\s*" * bool(e.get("lstrip")) + re.escape(name) + r"\s*" * bool(e.get("rstrip")) for name, e in longest)
        return re.compile("(" + "|".join(either) + ")")

    def fingerprint(self) -> str:
        """SHA-256 of what decides ids: the model and the added tokens."""
        return self._fingerprint

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos or eos; special tokens in it are plain text."""
        return self._encode(text, self._patterns[0], first=True)

    def encode_chat(self, *parts: str) -> list[int]:
        """Token ids of a rendered chat: special tokens spelled in it are those tokens, but in every second part they are text."""
        ids: list[int] = []
        for number, part in enumerate(parts):
            ids += self._encode(part, self._patterns[number % 2 == 0], first=number == 0)
        return ids

    def _encode(self, text: str, pattern: re.Pattern, *, first: bool) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(pattern.split(_scalar(text))):
            if number % 2:
                name = part if part in self._ids else part.strip()
                ids.append(self._ids[name])
            elif part:
                ids += (self._first if (number == 0 and first) or (number and self._legacy) else self._inner).encode(part)
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        text, held = "", []
        for token in ids:
            if token < self._inner.vocab_size() and self._names.get(token) is None:
                held.append(token)
            else:
                text += self._inner.decode(held) + self._names.get(token, "")
                held = []
        text += self._inner.decode(held)
        return text[1:] if self._prefixed and text.startswith(" ") else text

    def piece(self, token: int) -> str:
        """A token's own spelling, special tokens included; empty for an id that no token has."""
        return self._names.get(token) or (self._first.id_to_piece(token) if token < self._first.vocab_size() else "")


def _without_forgery(field: Field, special: set[str]) -> Field:
    """A piece that text is matched against, but is a special token, made a control symbol, which no text is encoded to."""
    if field.number == PIECE:
        piece = {f.number: f.value for f in read_fields(field.value)}
        if piece.get(3) == 4 and piece[1].decode() in special:
            return field._replace(value=write_fields([*read_fields(field.value), Field(3, 0, 3)]))
    return field


def _normalizer(model: bytes) -> Iterator[Field]:
    for field in read_fields(model):
        if field.number == NORMALIZER:
            yield from read_fields(field.value)


def _fingerprint(model: bytes, added: Sequence) -> str:
    return hashlib.sha256(model + json.dumps(added).encode()).hexdigest()


# Chats


def render_chat(tokenizer, messages: Sequence[Mapping], *, add_generation_prompt: bool = True, **variables) -> str:
    """`messages` (each a dict of role, content ...) spelled out by the tokenizer's chat template.

    `variables` reach the template as they are (`tools`, `enable_thinking` ...). The template, which may come from anywhere,
    runs in Jinja's sandbox. ValueError where there is none or it fails.
    """
    if tokenizer.chat_template is None:
        raise ValueError("chat template: this tokenizer has none; give one as chat_template.jinja beside its tokenizer_config.json")
    roles = {f"{role}_token": getattr(tokenizer, role) for role in ("bos", "eos", "unk", "pad")}
    given = {name: tokenizer.piece(token) for name, token in roles.items() if token is not None} | {"tools": None, "documents": None} | variables
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return _template(tokenizer.chat_template).render(messages=messages, add_generation_prompt=add_generation_prompt, **given)
    except Exception as error:  # a template can make any operation fail
        raise ValueError(f"chat template: {type(error).__name__}: {' '.join(str(error).split())}") from None


def encode_messages(tokenizer, messages: Sequence[Mapping], *, add_generation_prompt: bool = True, **variables) -> list[int]:
    """Token ids of the rendered chat, as transformers' `apply_chat_template` gives them, but for one thing.

    Special tokens that the template spells are those tokens; spelled inside a message they are text, so that nobody can
    forge a turn (transformers does so under `sanitize_control_tokens=True`). The noncharacters U+FDD0 and U+FDD1, which mark
    such places on the way, are dropped from messages.
    """
    pattern = spellings(tokenizer.control if isinstance(tokenizer, Tokenizer) else tokenizer.special)
    chat = render_chat(tokenizer, _mark(messages, pattern), add_generation_prompt=add_generation_prompt, **_mark(variables, pattern))
    parts = re.split(f"{_OPEN}({pattern.pattern[1:-1]}){_CLOSE}", chat)
    return tokenizer.encode_chat(*(part.replace(_OPEN, "").replace(_CLOSE, "") for part in parts))


_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Stand around special tokens spelled in messages. Unicode keeps these two for a program's inner use."""


def _mark(value, pattern: re.Pattern):
    if isinstance(value, str):
        return pattern.sub(f"{_OPEN}\\1{_CLOSE}", re.sub(f"[{_OPEN}{_CLOSE}]", "", value))
    if isinstance(value, Mapping):
        return {key: _mark(inner, pattern) for key, inner in value.items()}
    return [_mark(inner, pattern) for inner in value] if isinstance(value, (list, tuple)) else value


@lru_cache(maxsize=8)
def _template(text: str):
    """The compiled template, with the names and filters that transformers gives to chat templates."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant wrote; here only what stands inside counts."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    return sandbox.from_string(text)


# Out


def save_hf_tokenizer(tokenizer, directory: str | Path) -> None:
    """Write the files by which transformers, and `load_hf_tokenizer`, load this tokenizer; after the model's, where there is one.

    A foreign one is written back byte for byte. One of ours becomes tokenizer.json, tokenizer_config.json, generation_config.json
    (which tokens end a text) and its own tokenizer.model, by which it comes back lossless. As transformers loads it, it differs in
    three ways: it puts bos first, reads special tokens out of any text (`split_special_tokens=True` stops that), and cannot
    hold lone surrogates. ValueError where the model has what tokenizer.json cannot say.
    """
    model = Path(directory) / "config.json"
    kind = _object({model.name: model.read_bytes()}, model.name, Path(directory)).get("model_type") if model.is_file() else None
    files = tokenizer.files if isinstance(tokenizer, _Foreign) else _own_files(tokenizer, kind)
    for name, content in files.items():
        (Path(directory) / name).write_bytes(content)


def _own_files(tokenizer: Tokenizer, model_type: str | None) -> dict[str, bytes]:
    names = {f"{role}_token": tokenizer.piece(getattr(tokenizer, role)) for role in ("bos", "eos", "unk", "pad")}
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast", **names, add_bos_token=True, add_eos_token=False, clean_up_tokenization_spaces=False,
        model_max_length=int(1e30), chat_template=tokenizer.chat_template,
    )  # fmt: skip
    if model_type == "qwen2":
        # For this kind of model transformers 5 puts Qwen's own tokenizer in place of the class named, and rebuilds it out of the
        # vocabulary alone. By this key it takes tokenizer.json as it is; there is no code here that could be trusted or not.
        config["trust_remote_code"] = True
    generation = dict(bos_token_id=tokenizer.bos, eos_token_id=sorted(tokenizer.stop_ids), pad_token_id=tokenizer.pad)
    values = {"tokenizer.json": _described(tokenizer), "tokenizer_config.json": config, "generation_config.json": generation}
    return {name: _json(value) for name, value in values.items()} | {"tokenizer.model": tokenizer.model}


def _described(tokenizer: Tokenizer) -> dict:
    """A tokenizer of ours as the content of tokenizer.json: the same ids for all text but lone surrogates."""
    pieces = list(_pieces(tokenizer.model))
    if odd := sorted({kind for _, _, kind in pieces} - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}):
        raise ValueError(f"tokenizer.json: cannot hold sentencepiece pieces of type {odd} (user-defined 4, unused 5); train without them")
    kind = next((f.value for t in read_fields(tokenizer.model) if t.number == TRAINER for f in read_fields(t.value) if f.number == 3), 1)
    if kind not in (1, 2):
        raise ValueError(f"tokenizer.json: cannot hold a sentencepiece model of type {kind}; only unigram (1) and bpe (2)")
    first = {"SpecialToken": {"id": tokenizer.piece(tokenizer.bos), "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    bos = {"id": tokenizer.piece(tokenizer.bos), "ids": [tokenizer.bos], "tokens": [tokenizer.piece(tokenizer.bos)]}
    e = escape("\U000f5c00")[0]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            dict(id=i, content=name, special=True, normalized=False, single_word=False, lstrip=False, rstrip=False)
            for name, i in sorted(tokenizer.control.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": "Sequence", "normalizers": [_replace(e, e + e), _replace("\u2581", e + "_"), _replace(" ", "\u2581")]},
        "pre_tokenizer": _apart(pieces) if kind == 1 else None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [first, text], "pair": [first, text, second], "special_tokens": {bos["id"]: bos},
        },
        "decoder": {
            "type": "Sequence",
            # Unescaped in three steps: after the first, no doubled escape can be taken for the start of another.
            "decoders": [_replace("\u2581", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, _replace(e + e, e + "-"), _replace(e + "_", "\u2581"),
                         _replace(e + "-", e)],
        },
        "model": _unigram(pieces, tokenizer.unk) if kind == 1 else _bpe(pieces, tokenizer.piece(tokenizer.unk)),
    }  # fmt: skip


_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
"""Types of sentencepiece pieces."""


def _pieces(model: bytes) -> Iterator[tuple[str, float, int]]:
    """Spelling, score and type of each piece."""
    for field in read_fields(model):
        if field.number == PIECE:
            piece = {f.number: f.value for f in read_fields(field.value)}
            yield piece[1].decode(), struct.unpack("<f", piece[2])[0], piece.get(3, _NORMAL)


def _replace(pattern: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _unigram(pieces: Sequence[tuple[str, float, int]], unk: int) -> dict:
    # `tokenizers` finds every piece in text, those of bytes and control symbols too: at this score they lose to their characters. An
    # unknown character costs 10 more than the least score, which changes no choice, as it is in no piece.
    never = -10_000.0
    return {"type": "Unigram", "unk_id": unk, "byte_fallback": True, "vocab": [[p, s if kind == _NORMAL else never] for p, s, kind in pieces]}


def _apart(pieces: Sequence[tuple[str, float, int]]) -> dict | None:
    """Cuts text at characters of "<bos>" or "<0x0A>" that are unknown, as "<" may be, lest the whole win over them."""
    normal = {piece for piece, _, kind in pieces if kind == _NORMAL}
    unknown = sorted({c for piece, _, kind in pieces if kind != _NORMAL for c in piece if c not in normal})
    pattern = {"Regex": "|".join(map(re.escape, unknown))}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False} if unknown else None


def _bpe(pieces: Sequence[tuple[str, float, int]], unk: str) -> dict:
    normal = {piece: (-score, i) for i, (piece, score, kind) in enumerate(pieces) if kind == _NORMAL}
    merges = sorted(
        (rank, at, [piece[:at], piece[at:]])
        for piece, rank in normal.items() for at in range(1, len(piece)) if piece[:at] in normal and piece[at:] in normal
    )  # fmt: skip
    return {
        "type": "BPE", "unk_token": unk, "fuse_unk": True, "byte_fallback": True, "vocab": {p: i for i, (p, _, _) in enumerate(pieces)},
        "merges": [pair for _, _, pair in merges],
    }  # fmt: skip
