"""The README's first command, on a small corpus: what it ends with, and that it refuses before it replaces anything."""

import json
import re

import pytest

from nanotrain import quickstart as stage
from nanotrain.__main__ import main
from tests.conftest import TINY
from tests.stages.test_pretrain import events


def quickstart(corpus, tmp_path, *more):
    return main(["quickstart", f"--data.source={corpus}", f"--data.dir={tmp_path}/data", "--data.vocab_size=512", "--data.cores=1",
                 "--data.val_share=0.2", "--data.tokenizer_kind=bpe", f"--run.dir={tmp_path}/run", *TINY, *more])  # fmt: skip


def test_it_ends_with_a_table_a_sample_and_where_the_run_lies(corpus, tmp_path, capsys):
    assert quickstart(corpus, tmp_path, "--train.steps=4", "--train.sample_every=2", "--prompt=import ") == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "run/quickstart.json").read_text())
    table = record["bits_per_byte"]
    assert list(table) == ["this model", "zlib -9, each document", "xz -9, each document", "xz -9, all documents at once"]
    for name, value in table.items():
        assert f"  {name:34} {value:13.3f}\n" in out
    assert 1 < table["xz -9, all documents at once"] < table["zlib -9, each document"] < 4 < table["this model"] < 8
    assert f"The run lies in {tmp_path}/run." in out and "sample from 'import ':\n\nimport " in out
    page = (tmp_path / "run/report.html").read_text()
    samples = [event["text"] for event in events(tmp_path / "run", "sample")]
    assert f"browser:\n{tmp_path}/run/report.html\n" in out
    assert len(samples) == 2 and all(max(re.findall("[A-Za-z]+", text[4:]), key=len) in page for text in samples)
    assert record["python"] in out or record["facts"]["corpus_sha256"][:16] in out
    assert main(["sample", f"--run.dir={tmp_path}/run", "--prompt=class ", "--sampling.max_tokens=3", "--run.device=cpu"]) == 0

    before = (tmp_path / "data/index.json").stat().st_ino
    assert quickstart(corpus, tmp_path, "--train.steps=4") == 2  # the folder is taken: nothing is prepared anew
    error = capsys.readouterr().err
    assert f"--run.dir {tmp_path}/run: holds a run already" in error and f"--config {tmp_path}/run/config.toml --resume auto" in error
    assert (tmp_path / "data/index.json").stat().st_ino == before
    assert main(["pretrain", f"--config={tmp_path}/run/config.toml", "--train.steps=6", "--resume=auto"]) == 0  # as the message says


@pytest.mark.parametrize(
    "flag,message",
    [
        ("--model.preset=huge", "--model.preset huge"),
        ("--model.heads=3", "--model.kv_heads 2"),
        ("--optim.clip=-1", "--optim.clip -1"),
        ("--train.length=0", "--train.length 0"),
    ],
)
def test_mistakes_stop_it_before_anything_is_prepared(corpus, tmp_path, capsys, flag, message):
    more = (flag, "--model.kv_heads=2") if "heads" in flag else (flag,)
    assert quickstart(corpus, tmp_path, "--train.steps=4", *more) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("served,flags,dtype", [(True, [], "bfloat16"), (False, [], "float32"), (False, ["--train.dtype=bfloat16"], "bfloat16")])
def test_a_processor_without_bf16_trains_in_fp32_unless_told_otherwise(monkeypatch, served, flags, dtype):
    def resolve(config, given):
        raise ValueError(config.train.dtype)

    monkeypatch.setattr(stage, "_multiplies_bf16", lambda: served)
    monkeypatch.setattr(stage.pretrain, "resolve", resolve)
    with pytest.raises(ValueError, match=f"^{dtype}$"):
        stage.main(["--run.device=cpu", *flags])
