"""Talking with a model: turns, what is kept of them, and the commands of the terminal."""

import json
import sysconfig
from pathlib import Path

import pytest

from nanotrain.hf_tokenizer import encode_messages
from nanotrain.model.generate import generate
from nanotrain.model.sampling import SamplingConfig
from nanotrain.stages.chat import Chat, Config
from nanotrain.tokenizer import train
from tests.conftest import TINY
from tests.model.test_transformer import build


@pytest.fixture(scope="module")
def tokenizer():
    return train([(Path(sysconfig.get_path("stdlib")) / "heapq.py").read_text()], vocab_size=400)


def chat(tokenizer, context=512, **options):
    c = Config(sampling=SamplingConfig(temperature=1.0, max_tokens=options.pop("max_tokens", 20)), **options)
    return Chat(build(vocab_size=tokenizer.vocab_size, context=context, heads=2), tokenizer, c)


def test_turns_add_up(tokenizer):
    talk = chat(tokenizer, system="Be brief.")
    pieces = list(talk.step("Hello"))
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    wanted = generate(
        talk.model, [encode_messages(tokenizer, talk.messages[:2])], talk.c.sampling, tokenizer=tokenizer, stop=tokenizer.stop_ids
    )[0].text  # fmt: skip
    assert len(pieces) > 1 and "".join(pieces) == talk.messages[2]["content"] == wanted
    list(talk.step("Hello"))
    assert len(talk.messages) == 5 and talk.messages[4]["content"] != talk.messages[2]["content"]  # another turn draws anew
    assert encode_messages(tokenizer, talk.messages[:4])[: len(encode_messages(tokenizer, talk.messages[:2]))] == encode_messages(
        tokenizer, talk.messages[:2]
    )
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_a_reply_cut_short_stays_as_far_as_it_went(tokenizer):
    talk = chat(tokenizer)
    pieces = talk.step("Hello")
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": shown}


def test_the_oldest_turns_make_room(tokenizer):
    talk = chat(tokenizer, context=128, system="Be brief.", max_tokens=30)
    for number in range(12):
        list(talk.step(f"This is the turn of number {number}."))
    assert talk.messages[0]["role"] == "system" and talk.messages[1]["role"] == "user" and len(talk.messages) < 12
    assert talk.messages[-2]["content"].endswith("11.") and len(encode_messages(tokenizer, talk.messages[:-1])) <= 98
    with pytest.raises(ValueError, match=r"that is \d+ tokens, the model reads 128; say less at once"):
        list(talk.step("word " * 200))
    list(talk.step("Short again."))


def test_a_tokenizer_without_template(tokenizer):
    tokenizer.chat_template, kept = None, tokenizer.chat_template
    try:
        with pytest.raises(ValueError, match="no chat template; write on from a prompt with nanotrain sample"):
            chat(tokenizer)
    finally:
        tokenizer.chat_template = kept


def test_the_command_line(data, tmp_path, nanotrain):
    run, saved = tmp_path / "run", tmp_path / "talk.json"
    done = nanotrain("pretrain", *TINY, f"--data.dir={data}", f"--run.dir={run}", "--train.steps=3")
    assert done.returncode == 0, done.stderr
    typed = f"Hello\n/save {saved}\n/nonsense\n/save {tmp_path}/no/where.json\n/reset\nAgain\n\n/exit\nnever read\n"
    done = nanotrain("chat", run, "--sampling.max_tokens=5", input=typed)
    assert done.returncode == 0 and "parameters on cpu" in done.stderr, done.stderr
    assert [m["role"] for m in json.loads(saved.read_text())] == ["user", "assistant"]
    for line in (f"(saved to {saved})", "(no command /nonsense; there are /reset, /save [FILE] and /exit)", "No such file", "(a new conversation)"):
        assert line in done.stdout
    assert "never" not in done.stdout
    drafted = nanotrain("sample", run, "--prompt=import os", "--sampling.max_tokens=7", "--sampling.temperature=0", f"--run.draft={run}")
    assert "[7 tokens in" in drafted.stderr and "100% of the draft's tokens accepted" in drafted.stderr
    both = nanotrain("sample", run, "--prompt=import os", "--count=2", "--sampling.max_tokens=7")
    one = nanotrain("sample", run, "--prompt=-", "--sampling.max_tokens=7", input="import os")
    assert both.stdout.count("import os") == 2 and one.stdout.startswith("import os") and both.stdout.startswith(one.stdout.rstrip("\n"))
    done = nanotrain("chat", tmp_path / "nothing")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nothing" in done.stderr
