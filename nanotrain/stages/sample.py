"""sample: write on from a prompt with a trained model, streaming to the terminal.

nanotrain sample runs/quickstart --prompt='def main():'
nanotrain sample runs/quickstart --prompt='import os' --sampling.temperature=0 --stop='def '
nanotrain sample models/llama-3.2-1b --prompt='The sea' --sampling.min_p=0.05 --count=4
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from nanotrain import config as configs
from nanotrain.model.generate import Generator
from nanotrain.model.sampling import SamplingConfig, check_sampling
from nanotrain.model.transformer import Transformer
from nanotrain.pretrained import ModelSource, load_pretrained, with_directory
from nanotrain.run import choose_device


@dataclass(frozen=True)
class Config:
    """Keys of `nanotrain sample`."""

    prompt: str = ""
    """Text to write on from; `-` reads it from standard input."""
    stop: tuple[str, ...] = ()
    """Strings, or special tokens by their spelling, that end the text, besides the tokenizer's own end tokens."""
    count: int = 1
    """Texts to write, side by side [texts]."""
    run: ModelSource = field(default_factory=ModelSource)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def step(
    model: Transformer, tokenizer, prompt: str, c: Config, *, write: Callable[[int, str], None], draft: Transformer | None = None
) -> tuple[int, str]:  # fmt: skip
    """Write `count` texts after the prompt, each piece to `write(number, piece)` as it comes; returns tokens, and a remark on the draft."""
    ids = [tokenizer.bos] * (tokenizer.add_bos and tokenizer.bos is not None) + tokenizer.encode(prompt)
    special = {tokenizer.piece(i): i for i in tokenizer.special.values()}
    stop = tokenizer.stop_ids | {special[s] for s in c.stop if s in special}
    generator = Generator(model, c.sampling, draft=draft, tokenizer=tokenizer, stop=stop, stop_text=tuple(s for s in c.stop if s not in special))
    tokens = 0
    for written in generator.run([ids] * c.count):
        tokens += 1
        write(written.prompt, written.text)
    share = f", {generator.accepted / max(1, generator.proposed):.0%} of the draft's tokens accepted" if draft is not None else ""
    return tokens, share


def show(number: int, piece: str) -> None:
    """Print a piece of the only text."""
    print(piece, end="", flush=True)


def main(argv: list[str]) -> int:
    """Command line of the stage."""
    c, _ = configs.parse(Config, with_directory(argv), command="sample")
    check_sampling(c.sampling)
    if c.count < 1:
        raise ValueError(f"--count {c.count}: must be at least 1")
    device = choose_device(c.run.device)
    model, tokenizer = load_pretrained(c.run.dir, device=device, say=_aside)
    draft = load_pretrained(c.run.draft, device=device, say=_aside)[0] if c.run.draft else None
    prompt = sys.stdin.read() if c.prompt == "-" else c.prompt
    texts = [prompt] * c.count

    def write(number, text):
        texts[number] += text

    if c.count == 1:
        print(prompt, end="", flush=True)
    started = time.monotonic()
    count, remark = step(model, tokenizer, prompt, c, draft=draft, write=show if c.count == 1 else write)
    seconds = time.monotonic() - started
    if c.count > 1:
        print(f"\n{'-' * 40}\n".join(texts), end="")
    print()
    _aside(f"[{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s{remark}]")
    return 0


def _aside(line: str) -> None:
    print(line, file=sys.stderr)
