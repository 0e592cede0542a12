"""Work for other processes that neither outlive this one nor keep it waiting: each has a pipe of its own.

A worker that dies, even halfway through an answer, is the end of its pipe, so it is noticed at once. concurrent.futures
shares one pipe among its workers, keeps the writing end open itself, and waits for the missing half for ever.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], *, processes: int, remedy: str) -> Generator[Result, None, None]:
    """`work(item)` of each item, in the order of the items, which are read at most four per process ahead.

    Raises what `work` raises, and ValueError, ending in `remedy`, where a worker dies. Closing the generator ends the
    workers at once, whatever they are doing.
    """
    context = multiprocessing.get_context("spawn")
    team, idle = [], []
    busy: dict[Connection, int] = {}
    done: dict[int, Result] = {}
    given = 0  # results yielded so far, which is the number of the next

    def finished() -> Iterator[Result]:
        nonlocal given
        for connection in wait(busy):
            with _alive(remedy):
                result, error = connection.recv()
            if error is not None:
                raise error
            done[busy.pop(connection)] = result
            idle.append(connection)
        while given in done:
            yield done.pop(given)
            given += 1

    try:
        for number, item in enumerate(items):
            if not idle and len(team) < processes:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, work), daemon=True)
                process.start()
                theirs.close()  # so that the worker alone holds its end
                team.append(process)
                idle.append(ours)
            while not idle or number - given >= 4 * processes:
                yield from finished()
            connection = idle.pop()
            with _alive(remedy):
                connection.send(item)
            busy[connection] = number
        while busy:
            yield from finished()
    finally:
        for process in team:
            process.kill()
        for process in team:
            process.join()


@contextmanager
def _alive(remedy: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        raise ValueError(f"a worker process died (out of memory?); {remedy}") from None


def _serve(connection: Connection, work: Callable) -> None:
    """A worker's life: ends with its pipe, and leaves Ctrl-C, which a terminal sends to every process, to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            item = connection.recv()
            try:
                answer = work(item), None
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = None, error
            connection.send(answer)
    except (EOFError, OSError):
        return
