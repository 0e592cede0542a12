"""sample: write on from a prompt with a trained model, streaming to the terminal.

nanotrain sample --run.dir=runs/quickstart --prompt='def main():'
nanotrain sample --run.dir=runs/quickstart --prompt='import os' --sampling.temperature=0
nanotrain sample --run.dir=runs/quickstart --sampling.top_p=0.9 --sampling.max_tokens=500
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanotrain import checkpoint
from nanotrain import config as configs
from nanotrain.model.generate import SamplingConfig, check_sampling, generate
from nanotrain.model.transformer import ModelConfig, Transformer, build_model
from nanotrain.run import choose_device
from nanotrain.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class ModelSource:
    """Which model writes."""

    dir: str = "runs/quickstart"
    """Run folder; its newest checkpoint that verifies is used."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True)
class Config:
    """Keys of `nanotrain sample`."""

    prompt: str = ""
    """Text to write on from; `-` reads it from standard input."""
    stop: tuple[str, ...] = ("<eos>",)
    """Tokens, by their spelling, that end the text."""
    run: ModelSource = field(default_factory=ModelSource)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def load_run(directory: str, device: torch.device, say: Callable[[str], None]) -> tuple[Transformer, Tokenizer]:
    """The model (newest checkpoint that verifies) and tokenizer of a run folder. ValueError naming what is missing."""
    folder = Path(directory)
    path = checkpoint.latest(folder / "checkpoints", say)
    if path is None:
        raise ValueError(f"--run.dir {directory}: no checkpoint that verifies under {folder / 'checkpoints'}; train first with nanotrain quickstart")
    state = checkpoint.load_state(path)
    c = ModelConfig(**state["model"])
    model = build_model(c, seed=0, dtype=getattr(torch, state["dtype"]), device=device)
    checkpoint.load_tensors(path / "model.safetensors", dict(model.named_parameters()))
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    if tokenizer.fingerprint() != state["tokenizer_sha256"]:
        raise ValueError(
            f"{folder / 'tokenizer.model'}: fingerprint {tokenizer.fingerprint()[:12]}, the checkpoint has {state['tokenizer_sha256'][:12]}"
        )
    return model, tokenizer


def stream(model: Transformer, tokenizer: Tokenizer, prompt: str, c: SamplingConfig, *, stop: frozenset[int], write: Callable[[str], None]) -> int:
    """Write the prompt's continuation piece by piece; returns the number of tokens."""
    decoder, count = StreamDecoder(tokenizer), 0
    token = tokenizer.eos
    for token in generate(model, [tokenizer.bos, *tokenizer.encode(prompt)], c, stop=stop):
        count += 1
        write(decoder.add(token))
    write(decoder.add(tokenizer.eos, last=True))
    return count


def main(argv: list[str]) -> int:
    """Command line of the stage."""
    c, _ = configs.parse(Config, argv, command="sample")
    check_sampling(c.sampling)
    model, tokenizer = load_run(c.run.dir, choose_device(c.run.device), lambda line: print(line, file=sys.stderr))
    special = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    for piece in c.stop:
        if piece not in special:
            raise ValueError(f"--stop {piece}: no such token; special ones are <eos> {' '.join(tokenizer.special)}")
    prompt = sys.stdin.read() if c.prompt == "-" else c.prompt

    def write(text):
        sys.stdout.write(text)
        sys.stdout.flush()

    write(prompt)
    started = time.monotonic()
    count = stream(model, tokenizer, prompt, c.sampling, stop=frozenset(special[p] for p in c.stop), write=write)
    seconds = time.monotonic() - started
    print(f"\n[{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s]", file=sys.stderr)
    return 0
