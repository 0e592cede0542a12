"""python -m benchmarks.checkpoint: saving and loading a training state, hashes and syncs included, against torch.save + fsync.

Ours writes safetensors with a SHA-256 of every file, syncs files and directories, and verifies all hashes before loading.
The state is that of a model of about 125 million parameters in bf16 with AdamW. Saves and loads of both take turns.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.common import interleaved, ratio, write_rows
from nanotrain import checkpoint
from nanotrain.model.build import build_model
from nanotrain.model.transformer import ModelConfig
from nanotrain.optim import OptimConfig, Optimizer


def main() -> None:
    """Measure, print, and write results/cpu/checkpoint.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    model = build_model(ModelConfig(preset=arguments.preset).resolved(), seed=0, dtype=torch.bfloat16, device="cpu")
    optimizer = Optimizer(model, OptimConfig(name="adamw"))
    groups = {"model": {n: p.detach() for n, p in model.named_parameters()}, "optimizer": optimizer.state()}
    size = sum(t.numel() * t.element_size() for g in groups.values() for t in g.values())
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        ours, theirs = Path(scratch) / "ours", Path(scratch) / "theirs.pt"

        steps = itertools.count(1)

        def save_ours():  # as a run does: then the old one goes
            list(checkpoint.retain(ours, 1, checkpoint.save(ours, next(steps), groups, {})))

        def save_theirs():
            temporary = theirs.with_suffix(".tmp")  # nobody throws the old one away before the new one is there
            with temporary.open("wb") as file:
                torch.save(groups, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(theirs)

        def load_ours():
            path = checkpoint.latest(ours, print)
            for name, group in groups.items():
                checkpoint.load_tensors(path / f"{name}.safetensors", group)

        def load_theirs():
            for name, group in torch.load(theirs, weights_only=True).items():
                for key, tensor in group.items():
                    groups[name][key].copy_(tensor)

        saves = interleaved({"ours": save_ours, "torch": save_theirs}, arguments.rounds, warm_up=1)
        loads = interleaved({"ours": load_ours, "torch": load_theirs}, arguments.rounds, warm_up=1)
    rows = []
    for what, times in (("save", saves), ("load", loads)):
        medians = {n: statistics.median(t) for n, t in times.items()}
        rows.append(
            dict(
                what=what,
                bytes=size,
                ours_s=round(medians["ours"], 4),
                torch_s=round(medians["torch"], 4),
                ratio=round(ratio(times, "ours", "torch"), 3),
            )
        )
        print(
            f"{what}: ours {medians['ours']:.2f} s ({size / medians['ours'] / 1e9:.2f} GB/s, hashed), torch {medians['torch']:.2f} s;"
            f" ratio {rows[-1]['ratio']:.2f}"
        )
    both = statistics.median(
        (ts + tl) / (os_ + ol) for os_, ts, ol, tl in zip(saves["ours"], saves["torch"], loads["ours"], loads["torch"], strict=True)
    )
    rows.append(dict(what="save and load", bytes=size, ours_s="", torch_s="", ratio=round(both, 3)))
    print(f"save and load together: ratio {both:.2f}\nwrote {write_rows('checkpoint', rows)}")


if __name__ == "__main__":
    main()
