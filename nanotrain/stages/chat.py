"""chat: talk with a model in the terminal.

nanotrain chat runs/quickstart
nanotrain chat models/llama-3.2-1b-instruct --system='Answer in one sentence.' --sampling.temperature=0.6
nanotrain chat models/qwen3-8b --run.draft=models/qwen3-0.6b

A line is a turn; /reset begins anew, /save [FILE] writes the conversation as JSON, /exit or the end of input leaves.
Ctrl-C ends a reply.
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
from nanotrain.hf_tokenizer import encode_messages
from nanotrain.model.generate import Generator
from nanotrain.model.sampling import SamplingConfig, check_sampling
from nanotrain.model.transformer import Transformer
from nanotrain.pretrained import ModelSource, load_pretrained, with_directory
from nanotrain.run import choose_device, replace_file


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
        self.turns = 0
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the system message alone."""
        self.messages = [{"role": "system", "content": self.c.system}] if self.c.system else []

    def step(self, text: str) -> Iterator[str]:
        """Say `text`; yields the reply as it comes. One that is cut short by closing the iterator stays as far as it went."""
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self.prompt()
        except ValueError:
            self.messages.pop()
            raise
        settings = replace(self.c.sampling, seed=self.c.sampling.seed + self.turns)  # the same question again gets another answer
        self.turns += 1
        reply = {"role": "assistant", "content": ""}
        self.messages.append(reply)
        generator = Generator(self.model, settings, stop=self.tokenizer.stop_ids, tokenizer=self.tokenizer, draft=self.draft)
        for written in generator.run([ids]):
            reply["content"] += written.text
            yield written.text

    def prompt(self) -> list[int]:
        """The conversation's tokens; the oldest turns are dropped for good where they would leave no room for a reply."""
        room = self.model.c.context - min(self.c.sampling.max_tokens, self.model.c.context // 2)
        while True:
            ids = encode_messages(self.tokenizer, self.messages)
            first = 1 if self.messages[0]["role"] == "system" else 0
            if len(ids) <= room or len(self.messages) - first <= 1:
                break
            del self.messages[first : first + 2]
        if len(ids) >= self.model.c.context:
            raise ValueError(f"that is {len(ids)} tokens, the model reads {self.model.c.context}; say less at once")
        return ids

    def save(self, path: Path) -> None:
        """Write the messages as JSON."""
        replace_file(path, json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n")


def converse(chat: Chat) -> None:
    """Turns from standard input until it ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history)
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
        chat.save(path)
        print(f"(saved to {path})")
    except OSError as error:
        print(f"(not saved: {path}: {error.strerror})")


def _reply(chat: Chat, line: str) -> None:
    pieces = chat.step(line)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
    except ValueError as error:
        print(f"({error})", end="")
    print()


def main(argv: list[str]) -> int:
    """Command line of the stage."""
    c, _ = configs.parse(Config, with_directory(argv), command="chat")
    check_sampling(c.sampling)
    device = choose_device(c.run.device)
    model, tokenizer = load_pretrained(c.run.dir, device=device, say=_aside)
    draft = load_pretrained(c.run.draft, device=device, say=_aside)[0] if c.run.draft else None
    chat = Chat(model, tokenizer, c, draft)
    _aside(f"{c.run.dir}: {sum(p.numel() for p in model.parameters()):,} parameters on {device}; /reset, /save [FILE], /exit")
    converse(chat)
    return 0


def _aside(line: str) -> None:
    print(line, file=sys.stderr)
