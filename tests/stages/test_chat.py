"""Talking with a model: turns, what is kept of them, and the commands of the terminal."""

import io
import json
import os
import select
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from nanotrain.__main__ import main
from nanotrain.hf_tokenizer import encode_messages
from nanotrain.model.generate import generate
from nanotrain.model.sampling import SamplingConfig
from nanotrain.stages import convert
from nanotrain.stages.chat import Chat, Config
from nanotrain.terminal import printable
from nanotrain.tokenizer import train
from tests.model.test_transformer import build


@pytest.fixture(scope="module")
def tokenizer():
    return train([(Path(sysconfig.get_path("stdlib")) / "heapq.py").read_text()], vocab_size=400)


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """A run folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    convert.write_run(build(vocab_size=tokenizer.vocab_size, context=64).float(), tokenizer, folder, convert.Config())
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Call the command line: command(*arguments, input=bytes) -> exit status, what it printed, its remarks."""

    def call(*arguments, input=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input), encoding="utf-8"))
        return (main([*map(str, arguments)]), *capsys.readouterr())

    return call


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
    assert len(talk.messages) == 25 and 0 < talk.forgotten < 24  # the whole conversation can still be saved
    shown = [talk.messages[0], *talk.messages[1 + talk.forgotten : -1]]
    assert shown[1]["role"] == "user" and len(encode_messages(tokenizer, shown)) <= 98
    assert len(encode_messages(tokenizer, [talk.messages[0], *talk.messages[talk.forgotten - 1 : -1]])) > 98  # no more is forgotten than must be
    before = list(talk.messages), talk.forgotten
    with pytest.raises(ValueError, match=r"that is \d+ tokens, the model reads 128; say less at once"):
        list(talk.step("word " * 200))
    assert (talk.messages, talk.forgotten) == before
    list(talk.step("Short again."))
    talk.reset()
    assert talk.forgotten == 0


@pytest.mark.parametrize("max_tokens", [20, 500])
def test_a_reply_ends_where_the_context_does(tokenizer, max_tokens):
    talk = chat(tokenizer, context=64, max_tokens=max_tokens)
    with torch.no_grad():  # nothing ends a text but its length
        talk.model.head.weight[list(tokenizer.stop_ids)] = 0
    prompt, pieces = encode_messages(tokenizer, [{"role": "user", "content": "Hello"}]), list(talk.step("Hello"))
    assert len(pieces) == min(max_tokens, 64 - len(prompt)) and talk.reason == "length"


def test_a_tokenizer_without_template(tokenizer):
    tokenizer.chat_template, kept = None, tokenizer.chat_template
    try:
        with pytest.raises(ValueError, match="no chat template; write on from a prompt with nanotrain sample"):
            chat(tokenizer)
    finally:
        tokenizer.chat_template = kept


def test_the_command_line(run, tmp_path, command):
    saved = tmp_path / "talk.json"
    typed = f"Hello \ufb01\n/save {saved}\n/nonsense\n/save {tmp_path}/no/where.json\n/reset\nAgain\n\n/exit\nnever read\n"
    status, out, remarks = command("chat", run, "--sampling.max_tokens=5", input=typed.encode() + b"\xff\n")
    assert status == 0 and "parameters on cpu" in remarks
    assert [m["role"] for m in json.loads(saved.read_text())] == ["user", "assistant"] and "Hello \ufb01" in saved.read_text()
    for line in (f"(saved to {saved})", "(no command /nonsense; there are /reset, /save [FILE] and /exit)", "No such file", "(a new conversation)",
                 "(cut off here; see --sampling.max_tokens"):  # fmt: skip
        assert line in out
    assert "never" not in out
    assert command("chat", tmp_path / "nothing")[0] == 2


def test_a_conversation_saved_without_a_name_and_ended_by_the_end_of_input(run, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    typed = b"one \xff\n/save\n/save ~/here.json\n" + b"a long turn that fills the context\n" * 3
    status, out, _ = command("chat", run, "--sampling.max_tokens=5", input=typed)
    assert status == 0 and out.count("it forgets the oldest turns") == 1
    (named,) = tmp_path.glob("chat-*.json")
    assert named.read_text() == (tmp_path / "here.json").read_text() and json.loads(named.read_text())[0]["content"] == "one \ufffd"


def test_sample(run, tokenizer, tmp_path, command):
    seven = ("--sampling.max_tokens=7", "--sampling.repetition_penalty=1.1")
    _, text, remarks = command("sample", run, "--prompt=import os", *seven, "--sampling.temperature=0", f"--run.draft={run}")
    assert "[7 tokens in" in remarks and "100% of the draft's tokens accepted" in remarks and "beyond" not in remarks
    both = command("sample", run, "--prompt=import os", "--count=2", *seven)[1]
    one = command("sample", run, "--prompt=-", *seven, input=b"import os")[1]
    assert both.count("import os") == 2 and one.startswith("import os") and both.startswith(one.rstrip("\n"))
    assert "grew to 69 tokens, beyond the model's context of 64" in command("sample", run, "--sampling.max_tokens=68", "--sampling.top_k=1")[2]
    # A stop string with a comma in it comes from a file.
    end = text[len("import os") :][1:3]
    (tmp_path / "stop.toml").write_text(f"stop = {json.dumps(['a, b', end])}")
    stopped = command("sample", run, "--prompt=import os", *seven, "--sampling.temperature=0", f"--config={tmp_path / 'stop.toml'}")[1]
    assert stopped == "import os" + text[len("import os") :].partition(end)[0] + "\n"


def test_control_characters_are_shown_and_not_obeyed():
    shown = printable("a\tb\r\n\x1b]0;title\x07 \x9b2J\x7f\x00 \u00e9\u4e16")
    assert shown == "a\tb\n" + r"\x1b]0;title\x07 \x9b2J\x7f\x00" + " \u00e9\u4e16"


TALKER = """
import fcntl, signal, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background would hand down that it is ignored
from nanotrain.stages.chat import converse
class Talker:
    forgotten, reason = 0, ''
    def step(self, text):
        yield ascii(text)
        yield ' \\x1b]0;mine\\x07 '
        if text == 'wait':
            time.sleep(60)
        yield 'end'
converse(Talker())
"""


class Terminal:
    """A pseudo-terminal that a Python program runs in."""

    def __init__(self, code: str):
        self.ours, theirs = os.openpty()
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        plain = {"LC_ALL": "C.UTF-8", "INPUTRC": os.devnull, "PYTHONUNBUFFERED": ""}
        self.child = subprocess.Popen([sys.executable, "-c", code], **streams, start_new_session=True, env=os.environ | plain)
        os.close(theirs)
        self.read = b""

    def until(self, wanted: bytes) -> bytes:
        """What it prints, up to `wanted`."""
        end = time.monotonic() + 60
        while wanted not in self.read:
            assert select.select([self.ours], [], [], end - time.monotonic())[0], (wanted, self.read)
            self.read += os.read(self.ours, 4096)
        found, _, self.read = self.read.partition(wanted)
        return found

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)


def test_in_a_terminal():
    """Pieces are shown as they come, Ctrl-C ends a reply, what is pasted is one turn, bytes that are no text do no harm, Ctrl-C leaves."""
    readline = pytest.importorskip("readline")
    terminal = Terminal(TALKER)
    terminal.until(b"> ")
    terminal.type(b"wait\r")
    terminal.until(rb"'wait' \x1b]0;mine\x07 ")  # before the reply ends, and spelled out
    terminal.type(b"\x03")
    assert b"end" not in terminal.until(b"> ")
    terminal.type("caf\u00e9 ".encode() + b"\xff\r")
    terminal.until(rb"'caf\xe9 \ufffd'")
    terminal.until(b"end\r\n")
    terminal.until(b"> ")
    if "libedit" not in (readline.__doc__ or ""):
        terminal.type(b"\x1b[200~one\ntwo\x1b[201~\r")
        terminal.until(rb"'one\ntwo'")
        terminal.until(b"> ")
    for _ in range(60):  # Python misses one that comes between its prompt and its waiting for a key
        terminal.type(b"\x03")
        with suppress(subprocess.TimeoutExpired):
            terminal.child.wait(1)
            break
    assert terminal.child.returncode == 0
    os.close(terminal.ours)
