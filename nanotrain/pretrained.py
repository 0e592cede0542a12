"""A trained model and its tokenizer from where they lie: a run folder of ours, or a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from nanotrain import checkpoint
from nanotrain.hf_tokenizer import load_hf_tokenizer
from nanotrain.model.build import empty_model
from nanotrain.model.hf import existing_directory, fill, load_hf, open_tensors
from nanotrain.model.transformer import ModelConfig, Transformer


@dataclass(frozen=True)
class ModelSource:
    """Which model writes."""

    dir: str = "runs/quickstart"
    """Run folder, whose newest checkpoint that verifies is used, or a Hugging Face directory; may stand first, without its flag."""
    draft: str = ""
    """A smaller model of the same tokenizer that writes ahead; the model checks, and the distribution stays its own."""
    device: str = "auto"
    """auto, cpu or cuda."""


def with_directory(argv: list[str]) -> list[str]:
    """The command line with a model's directory that stands first put behind its flag."""
    return [f"--run.dir={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("-") else argv


def load_pretrained(
    directory: str | Path, *, device: torch.device | str, dtype: torch.dtype | None = None, say: Callable[[str], None] = print
) -> tuple[Transformer, Any]:
    """The model, on `device` in `dtype` (None: as stored), and the tokenizer of a directory; `say` takes warnings.

    Of a run folder it is the newest checkpoint that verifies. ValueError naming what is missing, damaged or does not fit.
    """
    folder = existing_directory(directory)
    if is_hf_directory(folder):
        tokenizer = load_hf_tokenizer(folder)  # first, for it is read in no time
        model = load_hf(folder, dtype=dtype, device=device)
    elif (folder / "checkpoints").is_dir():
        model, tokenizer = _load_run(folder, device, dtype, say)
    else:
        raise ValueError(f"{directory}: neither a run folder (no checkpoints/) nor a Hugging Face directory (no config.json); train a model first")
    if tokenizer.vocab_size > model.c.vocab_size:
        say(f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.c.vocab_size}; the others it cannot read")
    return model, tokenizer


def is_hf_directory(folder: Path) -> bool:
    """Whether a directory is one of Hugging Face's, by its config.json."""
    return (folder / "config.json").is_file()


def _load_run(folder: Path, device, dtype, say) -> tuple[Transformer, Any]:
    path = checkpoint.latest(folder / "checkpoints", say)
    if path is None:
        raise ValueError(f"{folder / 'checkpoints'}: no checkpoint that verifies; train first with nanotrain pretrain or quickstart")
    state, known = checkpoint.load_state(path), {f.name for f in fields(ModelConfig)}
    if unknown := sorted(state["model"].keys() - known):
        raise ValueError(f"{path / 'state.json'}: model option {unknown[0]} is unknown; the checkpoint is of a newer nanotrain")
    c = ModelConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in state["model"].items()})
    tokenizer = load_hf_tokenizer(folder)
    if tokenizer.fingerprint() != state["tokenizer_sha256"]:
        raise ValueError(f"{folder}: the tokenizer's fingerprint is {tokenizer.fingerprint()[:12]}, {path.name} has {state['tokenizer_sha256'][:12]};"
                         " put the run's own tokenizer files back (one from Hugging Face may need pip install 'nanotrain[hf]')")  # fmt: skip
    model = empty_model(c.resolved(frozenset(known)), dtype=dtype or getattr(torch, state["dtype"]), device=device)
    tensors, parameters = open_tensors(path), dict(model.named_parameters())
    if wrong := sorted(tensors.keys() ^ parameters.keys()) or [n for n, p in parameters.items() if tensors[n].shape() != tuple(p.shape)]:
        raise ValueError(f"{path / 'model.safetensors'}: tensor {wrong[0]!r} is missing, unknown or of another shape than state.json makes it")
    fill(tensors, {name: [parameter] for name, parameter in parameters.items()})
    return model, tokenizer
