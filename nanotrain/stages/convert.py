"""convert: make a Hugging Face directory of a run folder, or a run folder of a Hugging Face directory.

nanotrain convert --source=runs/quickstart --to=exports/quickstart
nanotrain convert --source=exports/quickstart --to=runs/imported
nanotrain convert --source=exports/quickstart --to=exports/half --format=hf --dtype=float16
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from nanotrain import checkpoint
from nanotrain import config as configs
from nanotrain.files import replace_file
from nanotrain.hf_tokenizer import save_hf_tokenizer
from nanotrain.model.families import hf_config
from nanotrain.model.hf import save_hf, whole_directory
from nanotrain.model.transformer import Transformer
from nanotrain.pretrained import is_hf_directory, load_pretrained
from nanotrain.session import Progress


@dataclass(frozen=True)
class Config:
    """Keys of `nanotrain convert`."""

    source: str = "runs/quickstart"
    """Run folder (its newest checkpoint that verifies), or Hugging Face directory: config.json, .safetensors and tokenizer."""
    to: str = ""
    """Directory to write; it must be new or empty, and is whole or not there."""
    format: Literal["auto", "hf", "run"] = "auto"
    """hf (what transformers loads), run (what our stages load), or auto: the one that the source is not."""
    dtype: Literal["stored", "float64", "float32", "bfloat16", "float16"] = "stored"
    """Of the weights; stored keeps what they are."""
    shard_bytes: int = 5_000_000_000
    """Tensors of a file of a Hugging Face directory, at most [bytes]."""


def write_run(model: Transformer, tokenizer, folder: Path, c: Config) -> None:
    """A run folder at step 0: the model without an optimizer, the tokenizer, and this stage's config.toml."""
    dtype = str(model.head.weight.dtype).removeprefix("torch.")
    facts = dict(model=asdict(model.c), dtype=dtype, seed=0, length=model.c.context, tokenizer_sha256=tokenizer.fingerprint(), data_sha256="")
    tensors = {"model": {name: parameter.detach() for name, parameter in model.named_parameters()}}
    checkpoint.save(folder / "checkpoints", 0, tensors, facts | asdict(Progress()) | {"converted_from": c.source})
    save_hf_tokenizer(tokenizer, folder)
    replace_file(folder / "config.toml", configs.write_toml(c))


def write_hf(model: Transformer, tokenizer, folder: Path, c: Config) -> None:
    """A Hugging Face directory with its tokenizer."""
    save_hf(model, folder, tokenizer=tokenizer, max_shard_bytes=c.shard_bytes)
    save_hf_tokenizer(tokenizer, folder)


def main(argv: list[str]) -> int:
    """Command line of the stage."""
    c, _ = configs.parse(Config, argv, command="convert")
    if not c.to:
        raise ValueError("--to: name the directory to write")
    if c.shard_bytes < 1:
        raise ValueError(f"--shard_bytes {c.shard_bytes}: must be at least 1")
    kind = c.format if c.format != "auto" else "run" if is_hf_directory(Path(c.source)) else "hf"
    with whole_directory(c.to) as folder:
        model, tokenizer = load_pretrained(c.source, device="cpu", dtype=None if c.dtype == "stored" else getattr(torch, c.dtype))
        (write_run if kind == "run" else write_hf)(model, tokenizer, folder, c)
    files = sorted(path for path in Path(c.to).rglob("*") if path.is_file())
    parameters, dtype = sum(p.numel() for p in model.parameters()), str(model.head.weight.dtype).removeprefix("torch.")
    made = "a run folder" if kind == "run" else f"a Hugging Face directory of the family {hf_config(model.c)['model_type']}"
    print(f"convert: {c.source} -> {c.to}, {made}")
    print(f"convert: {parameters:,} parameters in {dtype}, {sum(f.stat().st_size for f in files):,} bytes in {len(files)} files")
    for file in files:
        print(f"  {file.stat().st_size:>15,}  {file.relative_to(c.to)}")
    return 0
