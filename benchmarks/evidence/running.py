"""Doing what the plan lists and the store lacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.evidence.jobs import Job
from benchmarks.evidence.plan import Spec, plan
from benchmarks.evidence.store import Record, Store, base_of, losses, place_of
from benchmarks.evidence.training import train
from benchmarks.evidence.workers import Failure, Task, Worker, ready, single_threaded

POLL_SECONDS = 2.0


class Outcome(NamedTuple):
    """What a call did.

    Attributes:
        done: runs that it added.
        missing: runs of the plan that are still to be done.
        failures: traces of tasks that raised.
    """

    done: int
    missing: int
    failures: list[str]


class Runner:
    """Gives tasks to workers, in the order of the plan, and keeps their results.

    Args:
        store: where results are and go.
        jobs: by name, in the order of running.
        workers: processes.
        planner: `plan`, or what takes its place in a test.
    """

    def __init__(
        self, store: Store, jobs: Mapping[str, Job], workers: int, planner: Callable[..., list[Spec]] = plan
    ) -> None:
        self.store = store
        self.jobs = jobs
        self.places = {name: place_of(job) for name, job in jobs.items()}
        self.planner = planner
        self.losses = losses(store.records())
        self.failures: dict[str | Spec, str] = {}
        self.busy: dict[Worker, str | Spec] = {}
        # Jobs of a family share a base.
        self.bases = {job.family: False for job in jobs.values()}
        single_threaded()
        self.idle = [Worker() for _ in range(workers)]

    def run(self, minutes: float) -> Outcome:
        """Runs until nothing is missing or no time is left; what was begun is finished.

        Args:
            minutes: after which nothing begins.
        """
        deadline = time.monotonic() + 60 * minutes
        before = self._present()
        with tqdm(desc="runs", unit="run", total=self._expected(), initial=before, smoothing=0.05) as bar:
            while True:
                while self.idle and time.monotonic() < deadline and (todo := self._next()) is not None:
                    worker = self.idle.pop()
                    worker.give(self._task(todo))
                    self.busy[worker] = todo
                if not self.busy:
                    break
                for worker in ready(self.busy, POLL_SECONDS):
                    self._take(worker)
                bar.total = self._expected()
                bar.set_postfix_str(", ".join(map(_short, self.busy.values())), refresh=False)
                bar.update(self._present() - bar.n)
                bar.refresh()
        return Outcome(self._present() - before, self._expected() - self._present(), list(self.failures.values()))

    def close(self) -> None:
        """Ends the processes; runs that they were in leave nothing behind."""
        for worker in (*self.idle, *self.busy):
            worker.end()

    def _next(self) -> str | Spec | None:
        """The first base or run that is missing, not in hand and can be done now."""
        begun = {*self.busy.values(), *self.failures}
        for family, there in self.bases.items():
            if not there and family not in begun:
                return family
        for spec in self.planner(self.losses, self.places):
            if spec not in self.losses and spec not in begun and self.bases[self.jobs[spec.job].family]:
                return spec
        return None

    def _task(self, todo: str | Spec) -> Task:
        if isinstance(todo, Spec):
            return partial(_run, todo, self.jobs[todo.job], self.store.folder)
        first = next(job for job in self.jobs.values() if job.family == todo)
        return partial(_prepare, first, self.store.folder)

    def _take(self, worker: Worker) -> None:
        todo, result = self.busy.pop(worker), worker.take()
        if isinstance(result, Failure):
            # One broken variant must not cost the others their runs.
            self.failures[todo] = f"{_short(todo)}: {result.text}"
            tqdm.write(self.failures[todo])
        elif isinstance(todo, Spec):
            self.store.write(result)
            self.losses = {**self.losses, **losses({todo: result})}
        else:
            self.bases[todo] = True
        self.idle.append(worker if worker.alive else Worker())

    def _present(self) -> int:
        return sum(spec in self.losses for spec in self.planner(self.losses, self.places))

    def _expected(self) -> int:
        return len(self.planner(self.losses, self.places, known=False))


def run_missing(
    store: Store, jobs: Mapping[str, Job], workers: int, minutes: float, planner: Callable[..., list[Spec]] = plan
) -> Outcome:
    """`Runner.run`, with the processes ended whatever happens."""
    with closing(Runner(store, jobs, workers, planner)) as runner:
        return runner.run(minutes)


def _prepare(job: Job, folder: Path) -> None:
    base_of(job, folder)


def _run(spec: Spec, job: Job, folder: Path) -> Record:
    return train(spec, job, base_of(job, folder))


def _short(todo: str | Spec) -> str:
    return f"{todo.job} {todo.variant} {todo.lr:g} #{todo.seed}" if isinstance(todo, Spec) else f"base of {todo}"
