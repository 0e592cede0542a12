"""python -m tests.kernels.mutate [--sample N] [NAME ...]: do the tests of kernels notice mistakes in them?

Each mistake of tests/kernels/mutations/<file>.py, a text of kernels/<file>.py and what takes its place, is made in a copy of that file, and
the tests named there run on it in a process of its own. They must fail, by an assertion or by the memory fault of a wild pointer: a test
that passes, or that fails for a name not defined, proves nothing. Before that they must pass on the file as it is.

NAME is a file (norm) or an operation (rms_norm). `--sample N`, for use after the tests have passed, leaves that out and takes N mistakes of
each file, other ones for each commit. Exits with 1 where a mistake was not noticed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300
"""After which tests are taken to hang, which a mistake may make them do."""


@dataclass(frozen=True)
class Mutation:
    """One mistake: in kernels/<file>.py the text `old`, which stands there once, becomes `new`."""

    file: str
    op: str
    old: str
    new: str

    def __str__(self) -> str:
        shown = [" ".join(text.split()) or "nothing" for text in (self.old, self.new)]
        first = next((i for i, (a, b) in enumerate(zip(*shown, strict=False)) if a != b), 0)
        first = max(0, first - 30)
        return f"{self.op}: {shown[0][first : first + 60]!r} -> {shown[1][first : first + 60]!r}"


def mutations(names: list[str]) -> list[Mutation]:
    """All mistakes of the files or operations named, of every file where none is. Raises ValueError for an unknown name or a stale text."""
    found = []
    for path in sorted((ROOT / "tests/kernels/mutations").glob("[!_]*.py")):
        source = (ROOT / "kernels" / path.name).read_text()
        for op, old, new in _listed(path.stem).MUTATIONS:
            if source.count(old) != 1:
                raise ValueError(f"tests/kernels/mutations/{path.name}: {old!r} stands {source.count(old)} times in kernels/{path.name}, not once")
            found.append(Mutation(path.stem, op, old, new))
    known = {m.file for m in found} | {m.op for m in found}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"{unknown[0]}: neither a file nor an operation; one of {', '.join(sorted(known))}")
    return [m for m in found if not names or m.file in names or m.op in names]


def _listed(file: str):
    return importlib.import_module(f"tests.kernels.mutations.{file}")


def verdict(file: str, mutation: Mutation | None) -> str:
    """What the tests of kernels/<file>.py say with the mistake made: "passed", "noticed", or why neither."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(file, mutation, writer))
    process.start()
    writer.close()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return "noticed"
    if process.exitcode in (-signal.SIGSEGV, -signal.SIGBUS):
        return "noticed"
    with contextlib.suppress(EOFError):
        return reader.recv()
    return f"the tests' process ended with {process.exitcode}"


def _run(file: str, mutation: Mutation | None, writer) -> None:
    """In a process of its own: pytest, with the changed file in the place of nanotrain.kernels.<file>."""
    import pytest
    from hypothesis import Phase, settings

    # No shrinking: that the tests fail is all that is asked.
    once = dict(phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False)
    settings.register_profile("mutate", **once, deadline=None, derandomize=True, database=None)
    settings.load_profile("mutate")
    errors: list[type] = []

    class Watch:
        def pytest_exception_interact(self, call):
            errors.append(call.excinfo.type)

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        if mutation is not None:
            _put(file, (ROOT / "kernels" / f"{file}.py").read_text().replace(mutation.old, mutation.new), Path(folder))
        with contextlib.redirect_stdout(io.StringIO()):
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *_listed(file).TESTS], plugins=[Watch()])
    if code == pytest.ExitCode.OK:
        writer.send("passed")
    elif code == pytest.ExitCode.TESTS_FAILED and errors and issubclass(errors[0], AssertionError):
        writer.send("noticed")
    else:
        writer.send(f"failed by {errors[0].__name__ if errors else code}, no assertion")


def _put(file: str, source: str, folder: Path) -> None:
    """Import a source as nanotrain.kernels.<file>, from a file: Triton reads the text of its functions."""
    path = folder / f"{file}.py"
    path.write_text(source)
    name = f"nanotrain.kernels.{file}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    setattr(sys.modules["nanotrain.kernels"], file, module)
    spec.loader.exec_module(module)


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.mutate", description=__doc__.split("\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a file of kernels/ or an operation; all where none is named")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="so many mistakes of each file; 0 is all")
    arguments = parser.parse_args(argv)
    try:
        if arguments.sample < 0:
            raise ValueError(f"--sample {arguments.sample}: must be 0 or more")
        chosen = mutations(arguments.names)
    except ValueError as error:
        parser.error(str(error))
    files = sorted({m.file for m in chosen})
    if arguments.sample:
        commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
        draw = random.Random(commit.stdout)
        groups = ([m for m in chosen if m.file == file] for file in files)
        chosen = [m for group in groups for m in draw.sample(group, min(arguments.sample, len(group)))]
    # Imported before the forks, which then start in no time; on one thread, for threads do not survive a fork.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch

    torch.set_num_threads(1)
    for module in ("tests.kernels.kit", "nanotrain.kernels"):
        importlib.import_module(module)
    started, bad = time.perf_counter(), 0
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        whole = [] if arguments.sample else files
        for file, said in zip(whole, pool.map(lambda file: verdict(file, None), whole), strict=True):
            if said != "passed":
                print(f"kernels/{file}.py: its tests do not pass as it is ({said}); mend that first", file=sys.stderr)
                return 1
        for mutation, said in zip(chosen, pool.map(lambda m: verdict(m.file, m), chosen), strict=True):
            bad += said != "noticed"
            verdicts = {"noticed": "noticed", "passed": "NOT NOTICED"}
            print(f"{verdicts.get(said, f'NOT NOTICED ({said})')}  {mutation}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mistakes noticed in {time.perf_counter() - started:.0f} s")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
