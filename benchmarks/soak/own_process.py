"""One process for one task."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any


def in_own_process(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The task's record; an error, or the end of its process, is a failure of the task."""
    # One process for one task: memory is that of the task alone.  Spawned, because a fork of a process that has
    # computed may hang.
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, work))
    process.start()
    theirs.close()
    try:
        record: dict[str, Any] = ours.recv()
        process.join()
    except EOFError:
        process.join()
        record = {"failures": [f"its process ended with exit code {process.exitcode}"]}
    finally:
        process.terminate()
    return record


def _work(pipe: Connection, work: Callable[[], dict[str, Any]]) -> None:
    """The body of a task's process."""
    try:
        pipe.send(work())
    except Exception as error:
        traceback.print_exc()
        pipe.send({"failures": [f"{type(error).__name__}: {error}"]})
