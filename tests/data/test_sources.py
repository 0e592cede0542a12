"""Reading text: every kind of file, the embedded default with its twins, and data that cannot be read."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanotrain.data import sources
from nanotrain.data.sources import Corrupt, python_documents, read_documents


def read(source, quota=100, field="text"):
    said = []
    documents = list(read_documents(str(source), field, Corrupt(quota, said.append)))
    return documents, said


def test_every_kind_of_file_and_way_to_name_it(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"one\r\n\0two")
    (tmp_path / "b.md").write_text("# two")
    (tmp_path / "sub/c.py").write_text("x = 3")
    (tmp_path / "d.jsonl").write_text('{"text": "four"}\n\n{"text": "five", "id": 1}')
    with gzip.open(tmp_path / "e.jsonl.gz", "wt") as file:
        file.write('{"text": "six"}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    documents, said = read(tmp_path)
    assert [d.text for d in documents] == ["one\r\n\0two", "# two", "four", "five", "six", "x = 3"] and not said
    assert [d.text for d in read(f"{tmp_path}/b.md,{tmp_path}/*.jsonl*")[0]] == ["# two", "four", "five", "six"]
    assert [d.text for d in read(f"{tmp_path}/**/*.py")[0]] == ["x = 3"]
    assert documents[3].name == f"{tmp_path}/d.jsonl:3"


def test_what_cannot_be_read_is_named_counted_and_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT", 1000)
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "good"}\n{"text": \n\xff\xfe{"text": 1}\n{"text": 5}\n[1]\n{"other": "x"}\n'
        + b'{"text": "'
        + b"x" * 5000
        + b'"}\n'
        + b'{"text": "end"}\n'
    )
    (tmp_path / "b.txt").write_bytes(b"fine\nbad \xff here\n")
    (tmp_path / "c.txt").write_bytes(b"x" * 1001)
    (tmp_path / "empty.txt").write_bytes(b"")
    packed = gzip.compress(json.dumps({"text": "packed"}).encode() + b"\n" + b'{"text": "cut"}\n' * 3000)
    (tmp_path / "d.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    documents, said = read(tmp_path)
    texts = [d.text for d in documents]
    assert texts[:2] == ["good", "end"] and set(texts[2:]) <= {"packed", "cut"}
    wheres = [line.split(": ")[0].removeprefix(f"skipped {tmp_path}/") for line in said]
    assert wheres[:8] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5", "a.jsonl:6", "a.jsonl:7", "b.txt:2", "c.txt:1"]
    assert wheres[8].startswith("d.jsonl.gz:") and len(wheres) == 9
    with pytest.raises(ValueError, match=r"a.jsonl:4: no text in field 'text' .*more than --data.max_corrupt 2"):
        read(tmp_path, quota=2)


def test_a_number_too_long_for_python_is_one_more_broken_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "n": ' + "1" * 5000 + '}\n{"text": "end"}\n')
    documents, said = read(tmp_path)
    assert [d.text for d in documents] == ["end"] and len(said) == 1
    assert said[0].startswith(f"skipped {tmp_path}/a.jsonl:1: broken JSON: Exceeds the limit")


def test_a_gz_file_that_is_none_and_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT", 1 << 20)
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b"0" * (64 << 20)))
    documents, said = read(tmp_path)
    assert not documents and len(said) == 2 and "a line longer than" in said[1]


def test_names_that_match_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--data.source .*nothing.*no such file"):
        read(tmp_path / "nothing*")
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(ValueError, match="x.bin: unknown kind of file"):
        read(tmp_path / "x.bin")


def test_the_standard_library_with_its_twins_together():
    documents = list(python_documents())
    names = {d.name: d for d in documents}
    assert sum(len(d.text.encode()) for d in documents) > 8_000_000
    assert not any("/test" in n or n.startswith("test/") or "site-packages" in n for n in names)
    assert any(n.startswith("topic/") for n in names)
    for first, second in (
        ("_pydecimal.py", "decimal.py"),
        ("_pyio.py", "io.py"),
        ("encodings/cp1250.py", "encodings/cp1252.py"),
        ("topic/if", "topic/while"),
    ):
        assert names[first].split_key == names[second].split_key
    assert names["ast.py"].split_key != names["csv.py"].split_key
    assert documents == list(python_documents())


def test_the_standard_library_is_found_where_nothing_else_was_imported():
    root = Path(__file__).resolve().parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from nanotrain.data.sources import python_documents; next(python_documents())"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
