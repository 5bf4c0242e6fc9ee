"""Processes that do one task after another, each on one thread."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import version
from multiprocessing import connection
from typing import Any, NamedTuple

Task = Callable[[], Any]
"""What a worker can be given: a function of a module with its arguments bound, so that it can be sent."""


class Failure(NamedTuple):
    """What became of a task that raised, or whose process died."""

    text: str


class Worker:
    """One process.  It ends with its parent, whatever ends the parent."""

    def __init__(self) -> None:
        # Spawned, not forked: a forked copy of a process that has computed with torch may hang.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, task: Task) -> None:
        """Begins a task; `taken` has its result when `ready` says so."""
        self.pipe.send(task)

    def take(self) -> Any:
        """The result, or a `Failure`; waits for it."""
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return Failure(f"the process ended with exit code {self.process.exitcode}")

    @property
    def alive(self) -> bool:
        """Whether it can be given a task."""
        return self.process.is_alive()

    def end(self) -> None:
        """Stops the process at once."""
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def ready(workers: Iterable[Worker], seconds: float) -> list[Worker]:
    """The workers that have something to take, or none when the time is up."""
    by_pipe = {worker.pipe: worker for worker in workers}
    return [by_pipe[pipe] for pipe in connection.wait(list(by_pipe), timeout=seconds)]  # type: ignore[index]


def _serve(pipe: Any) -> None:
    # Ctrl-C reaches the whole group of processes; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(task())
        except Exception:
            pipe.send(Failure(traceback.format_exc()))


def single_threaded() -> None:
    """Makes the processes that are begun later compute on one thread."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    flags = "--xla_cpu_multi_thread_eigen=false"
    if version("jaxlib") < "0.11":
        # XLA's newer code generator for CPUs would take most of the time of a run in JAX.  Later versions have no other
        # and end at a flag that they do not know.
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
