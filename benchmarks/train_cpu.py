"""python -m benchmarks.train_cpu: a training step on a CPU against a plain PyTorch loop of the same model.

The plain loop is what one writes in an hour: fp32 weights under bf16 autocast (or plain fp32), scaled_dot_product_attention,
cross-entropy on logits, torch's fused AdamW, the same rows of the same data. Steps of both take turns in one process.
Also: what the engine around the step costs (loader, logging, bookkeeping), and how much faster the loader is than the model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.common import interleaved, ratio, write_rows
from nanotrain.model.transformer import ModelConfig, Transformer, build_model
from nanotrain.optim import OptimConfig, Optimizer
from nanotrain.run import Run
from nanotrain.stages.pretrain import Config, DataConfig, Loop, TrainConfig, Training, step


class PlainLoop:
    """The same weights and shapes, written plainly."""

    def __init__(self, model: Transformer, dtype: torch.dtype, loader, rows: int):
        self.c, self.dtype, self.loader, self.rows, self.cursor = model.c, dtype, loader, rows, 0
        self.w = {n: torch.nn.Parameter(p.detach().float()) for n, p in model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.w.values(), lr=1e-4, fused=True)
        T = loader.length
        angles = torch.arange(T)[:, None] * 10000 ** (-torch.arange(0, self.c.head_dim, 2) / self.c.head_dim)
        self.cos, self.sin = angles.cos()[:, None], angles.sin()[:, None]

    def rope(self, x):
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1).to(x.dtype)

    def forward(self, tokens):
        c, w = self.c, self.w
        B, T = tokens.shape
        x = F.embedding(tokens, w["embed.weight"])
        for i in range(c.layers):
            p = f"blocks.{i}."
            h = F.rms_norm(x, (c.width,), w[p + "attention_norm.weight"], c.norm_eps)
            q, k, v = (F.linear(h, w[f"{p}attention.{n}_proj.weight"]).view(B, T, -1, c.head_dim) for n in "qkv")
            if c.qk_norm:
                q = F.rms_norm(q, (c.head_dim,), w[p + "attention.q_norm.weight"], c.norm_eps)
                k = F.rms_norm(k, (c.head_dim,), w[p + "attention.k_norm.weight"], c.norm_eps)
            q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (self.rope(q), self.rope(k), v))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
            x = x + F.linear(a, w[p + "attention.o_proj.weight"])
            h = F.rms_norm(x, (c.width,), w[p + "mlp_norm.weight"], c.norm_eps)
            x = x + F.linear(
                F.silu(F.linear(h, w[p + "mlp.gate_proj.weight"])) * F.linear(h, w[p + "mlp.up_proj.weight"]), w[p + "mlp.down_proj.weight"]
            )
        return F.linear(F.rms_norm(x, (c.width,), w["head.norm.weight"], c.norm_eps), w.get("head.weight", w["embed.weight"]))

    def step(self):
        batch = self.loader.batch(self.cursor, self.rows)
        self.cursor += self.rows
        tokens, labels = batch.tokens_BT.view(self.rows, -1), batch.labels_BT.view(-1)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            logits = self.forward(tokens)
        loss = F.cross_entropy(logits.view(-1, self.c.vocab_size).float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.w.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class Ours:
    """The engine's own step with its loader."""

    def __init__(self, training: Training, dtype: torch.dtype, optimizer: str):
        c = training.c
        self.model = build_model(c.model, seed=0, dtype=dtype, device="cpu")
        self.optimizer = Optimizer(self.model, OptimConfig(name=optimizer, lr=1e-4))
        self.loader, self.rows, self.cursor = training.loader, c.train.micro_batch, 0

    def step(self):
        batch = self.loader.batch(self.cursor, self.rows)
        self.cursor += self.rows
        return float(step(self.model, self.optimizer, [batch], 1.0, 0)[0])


def main() -> None:
    """Measure, print, and write results/cpu/train_cpu.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/python", help="data directory made by nanotrain prepare")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    config = Config(model=ModelConfig().resolved(), data=DataConfig(dir=arguments.data), train=TrainConfig(steps=arguments.rounds))
    training = Training(config, torch.device("cpu"))
    c = training.c
    tokens = c.train.micro_batch * c.train.length
    rows = []
    print(
        f"{c.model.preset}, {c.train.micro_batch} x {c.train.length} tokens a step, {torch.get_num_threads()} threads;"
        f" medians of {arguments.rounds} interleaved steps"
    )
    for dtype in (torch.bfloat16, torch.float32):
        plain, ours, muon = (
            PlainLoop(training.model, dtype, training.loader, c.train.micro_batch),
            Ours(training, dtype, "adamw"),
            Ours(training, dtype, "muon"),
        )
        first = (plain.step(), ours.step())
        if abs(first[0] - first[1]) > 0.02 * first[0]:
            raise SystemExit(f"the two loops differ: first losses {first}; nothing is reported")
        times = interleaved({"plain": plain.step, "ours": ours.step, "ours, muon": muon.step}, arguments.rounds)
        rate = {n: tokens / statistics.median(t) for n, t in times.items()}
        row = dict(dtype=str(dtype).removeprefix("torch."), plain_tokens_per_s=round(rate["plain"]), ours_tokens_per_s=round(rate["ours"]),
                   ratio=round(ratio(times, "ours", "plain"), 3), ours_muon_tokens_per_s=round(rate["ours, muon"]))  # fmt: skip
        rows.append(row)
        print(
            f"  {row['dtype']:9} plain loop {rate['plain']:8,.0f} tok/s   ours, AdamW {rate['ours']:8,.0f} tok/s   ratio {row['ratio']:.2f}"
            f"   ours, Muon {rate['ours, muon']:8,.0f} tok/s"
        )
    print(f"wrote {write_rows('train_cpu', rows)}")
    print(f"wrote {write_rows('engine_cpu', [engine(training, arguments.rounds)])}")


def engine(training: Training, rounds: int) -> dict:
    """Share of a step that is not the step itself, from a real run of the loop with every line timed."""
    spent = {"step": 0.0, "log": 0.0, "announce": 0.0}
    c = replace(training.c, train=replace(training.c.train, steps=4 * rounds, val_every=0))

    def timed(name, function):
        def call(*arguments):
            started = time.perf_counter()
            result = function(*arguments)
            spent[name] += time.perf_counter() - started
            return result

        return call

    from nanotrain.stages import pretrain

    with tempfile.TemporaryDirectory() as directory, Run(f"{directory}/run", "benchmark") as folder:
        fresh = Training(c, torch.device("cpu"))
        folder.open_metrics(0)
        loop = Loop(fresh, folder)
        loop.log, loop.announce, loop.finish = timed("log", loop.log), timed("announce", loop.announce), lambda *a: 0
        original, waited = pretrain.step, 0.0
        pretrain.step = timed("step", lambda *a: [r if i else r.clone() for i, r in enumerate(original(*a))])
        folder.say = lambda line: None
        fetch = fresh.loader.batch

        def batch(*arguments):
            nonlocal waited
            started = time.perf_counter()
            result = fetch(*arguments)
            waited += time.perf_counter() - started
            return result

        fresh.loader.batch = batch
        started = time.perf_counter()
        try:
            loop.run()
        finally:
            pretrain.step = original
        total = time.perf_counter() - started - spent["announce"]
    tokens = fresh.progress.tokens
    row = dict(
        steps=fresh.progress.step, overhead_percent=round(100 * (total - spent["step"]) / total, 2),
        logging_percent=round(100 * spent["log"] / total, 3),
        data_wait_percent=round(100 * waited / total, 3), loader_over_model=round((tokens / waited) / (tokens / spent["step"]), 1),
        loader_tokens_per_s=round(tokens / waited),
    )  # fmt: skip
    print(f"  engine: {row['overhead_percent']}% of a step is not the step; logging {row['logging_percent']}%, data wait {row['data_wait_percent']}%,"
          f" the loader gives {row['loader_over_model']}x what the model takes")  # fmt: skip
    return row


if __name__ == "__main__":
    main()
