"""chat: talk with a model in the terminal.

nanotrain chat runs/quickstart
nanotrain chat models/llama-3.2-1b-instruct --system='Answer in one sentence.' --sampling.temperature=0.6
nanotrain chat models/qwen3-8b --run.draft=models/qwen3-0.6b

A line, or what is pasted at once, is a turn; /reset begins anew, /save [FILE] writes the conversation as JSON, /exit or the end of input
leaves. Ctrl-C ends a reply; where none is being written, it leaves. A model that was only pretrained writes on more than it answers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanotrain import config as configs
from nanotrain.files import replace_file
from nanotrain.hf_tokenizer import encode_messages
from nanotrain.model.generate import Generator
from nanotrain.model.sampling import SamplingConfig, check_sampling
from nanotrain.model.transformer import Transformer
from nanotrain.pretrained import ModelSource, load_pretrained, with_directory
from nanotrain.run import choose_device
from nanotrain.terminal import aside, write


@dataclass(frozen=True)
class Config:
    """Keys of `nanotrain chat`."""

    system: str = ""
    """What the model is told before the first turn; empty tells it nothing."""
    run: ModelSource = field(default_factory=ModelSource)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_tokens=1000))


class Chat:
    """A conversation with a model."""

    def __init__(self, model: Transformer, tokenizer, c: Config, draft: Transformer | None = None):
        if not tokenizer.chat_template:
            raise ValueError(f"--run.dir {c.run.dir}: its tokenizer has no chat template; write on from a prompt with nanotrain sample")
        self.model, self.tokenizer, self.c, self.draft = model, tokenizer, c, draft
        self.messages: list[dict[str, str]] = []
        """The whole conversation."""
        self.forgotten = 0
        """Messages after the system's that the model is not shown any more: with them, there would be no room for a reply."""
        self.reason = ""
        """Why the last reply ended (`Written.reason`); nothing where it was cut short from outside."""
        self.turns = 0
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the system message alone."""
        self.messages = [{"role": "system", "content": self.c.system}] if self.c.system else []
        self.forgotten = 0

    def step(self, text: str) -> Iterator[str]:
        """Say `text`; yields the reply as it comes. One that is cut short by closing the iterator stays as far as it went.

        ValueError, with the conversation as it was, where the text alone fills the model's context.
        """
        said = {"role": "user", "content": text}
        ids, self.forgotten = self._prompt([*self.messages, said])
        room = min(self.c.sampling.max_tokens, self.model.c.context - len(ids))
        settings = replace(self.c.sampling, max_tokens=room, seed=self.c.sampling.seed + self.turns)  # asked again, it answers otherwise
        self.turns += 1
        reply = {"role": "assistant", "content": ""}
        self.messages += [said, reply]
        self.reason = ""
        generator = Generator(self.model, settings, stop=self.tokenizer.stop_ids, tokenizer=self.tokenizer, draft=self.draft)
        for written in generator.run([ids]):
            reply["content"] += written.text
            self.reason = written.reason
            yield written.text

    def _prompt(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """Tokens of the messages that leave room for a reply, and how many of the oldest are forgotten for that."""
        context, first, forgotten = self.model.c.context, int(messages[0]["role"] == "system"), self.forgotten
        room = context - min(self.c.sampling.max_tokens, context // 2)
        while True:
            ids = encode_messages(self.tokenizer, messages[:first] + messages[first + forgotten :])
            if len(ids) <= room or first + forgotten + 1 == len(messages):
                break
            forgotten += 2
        if len(ids) >= context:
            raise ValueError(f"that is {len(ids)} tokens, the model reads {context}; say less at once")
        return ids, forgotten

    def save(self, path: Path) -> None:
        """Write the messages as JSON."""
        replace_file(path, json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n")


def converse(chat: Chat) -> None:
    """Turns from standard input until it ends."""
    with suppress(ImportError):
        import readline  # gives input() line editing and history

        if sys.stdin.isatty():
            readline.parse_and_bind("set enable-bracketed-paste on")  # lines pasted at once are one input
    sys.stdin.reconfigure(errors="replace")  # bytes that are no text must not end a conversation
    asks = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(asks).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, argument = line.partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            chat.reset()
            print("(a new conversation)")
        elif command == "/save":
            _save(chat, Path(argument.strip() or time.strftime("chat-%Y%m%d-%H%M%S.json")))
        elif command.startswith("/"):
            print(f"(no command {command}; there are /reset, /save [FILE] and /exit)")
        elif line:
            _reply(chat, line)


def _save(chat: Chat, path: Path) -> None:
    try:
        chat.save(path.expanduser())
        print(f"(saved to {path})")
    except (OSError, RuntimeError) as error:  # the second where there is no such home
        print(f"(not saved: {path}: {getattr(error, 'strerror', None) or error})")


def _reply(chat: Chat, line: str) -> None:
    pieces, forgotten = chat.step(line), chat.forgotten
    try:
        for piece in pieces:
            write(piece)
        print("\n(cut off here; see --sampling.max_tokens and the model's context)" if chat.reason == "length" else "")
    except KeyboardInterrupt:
        pieces.close()
        print()
    except ValueError as error:
        print(f"({error})")
    if chat.forgotten > forgotten == 0:
        print("(the model's context is full; from here on it forgets the oldest turns)")


def main(argv: list[str]) -> int:
    """Command line of the stage."""
    c, _ = configs.parse(Config, with_directory(argv), command="chat")
    check_sampling(c.sampling)
    device = choose_device(c.run.device)
    model, tokenizer = load_pretrained(c.run.dir, device=device, say=aside)
    draft = load_pretrained(c.run.draft, device=device, say=aside)[0] if c.run.draft else None
    chat = Chat(model, tokenizer, c, draft)
    aside(f"{c.run.dir}: {sum(p.numel() for p in model.parameters()):,} parameters on {device}; /reset, /save [FILE], /exit")
    converse(chat)
    return 0
