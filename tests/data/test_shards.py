"""Shards and loader: what was written is what is read, rows are a pure function of seed and number, damage is named."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.__main__ import main
from nanotrain.data.loader import Loader, permuted
from nanotrain.data.shards import ShardWriter, TokenShards, write_index
from nanotrain.tokenizer import Tokenizer

CPU = torch.device("cpu")


def write(directory, documents, vocab_size=100, dtype=np.uint16, shard_tokens=1 << 28):
    directory.mkdir(exist_ok=True)
    writer = ShardWriter(directory, "train", dtype, shard_tokens)
    for ids in documents:
        writer.add(np.array(ids), 3 * len(ids))
    write_index(directory, dtype=dtype, vocab_size=vocab_size, tokenizer_sha256="t", splits={"train": writer.close()}, facts={})
    return TokenShards(directory, "train")


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_documents_come_back_across_shards(tmp_path, dtype):
    documents = [list(range(n, n + 5 + n)) for n in range(9)]
    shards = write(tmp_path / "d", documents, dtype=dtype, shard_tokens=20)
    assert len(shards.shards) > 3
    assert [shards.document(n).tolist() for n in range(9)] == documents
    assert shards.read(0, shards.tokens).tolist() == sum(documents, [])
    assert shards.document_bytes.tolist() == [3 * len(d) for d in documents]


def test_prepared_text_decodes_to_itself_and_splits_do_not_mix(data, corpus):
    tokenizer = Tokenizer.load(data / "tokenizer.model")
    texts = {}
    for split in ("train", "val"):
        shards = TokenShards(data, split)
        for n in range(len(shards.document_starts)):
            ids = shards.document(n)
            assert ids[0] == tokenizer.bos and ids[-1] == tokenizer.eos
            text = tokenizer.decode(ids)
            assert len(text.encode()) == shards.document_bytes[n]
            texts[text] = split
    assert sorted(texts) == sorted(p.read_text() for p in corpus.iterdir())
    assert set(texts.values()) == {"train", "val"}


def test_preparing_twice_and_on_more_cores_gives_the_same_bits(data, corpus, tmp_path):
    assert (
        main(
            ["prepare", f"--data.source={corpus}", f"--data.dir={tmp_path}/again", "--data.vocab_size=512", "--data.cores=2", "--data.val_share=0.2"]
        )
        == 0
    )
    first, second = (json.loads((d / "index.json").read_text()) for d in (data, tmp_path / "again"))
    assert first == second
    assert (
        main(
            ["prepare", f"--data.source={corpus}", f"--data.dir={tmp_path}/again", f"--data.tokenizer={data}/tokenizer.model", "--data.val_share=0.2"]
        )
        == 0
    )
    assert json.loads((tmp_path / "again/index.json").read_text())["data_sha256"] == first["data_sha256"]
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 10**6), epoch=st.integers(0, 5))
def test_permutation_visits_everything_once(size, seed, epoch):
    image = permuted(np.arange(size), size, seed, epoch)
    assert sorted(image.tolist()) == list(range(size))
    some = np.arange(size)[:: max(1, size // 7)]
    assert np.array_equal(permuted(some, size, seed, epoch), image[some])


def test_permutations_of_seeds_and_epochs_differ():
    base = permuted(np.arange(500), 500, 0, 0)
    for other in (permuted(np.arange(500), 500, 1, 0), permuted(np.arange(500), 500, 0, 1), np.arange(500)):
        assert (base == other).mean() < 0.05


def test_an_epoch_shows_each_row_once_with_labels_inside_documents(tmp_path):
    documents = [[1, *range(10 + 10 * n, 17 + 10 * n - n % 3), 2] for n in range(9)]
    shards = write(tmp_path / "d", documents, shard_tokens=30)
    stream = np.array(sum(documents, []))
    document_of = np.repeat(np.arange(9), [len(d) for d in documents])
    offset_of = np.concatenate([np.arange(len(d)) for d in documents])
    loader = Loader(shards, length=8, seed=3, device=CPU)
    seen = []
    for cursor in range(0, loader.rows - 1, 2):
        batch = loader.batch(cursor, 2)
        assert batch.tokens_BT.shape == (1, 16) and batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == 16
        for row in range(2):
            part = slice(8 * row, 8 * row + 8)
            tokens, labels = batch.tokens_BT[0, part].numpy(), batch.labels_BT[0, part].numpy()
            place = next(p for p in range(loader.rows) if np.array_equal(stream[8 * p : 8 * p + 8], tokens))
            seen.append(place)
            at = np.arange(8 * place, 8 * place + 8)
            assert np.array_equal(labels, np.where(document_of[at] == document_of[at + 1], stream[at + 1], -100))
            first = np.maximum(0, 8 * place - (at - offset_of[at]))
            assert np.array_equal(batch.positions_BT[0, part].numpy(), offset_of[at] - first)
            assert batch.counters_BT[0, part].tolist() == list(range(8 * (cursor + row), 8 * (cursor + row) + 8))
            starts = [int(s) - 8 * row for s in batch.cu_seqlens if 8 * row <= s < 8 * row + 8]
            assert starts == [0, *(i for i in range(1, 8) if document_of[at[i]] != document_of[at[i - 1]])]
        counted = (batch.labels_BT[0] != -100).nonzero()[:, 0].tolist()
        assert batch.counted == len(counted) and (batch.rows.tolist() == counted if len(counted) < 0.9 * 16 else batch.rows is None)
        assert batch.positions_BT.max() < batch.max_position == 8
    assert len(set(seen)) == len(seen)


def test_rows_do_not_depend_on_how_they_are_asked_for(data):
    loader = Loader(TokenShards(data, "train"), length=16, seed=0, device=CPU)
    start = loader.rows - 3  # across the end of an epoch
    whole = loader.batch(start, 6).tokens_BT.view(6, 16)
    parts = torch.cat([loader.batch(start + i, 1).tokens_BT for i in range(6)])
    assert torch.equal(whole, parts)


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        raw = raw[:-2]
    elif how == "flipped":
        raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "file,how,message",
    [
        ("train-00000.bin", "truncated", r"train-00000.bin: \d+ bytes, the index says \d+ \(truncated\?\)"),
        ("train-00000.bin", "flipped", "train-00000.bin: its SHA-256 is not the index's"),
        ("train-00000.npy", "flipped", "train-00000.npy: its SHA-256 is not the index's"),
    ],
)
def test_damage_is_named(data, tmp_path, file, how, message):
    shutil.copytree(data, tmp_path / "d")
    damage(tmp_path / "d" / file, how)
    with pytest.raises(ValueError, match=message):
        TokenShards(tmp_path / "d", "train")


def test_a_missing_index_shard_or_split_is_named(data, tmp_path):
    with pytest.raises(ValueError, match=r"index.json: missing; run nanotrain prepare"):
        TokenShards(tmp_path, "train")
    shutil.copytree(data, tmp_path / "d")
    with pytest.raises(ValueError, match="no tokens in split 'test'"):
        TokenShards(tmp_path / "d", "test")
    (tmp_path / "d/train-00000.bin").unlink()
    with pytest.raises(ValueError, match="train-00000.bin: missing"):
        TokenShards(tmp_path / "d", "train")
    (tmp_path / "d/index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json: cannot be read"):
        TokenShards(tmp_path / "d", "train")
    with pytest.raises(ValueError, match="--train.length 500000"):
        Loader(TokenShards(data, "train"), length=500000, seed=0, device=CPU)


def test_an_id_outside_the_vocabulary_is_named_with_shard_and_offset(tmp_path):
    shards = write(tmp_path / "d", [[1] * 30, [1, 2, 77, 3]], vocab_size=50, shard_tokens=30)
    with pytest.raises(ValueError, match="train-00001.bin, token 2: id 77 outside the vocabulary of 50"):
        shards.read(28, 34)


def test_the_id_that_is_named_is_the_one_at_the_place_that_is_named(tmp_path):
    shards = write(tmp_path / "d", [[1, 60, 99, 2]], vocab_size=50)
    with pytest.raises(ValueError, match="train-00000.bin, token 1: id 60 outside"):
        shards.read(0, 4)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda index: [], "no 'format' of type int"),
        (lambda index: {"format": 1}, "no 'dtype' of type str"),
        (lambda index: index | {"format": 99}, "format 99, this version reads 1"),
        (lambda index: index | {"dtype": "float99"}, "dtype 'float99', not uint16 or uint32"),
        (lambda index: index | {"vocab_size": "512"}, "no 'vocab_size' of type int"),
        (lambda index: index | {"splits": [1]}, "no 'splits' of type dict"),
        (lambda index: index | {"splits": {"train": {}}}, "no 'train' of type list"),
        (lambda index: index | {"splits": {"train": ["x"]}}, "no 'name' of type str"),
        (lambda index: index | {"splits": {"train": [index["splits"]["train"][0] | {"tokens": 1.5}]}}, "no 'tokens' of type int"),
    ],
)
def test_a_damaged_index_is_one_line_with_its_name(tmp_path, change, message):
    write(tmp_path / "d", [[1, 2, 3]])
    path = tmp_path / "d/index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=f"^{path}: .*{message}.*; run nanotrain prepare again$"):
        TokenShards(tmp_path / "d", "train")


def test_mistakes_of_prepare_leave_nothing_behind(corpus, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/keep.me").write_text("x")
    (tmp_path / "one.txt").write_text("only one document " * 500)
    for flags, message in (
        ([f"--data.source={corpus}", f"--data.dir={tmp_path}/full"], "not empty and no data directory"),
        ([f"--data.source={corpus}", f"--data.dir={tmp_path}/d", "--data.vocab_size=100"], "--data.vocab_size 100"),
        ([f"--data.source={corpus}", f"--data.dir={tmp_path}/d", "--data.val_share=0"], "--data.val_share 0"),
        ([f"--data.source={corpus}", f"--data.dir={tmp_path}/d", "--data.vocab_size=500000"], "--data.vocab_size 500000"),
        ([f"--data.source={tmp_path}/one.txt", f"--data.dir={tmp_path}/d", f"--data.tokenizer={tmp_path}/one.txt"], "not a sentencepiece model"),
    ):
        assert main(["prepare", *flags]) == 2
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "one.txt"]
