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
from nanotrain.terminal import aside, write


@dataclass(frozen=True)
class Config:
    """Keys of `nanotrain sample`."""

    prompt: str = ""
    """Text to write on from; `-` reads it from standard input."""
    stop: tuple[str, ...] = ()
    """Strings, or special tokens by their spelling, that end the text, besides the tokenizer's own end tokens. Commas part them; one that holds
    a comma is given in a file (`--config`): stop = ["a, b"]."""
    count: int = 1
    """Texts to write, side by side [texts]."""
    run: ModelSource = field(default_factory=ModelSource)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def step(
    model: Transformer, tokenizer, prompt: str, c: Config, *, write: Callable[[int, str], None], draft: Transformer | None = None
) -> tuple[int, str]:  # fmt: skip
    """Write `count` texts after the prompt, each piece to `write(number, piece)` as it comes; returns tokens, and remarks on how it went."""
    ids = tokenizer.encode(prompt)
    if tokenizer.bos is not None and (tokenizer.add_bos or not ids):  # a text of no token begins somewhere, too
        ids = [tokenizer.bos, *ids]
    special = tokenizer.special
    stop = tokenizer.stop_ids | {special[s] for s in c.stop if s in special}
    generator = Generator(model, c.sampling, draft=draft, tokenizer=tokenizer, stop=stop, stop_text=tuple(s for s in c.stop if s not in special))
    lengths = [len(ids)] * c.count
    for written in generator.run([ids] * c.count):
        lengths[written.prompt] += 1
        write(written.prompt, written.text)
    remark = f", {generator.accepted / max(1, generator.proposed):.0%} of the draft's tokens accepted" if draft is not None else ""
    if model.c.positions == "rope" and max(lengths) > model.c.context:
        remark += f"; the text grew to {max(lengths)} tokens, beyond the model's context of {model.c.context}"
    return sum(lengths) - len(ids) * c.count, remark


def show(number: int, piece: str) -> None:
    """Print a piece of the only text."""
    write(piece)


def main(argv: list[str]) -> int:
    """Command line of the stage."""
    c, _ = configs.parse(Config, with_directory(argv), command="sample")
    check_sampling(c.sampling)
    if c.count < 1:
        raise ValueError(f"--count {c.count}: must be at least 1")
    device = choose_device(c.run.device)
    model, tokenizer = load_pretrained(c.run.dir, device=device, say=aside)
    draft = load_pretrained(c.run.draft, device=device, say=aside)[0] if c.run.draft else None
    prompt = sys.stdin.read() if c.prompt == "-" else c.prompt
    texts = [prompt] * c.count

    def keep(number, text):
        texts[number] += text

    if c.count == 1:
        write(prompt)
    started = time.monotonic()
    count, remark = step(model, tokenizer, prompt, c, draft=draft, write=show if c.count == 1 else keep)
    seconds = time.monotonic() - started
    if c.count > 1:
        write(f"\n{'-' * 40}\n".join(texts))
    print()
    aside(f"[{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s{remark}]")
    return 0
