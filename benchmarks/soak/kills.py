"""A training process is killed with SIGKILL again and again, and every restart must go on as if nothing had happened.

Each process trains, writes a checkpoint after every step, and compares the bits of parameters and states with those of
a run that was never disturbed: when it has read a checkpoint and after every step.  A fork server that has imported the
framework begins the processes, so that a restart costs no import.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from ctypes import c_int
from pathlib import Path
from typing import Any, Protocol

KILLS = 100
STEPS = 400
"""Of one run.  When a run comes to its end, the next kills are of a new one."""
WAIT_LIMIT = 300.0
"""Seconds after which a process that does nothing counts as hanging."""
PHASES = ("starting", "reading a checkpoint", "between checkpoints", "writing a checkpoint", "done", "failed")
STARTING, READING, STEPPING, WRITING, DONE, FAILED = range(len(PHASES))


class Training(Protocol):
    """A run in one framework whose states and batches are all in its checkpoints."""

    def restore(self, folder: Path) -> int:
        """Takes over the newest checkpoint; the steps that it holds, or 0 where there is none."""

    def step(self) -> None:
        """Takes one step."""

    def save(self, folder: Path, step: int) -> None:
        """Writes a checkpoint."""

    def digest(self) -> str:
        """Of all bits of parameters, states and the source of the batches."""

    def close(self) -> None:
        """Waits for what is still being written."""


def reference(make: Callable[[], Training], steps: int, path: Path) -> None:
    """Writes the digests of an undisturbed run before its first step and after each: the body of a process."""
    training = make()
    digests = [training.digest()]
    for _ in range(steps):
        training.step()
        digests.append(training.digest())
    path.write_text(json.dumps(digests))


def victim(make: Callable[[], Training], folder: Path, digests_path: Path, place: Any) -> None:
    """Trains from the newest checkpoint on: the body of a process that is going to be killed.

    Args:
        make: the run before its first step.
        folder: of the checkpoints.
        digests_path: what `reference` wrote.
        place: two shared integers, told the phase and the steps that are over.
    """
    try:
        digests = json.loads(digests_path.read_text())
        training = make()
        place[0] = READING
        at = training.restore(folder)
        place[1] = at
        while True:
            if training.digest() != digests[at]:
                raise AssertionError(f"other bits than the undisturbed run has after step {at}")
            if at == len(digests) - 1:
                break
            place[0] = STEPPING
            training.step()
            at += 1
            place[0] = WRITING
            training.save(folder, at)
            place[1] = at
        training.close()
        place[0] = DONE
    except BaseException:
        (folder.parent / "failure.txt").write_text(traceback.format_exc())
        place[0] = FAILED
        raise


def kill_again_and_again(
    make: Callable[[], Training], folder: Path, kills: int, *, preload: str, steps: int = STEPS, seed: int = 0
) -> dict[str, Any]:
    """Kills `kills` processes at random moments, then lets a last one come to the end of its run.

    Args:
        make: a function of a module that makes the run before its first step.
        folder: for checkpoints and digests; what is in it is removed.
        kills: how many.
        preload: the module that the fork server imports.
        steps: the length of a run.
        seed: of the moments.

    Returns:
        A record with the counts and `"failures"`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    begin = time.perf_counter()
    digests = folder / "digests.json"
    undisturbed = context.Process(target=reference, args=(make, steps, digests))
    undisturbed.start()
    undisturbed.join()
    record: dict[str, Any] = {"kills": 0, "runs": 1, "steps_of_a_run": steps, "phases": {}}
    if undisturbed.exitcode != 0:
        return record | {"failures": [f"the undisturbed run ended with exit code {undisturbed.exitcode}"]}

    rng = random.Random(seed)
    phases: Counter[str] = Counter()
    place = context.RawArray(c_int, 2)
    failures: list[str] = []
    written: set[int] = set()
    while not failures:
        place[0], place[1] = STARTING, 0
        before = _newest_seen(written)
        process = context.Process(target=victim, args=(make, folder / "checkpoints", digests, place))
        process.start()
        if record["kills"] == kills:
            process.join(WAIT_LIMIT)
            failures += _end_of(process, place, folder)
            break
        # One in ten dies while it starts or reads; the others some steps after the checkpoint that they found.
        early = rng.random() < 0.1
        time.sleep(rng.uniform(0.0, 0.3) if early else rng.uniform(0.0, _seconds_of_a_step(process, place, rng)))
        process.kill()
        process.join()
        if place[0] == FAILED or (process.exitcode != -9 and place[0] != DONE):
            failures += _end_of(process, place, folder)
        elif place[0] == DONE:
            record["runs"] += 1
            written.clear()
            shutil.rmtree(folder / "checkpoints")
        else:
            record["kills"] += 1
            phases[PHASES[place[0]]] += 1
            if place[1]:
                if place[1] < before:
                    failures.append(f"a restart stood at step {place[1]} after one had written step {before}")
                written.add(place[1])
    record["phases"] = {name: phases[name] for name in PHASES if phases[name]}
    record["steps_checkpointed"] = _newest_seen(written)
    return record | {"seconds": time.perf_counter() - begin, "failures": failures}


def _newest_seen(steps: set[int]) -> int:
    return max(steps, default=0)


def _seconds_of_a_step(process: Any, place: Any, rng: random.Random) -> float:
    """Waits until the process has taken some steps; how long each took, its checkpoint included."""
    limit = time.monotonic() + WAIT_LIMIT

    def wait_until(reached: Callable[[], bool]) -> None:
        while process.is_alive() and not reached() and time.monotonic() < limit:
            time.sleep(0.001)

    wait_until(lambda: place[0] >= STEPPING)
    begin, first, count = time.monotonic(), place[1], rng.randint(1, 6)
    wait_until(lambda: place[1] >= first + count)
    return (time.monotonic() - begin) / count


def _end_of(process: Any, place: Any, folder: Path) -> list[str]:
    """What is wrong with a process that should have come to its end."""
    if process.exitcode == 0 and place[0] == DONE:
        return []
    told = folder / "failure.txt"
    reason = told.read_text().strip().splitlines()[-1] if told.exists() else "it said nothing"
    if process.exitcode is None:
        process.kill()
        process.join()
        reason = f"it did not end within {WAIT_LIMIT:.0f} seconds"
    return [f"a restart failed at step {place[1]} while {PHASES[place[0]]}, exit code {process.exitcode}: {reason}"]
