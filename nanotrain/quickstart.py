"""quickstart: prepare, pretrain, sample and report on this machine's own Python, with nothing to download.

nanotrain quickstart
nanotrain quickstart --train.seconds=60 --run.dir=runs/short
nanotrain quickstart --data.source='notes/**/*.md' --data.dir=data/notes --data.vocab_size=2048

Without a budget (--train.steps, --train.tokens or --train.seconds) it trains for 300 seconds on a CPU, 30 on a GPU.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from nanotrain import checkpoint
from nanotrain import config as configs
from nanotrain.__main__ import main as command_line
from nanotrain.checkpoint import CheckpointConfig
from nanotrain.data.shards import TokenShards
from nanotrain.environment import processor_name
from nanotrain.eval.bits_per_byte import compressed_bits_per_byte
from nanotrain.model.sampling import SamplingConfig
from nanotrain.model.transformer import ModelConfig
from nanotrain.optim import OptimConfig
from nanotrain.pretrained import load_pretrained
from nanotrain.run import RunConfig, choose_device
from nanotrain.stages import prepare, pretrain, sample
from nanotrain.stages.prepare import SourceConfig
from nanotrain.stages.pretrain import DataConfig, ParallelConfig, TrainConfig
from nanotrain.tokenizer import Tokenizer
from nanotrain.trackers import LogConfig


@dataclass(frozen=True)
class Config:
    """Keys of `nanotrain quickstart`: those of prepare and pretrain."""

    prompt: str = "def read_lines(path):\n    "
    """What the sample at the end writes on from."""
    data: SourceConfig = field(default_factory=SourceConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(micro_batch=16, length=128, sample_every=250))
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def _multiplies_bf16() -> bool:
    """Whether the processor has instructions that serve products of bf16; without them such a product takes 30 times as long as one of fp32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def main(argv: list[str]) -> int:
    """Command line."""
    c, given = configs.parse(Config, argv, command="quickstart")
    device = choose_device(c.run.device)
    if not (c.train.steps or c.train.tokens or c.train.seconds):
        c = replace(c, train=replace(c.train, seconds=300.0 if device.type == "cpu" else 30.0))
    if device.type == "cpu" and "train.dtype" not in given and not _multiplies_bf16():
        c = replace(c, train=replace(c.train, dtype="float32"))
    directory = c.run.dir or _free("runs/quickstart")
    training = pretrain.Config(
        model=c.model,
        data=DataConfig(dir=c.data.dir),
        train=c.train,
        optim=c.optim,
        checkpoint=c.checkpoint,
        run=replace(c.run, dir=directory),
        log=c.log,
        parallel=c.parallel,
    )
    training = pretrain.resolve(training, given)
    if checkpoint.directories(Path(directory) / "checkpoints"):
        raise ValueError(f"--run.dir {directory}: holds a run already; choose another folder, or go on with"
                         f" nanotrain pretrain --config {directory}/config.toml --resume auto")  # fmt: skip
    started = time.monotonic()
    prepare.run(prepare.Config(c.data))
    prepared = time.monotonic() - started
    code = pretrain.run(training)
    summary = json.loads((Path(directory) / "summary.json").read_text())
    if code or summary["val_bpb"] is None:
        return code
    model, tokenizer = load_pretrained(directory, device=device)
    write_table(c, directory, summary, tokenizer, prepared=prepared, total=time.monotonic() - started)
    print(f"\nsample from {c.prompt!r}:\n\n{c.prompt}", end="")
    sample.step(model, tokenizer, c.prompt, sample.Config(sampling=SamplingConfig(max_tokens=120)), write=sample.show)
    print(f"\n\nThe run lies in {directory}. Write on with:  nanotrain sample {directory} --prompt='class '")
    print("Its report, for a browser:", flush=True)
    return command_line(["report", directory])


def write_table(c: Config, directory: str, summary: dict, tokenizer: Tokenizer, *, prepared: float, total: float) -> None:
    """Print what was reached beside what general compressors reach on the same held-out text, and keep it in quickstart.json."""
    shards = TokenShards(c.data.dir, "val", verify=False)
    texts = [tokenizer.decode(shards.document(n)).encode("utf-8", "surrogatepass") for n in range(len(shards.document_starts))]
    facts = shards.index["facts"]
    rows = {"this model": summary["val_bpb"], **compressed_bits_per_byte(texts)}
    print(f"\n{facts['source']}, corpus {facts['corpus_sha256'][:16]}; {len(texts)} held-out documents, {shards.bytes:,} bytes; {processor_name()}")
    print(
        f"prepared in {prepared:.0f} s, trained {summary['seconds']:.0f} s on {summary['tokens']:,} tokens in {summary['step']:,} steps,"
        f" {total:.0f} s in all\n"
    )
    print(f"  {'held-out text':34} bits per byte\n  {'-' * 34} -------------")
    for name, value in rows.items():
        print(f"  {name:34} {value:13.3f}")
    facts = {f.name: str(getattr(c.train, f.name)) for f in fields(c.train) if f.name in ("seconds", "steps", "tokens")} | facts
    record = dict(bits_per_byte=rows, python=sys.version.split()[0], processor=processor_name(), facts=facts, summary=summary)
    (Path(directory) / "quickstart.json").write_text(json.dumps(record, indent=1) + "\n")


def _free(base: str) -> str:
    """`base`, or with the first number that makes it a new folder."""
    number, path = 1, Path(base)
    while path.exists():
        number += 1
        path = Path(f"{base}-{number}")
    return str(path)
