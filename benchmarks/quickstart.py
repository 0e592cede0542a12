"""python -m benchmarks.quickstart: the README's first command, measured: bits per byte of held-out text.

Beside it: general compressors, and a plain PyTorch loop (benchmarks/plain.py) of the same model with the same seconds on the same
split, with torch's AdamW and with torch's Muon, each scored as ours is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace

import torch

from benchmarks.common import write_rows
from benchmarks.plain import PlainLoop
from nanotrain.__main__ import main as nanotrain
from nanotrain.data.loader import Loader
from nanotrain.data.shards import TokenShards
from nanotrain.eval import bits_per_byte
from nanotrain.model.build import build_model
from nanotrain.optim import OptimConfig, schedule_factor
from nanotrain.quickstart import Config


def plain(data: str, seconds: float, *, muon: bool) -> dict:
    """The plain loop for so many seconds: bits per byte, and tokens seen. Rates warm up and decay as ours do."""
    c, device = Config(), torch.device("cpu")
    shards, held_out = TokenShards(data, "train"), TokenShards(data, "val")
    shape = replace(c.model.resolved(), vocab_size=shards.vocab_size)
    model = build_model(shape, seed=0, dtype=torch.float32, device=device)
    loop = PlainLoop(model, torch.bfloat16, Loader(shards, length=c.train.length, seed=0, device=device), c.train.micro_batch, muon=muon)
    spent = 0.0
    while spent < seconds:
        started = time.perf_counter()
        loop.step(schedule_factor(OptimConfig(), spent / seconds))
        spent += time.perf_counter() - started
    trained = build_model(shape, seed=0, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter.copy_(loop.w[name])
    score = bits_per_byte.score(trained, held_out, length=c.train.length, stride=c.train.length // 2, device=device)
    return dict(bits_per_byte=score.bits_per_byte, tokens=loop.cursor * c.train.length)


def main() -> None:
    """Run the quickstart as a user would, then the plain loops; write results/<machine>/quickstart.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="seconds of training, of each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        code = nanotrain(["quickstart", f"--run.dir={scratch}/run", f"--data.dir={scratch}/data", f"--train.seconds={arguments.seconds}"])
        if code:
            raise SystemExit(code)
        with open(f"{scratch}/run/quickstart.json") as file:
            record = json.load(file)
        loops = {name: plain(f"{scratch}/data", arguments.seconds, muon=muon) for name, muon in (("AdamW", False), ("Muon", True))}
    summary, facts = record["summary"], record["facts"]
    common = dict(train_s=summary["seconds"], corpus=facts["source"], corpus_sha256=facts["corpus_sha256"],
                  held_out_documents=facts["totals"]["val"]["documents"], held_out_bytes=facts["totals"]["val"]["bytes"])  # fmt: skip
    rows = [dict(what="nanotrain quickstart", bits_per_byte=summary["val_bpb"], tokens=summary["tokens"])]
    rows += [dict(what=f"plain PyTorch loop, torch's {name}", **loop) for name, loop in loops.items()]
    rows += [dict(what=name, bits_per_byte=value, tokens="") for name, value in record["bits_per_byte"].items() if name != "this model"]
    for row in rows:
        row["bits_per_byte"] = round(row["bits_per_byte"], 4)
        print(f"  {row['what']:38} {row['bits_per_byte']:.3f}")
    print(f"wrote {write_rows('quickstart', [row | common for row in rows])}")


if __name__ == "__main__":
    main()
