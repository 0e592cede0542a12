"""The command `nanotrain <stage> ...`, also `python -m nanotrain <stage> ...` and under torchrun."""

from __future__ import annotations

import importlib
import os
import sys

from nanotrain.config import HelpRequested

STAGES = {
    "quickstart": ("nanotrain.quickstart", "prepare, pretrain and sample on this machine's own Python"),
    "prepare": ("nanotrain.stages.prepare", "text in, a tokenizer and packed token shards out"),
    "pretrain": ("nanotrain.stages.pretrain", "train a language model to predict the next token"),
    "sample": ("nanotrain.stages.sample", "write on from a prompt with a trained model"),
    "chat": ("nanotrain.stages.chat", "talk with a model in the terminal"),
    "convert": ("nanotrain.stages.convert", "a model to Hugging Face's form, or from it"),
    "report": ("nanotrain.report", "runs as one HTML page"),
    "watch": ("nanotrain.watch", "a running run, live in the terminal"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a stage; a mistake of the user's is one line on stderr and exit code 2, a failure of the machine's 1."""
    arguments = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what the console cannot show, in a sample say, must not end a run
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, STAGES))
        print("usage: nanotrain <stage> [--config FILE] [--section.key=value ...]\n")
        print("\n".join(f"  {name:{width}}  {what}" for name, (_, what) in STAGES.items()))
        print("\nnanotrain <stage> --help lists a stage's keys with defaults and units.")
        return 0 if arguments else 2
    stage, rest = arguments[0], arguments[1:]
    try:
        if stage not in STAGES:
            raise ValueError(f"{stage}: no such stage; one of {', '.join(STAGES)}")
        return importlib.import_module(STAGES[stage][0]).main(rest)
    except HelpRequested as help_text:
        print(help_text)
        return 0
    except ValueError as error:
        print(f"nanotrain {stage}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = error.filename or "a file"
        print(f"nanotrain {stage}: {where}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
