"""The tokenizer gives back every string, and text can never forge a special token."""

import re

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.tokenizer import SPECIAL_TOKENS, Field, StreamDecoder, Tokenizer, read_fields, train, write_fields


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request, corpus):
    return train((p.read_text() for p in sorted(corpus.iterdir())), vocab_size=500, kind=request.param)


NASTY = [
    "\t",
    "\r\n",
    "\n",
    "\0",
    " ",
    "  ",
    "\u2581",
    "\U000f5c00",
    "_",
    "\uf8ff",
    "\ud800",
    "\udfff",
    "ﬁ",
    "é",
    "e\u0301",
    "<0x0A>",
    "<bos>",
    "<pad>",
    "\x85",
    "\u2028",
    "\ufeff",
    "\u200b",
    "\u3000",
    "½",
    "\U0001f600",
    "\ufffd",
    "\u2047",
    "\u2585",
    "def",
    "    return",
]


@settings(max_examples=400, deadline=None)
@given(text=st.text(st.characters()) | st.lists(st.sampled_from(NASTY), max_size=12).map("".join))
def test_decode_of_encode_is_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.unk, tokenizer.bos, tokenizer.eos, *tokenizer.special.values()}
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.add(i) for i in ids) + decoder.add(tokenizer.eos, last=True) == text


def test_text_of_the_corpus_and_long_streams(tokenizer, corpus):
    for path in sorted(corpus.iterdir())[:8]:
        text = path.read_text()
        decoder = StreamDecoder(tokenizer)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and "".join(map(decoder.add, ids)) + decoder.add(tokenizer.eos, last=True) == text
        assert len(ids) < 0.85 * len(text)


def test_a_long_stream_without_line_ends_stays_cheap(tokenizer):
    text = "a\u2581b\U000f5c00_ \ud800\u4e16" * 100
    decoder, ids = StreamDecoder(tokenizer), tokenizer.encode(text)
    pieces, held = [], 0
    for token in ids:
        pieces.append(decoder.add(token))
        held = max(held, len(decoder.ids))
    assert "".join(pieces) + decoder.finish() == text and held < 80 < len(ids)


def test_scores_add_up_exactly_in_float32(tokenizer):
    scores = [tokenizer._processor.get_score(i) for i in range(tokenizer.vocab_size)]
    assert min(scores) < -4 and all(score * 16 == int(score * 16) for score in scores)


def test_ids_beyond_the_vocabulary_are_no_text(tokenizer):
    """A model may have more rows than its tokenizer has tokens, and draw one."""
    ids, beyond = tokenizer.encode("a \u4e16"), tokenizer.vocab_size
    decoder = StreamDecoder(tokenizer)
    assert tokenizer.decode([beyond, *ids, beyond + 5]) == "a \u4e16" and tokenizer.piece(beyond) == ""
    assert "".join(map(decoder.add, [*ids, beyond])) + decoder.finish() == "a \u4e16"


def test_protocol_buffers_fields(tokenizer):
    assert write_fields(read_fields(tokenizer.model)) == tokenizer.model
    fields = [Field(1, 0, 300), Field(2, 2, b"x" * 200), Field(3, 5, b"1234"), Field(700, 1, b"12345678")]
    assert list(read_fields(write_fields(fields))) == fields
    for damaged in (b"\x08", b"\x0b\0", b"\x08\xff"):
        with pytest.raises(ValueError, match="a damaged Protocol Buffers message"):
            list(read_fields(damaged))


def test_special_tokens_have_ids_of_their_own(tokenizer):
    ids = [tokenizer.unk, tokenizer.bos, tokenizer.eos, *tokenizer.special.values()]
    assert sorted(ids) == list(range(3 + len(SPECIAL_TOKENS))) and tokenizer.vocab_size == 500
    for needed in ("<pad>", "<|user|>", "<|assistant|>", "<|system|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<image>", "<video>"):
        assert tokenizer.piece(tokenizer.special[needed]) == needed
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("x"), tokenizer.eos]) == "x"


def test_training_twice_gives_the_same_model(corpus):
    texts = [p.read_text() for p in sorted(corpus.iterdir())]
    assert train(texts, vocab_size=400).fingerprint() == train(texts, vocab_size=400).fingerprint()


LOSSLESS = dict(
    byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True, bos_piece="<bos>", eos_piece="<eos>", control_symbols=list(SPECIAL_TOKENS),
)  # fmt: skip
"""What a model needs of a foreign trainer to be accepted."""


@pytest.mark.parametrize(
    "options,message",
    [
        (LOSSLESS, None),
        ({}, "has no special token <pad>"),
        (LOSSLESS | dict(bos_id=-1), "has no special token <bos>;"),
        (LOSSLESS | dict(control_symbols=list(SPECIAL_TOKENS[1:])), "has no special token <pad>;"),
        (LOSSLESS | dict(control_symbols=[], user_defined_symbols=list(SPECIAL_TOKENS)), "makes special tokens out of text: <pad>"),
        (LOSSLESS | dict(byte_fallback=False), "does not give back the text"),
        (LOSSLESS | dict(normalization_rule_name="nmt_nfkc"), "does not give back the text"),
        (LOSSLESS | dict(add_dummy_prefix=True), "does not give back the text"),
        (LOSSLESS | dict(remove_extra_whitespaces=True), "does not give back the text"),
    ],
)
def test_a_model_of_another_trainer_must_be_lossless_and_have_our_special_tokens(corpus, tmp_path, options, message):
    prefix = tmp_path / "foreign"
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus / "abc.py"), model_prefix=str(prefix), vocab_size=400, model_type="bpe", minloglevel=2, **options
    )
    if message is None:
        assert Tokenizer.load(f"{prefix}.model").vocab_size == 400
    else:
        with pytest.raises(ValueError, match=f"^tokenizer {prefix}.model: {re.escape(message)}.*use one that nanotrain prepare trained$"):
            Tokenizer.load(f"{prefix}.model")


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"--data.vocab_size 9999: .*fewer tokens or more text"):
        train(["abc"], vocab_size=9999)
    (tmp_path / "t.model").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="t.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path / "t.model")
    with pytest.raises(ValueError, match="missing.model: No such file"):
        Tokenizer.load(tmp_path / "missing.model")
