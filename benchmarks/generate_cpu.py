"""python -m benchmarks.generate_cpu: generation on a CPU against transformers' `generate` with its cache.

The `nano` preset with random weights, exported by save_hf and loaded by AutoModelForCausalLM: same weights, dtype and prompts in
both, taking turns in one process. Greedy tokens of the two must agree in fp32 before anything is reported.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace

import torch

from benchmarks.common import interleaved, ratio, write_rows
from nanotrain.model.build import build_model, parameter_count
from nanotrain.model.generate import generate
from nanotrain.model.hf import save_hf
from nanotrain.model.sampling import SamplingConfig
from nanotrain.model.transformer import ModelConfig

WAYS = {
    "greedy": (dict(temperature=0.0), dict(do_sample=False)),
    "top-p": (dict(temperature=0.8, top_p=0.95), dict(do_sample=True, temperature=0.8, top_p=0.95, top_k=0)),
}
"""How tokens are drawn: our keys, and transformers'."""


def main() -> None:
    """Measure, print, and write results/cpu/generate_cpu.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--vocab", type=int, default=2048, help="vocabulary [tokens]; 2048 makes 2.6M parameters")
    parser.add_argument("--prompt", type=int, default=32, help="length of a prompt [tokens]")
    parser.add_argument("--tokens", type=int, default=128, help="to write after each prompt [tokens]")
    arguments = parser.parse_args()
    c = replace(ModelConfig().resolved(), vocab_size=arguments.vocab)
    print(f"{c.preset}, {parameter_count(c):,} parameters, {torch.get_num_threads()} threads; {arguments.tokens} tokens after prompts of"
          f" {arguments.prompt}; medians of {arguments.rounds} interleaved rounds")  # fmt: skip
    rows = [row for dtype in (torch.bfloat16, torch.float32) for row in compare(c, dtype, arguments)]
    print(f"wrote {write_rows('generate_cpu', rows)}")


def compare(c: ModelConfig, dtype: torch.dtype, arguments) -> list[dict]:
    """Rows of one dtype."""
    from transformers import AutoModelForCausalLM

    model = build_model(c, seed=0, dtype=dtype, device="cpu")
    with tempfile.TemporaryDirectory() as directory:
        save_hf(model, f"{directory}/model")
        peer = AutoModelForCausalLM.from_pretrained(f"{directory}/model", dtype=dtype)
    prompts = torch.randint(3, c.vocab_size, (16, arguments.prompt), generator=torch.Generator().manual_seed(0))
    fixed = dict(attention_mask=torch.ones_like(prompts), max_new_tokens=arguments.tokens, min_new_tokens=arguments.tokens, pad_token_id=0)

    def theirs(batch: int, **options) -> list[list[int]]:
        mask = fixed["attention_mask"][:batch]
        return peer.generate(prompts[:batch], **(fixed | dict(attention_mask=mask)), **options)[:, arguments.prompt :].tolist()

    def ours(batch: int, **options) -> list[list[int]]:
        settings = SamplingConfig(max_tokens=arguments.tokens, **options)
        return [completion.tokens for completion in generate(model, prompts[:batch].tolist(), settings)]

    greedy = WAYS["greedy"]
    if dtype == torch.float32 and ours(16, **greedy[0]) != theirs(16, **greedy[1]):
        raise SystemExit("the two write different texts in fp32; nothing is reported")
    rows = []
    for way, (our_options, their_options) in WAYS.items():
        for batch in (1, 16):
            calls = {
                "transformers": lambda b=batch, o=their_options: theirs(b, **o),
                "ours": lambda b=batch, o=our_options: ours(b, **o),
            }
            times = interleaved(calls, arguments.rounds, warm_up=1)
            rate = {name: batch * arguments.tokens / statistics.median(seconds) for name, seconds in times.items()}
            row = dict(dtype=str(dtype).removeprefix("torch."), draw=way, batch=batch, transformers_tokens_per_s=round(rate["transformers"]),
                       ours_tokens_per_s=round(rate["ours"]), ratio=round(ratio(times, "ours", "transformers"), 2))  # fmt: skip
            rows.append(row)
            print(f"  {row['dtype']:9} {way:7} batch {batch:3}   transformers {rate['transformers']:8,.0f} tok/s   ours {rate['ours']:8,.0f} tok/s"
                  f"   ratio {row['ratio']:.2f}")  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
