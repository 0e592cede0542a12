"""python -m benchmarks.quickstart: the README's first command, measured: bits per byte of held-out text beside general compressors."""

from __future__ import annotations

import argparse
import json
import tempfile

from benchmarks.common import write_rows
from nanotrain.__main__ import main as nanotrain


def main() -> None:
    """Run the quickstart as a user would, and write results/<machine>/quickstart.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="seconds of training")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        code = nanotrain(["quickstart", f"--run.dir={scratch}/run", f"--data.dir={scratch}/data", f"--train.seconds={arguments.seconds}"])
        if code:
            raise SystemExit(code)
        with open(f"{scratch}/run/quickstart.json") as file:
            record = json.load(file)
    summary, facts = record["summary"], record["facts"]
    row = {name: round(value, 4) for name, value in record["bits_per_byte"].items()}
    row |= dict(train_s=summary["seconds"], steps=summary["step"], tokens=summary["tokens"])
    row |= dict(corpus=facts["source"], corpus_sha256=facts["corpus_sha256"],
                held_out_documents=facts["totals"]["val"]["documents"], held_out_bytes=facts["totals"]["val"]["bytes"])  # fmt: skip
    print(f"wrote {write_rows('quickstart', [row])}")


if __name__ == "__main__":
    main()
