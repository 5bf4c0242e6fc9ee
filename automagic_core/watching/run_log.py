"""A run's statistics on disk: one JSON line for each logged step, and TensorBoard's event files beside them."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

FILE_NAME = "metrics.jsonl"

_told = False


class RunLog:
    """Writes records of scalars into a run's folder; what is there already is added to.

    Args:
        run_dir: the folder, made where it is missing.
        every: steps between two records.
        tensorboard: write event files too.  Where the package `tensorboard` is missing this is said once, and the run
            goes on without them.

    Raises:
        ValueError: `every` is no integer of at least 1.
    """

    def __init__(self, run_dir: str | Path, every: int = 100, *, tensorboard: bool = True) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every = {every!r} is not valid; valid: an integer of at least 1")
        self.run_dir = Path(run_dir)
        self.every = every
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._file = self.run_dir / FILE_NAME
        _drop_unfinished_line(self._file)
        self._wrote = False
        self._events = _event_writer(self.run_dir) if tensorboard else None

    def is_due(self, step: int) -> bool:
        """The first step that is shown, and then every multiple of `every`."""
        return not self._wrote or step % self.every == 0

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Adds one record; it is on disk when this returns.

        Args:
            step: how many steps are over.  A run that goes on from an earlier step writes it again: readers take what
                was written last.
            record: scalars by name.  A value that is not finite is written as null.
        """
        self._wrote = True
        plain = {name: value if math.isfinite(value) else None for name, value in record.items()}
        line = json.dumps({"step": step, **plain}, allow_nan=False) + "\n"
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line)
        if self._events is not None:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary

            values = [Summary.Value(tag=name, simple_value=value) for name, value in record.items()]
            self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._events.flush()

    def close(self) -> None:
        """Ends the event file; JSON lines need no closing."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_run(run: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """The records of a run as curves.

    Args:
        run: its folder, or the file in it.

    Returns:
        By name, the steps in rising order and the values; NaN for what was not finite.  Where the run went back to an
        earlier step, what had been written from that step on is left out, and so is a last line cut short.

    Raises:
        FileNotFoundError: there are no records.
        ValueError: a line that is no record, with its number.
    """
    path = Path(run)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a MetricsLogger writes it")
    records: list[tuple[int, dict[str, Any]]] = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines):  # cut short: no newline behind it
                break
            raise ValueError(f"{path}, line {number} is no record of a step: {line[:60]!r}") from error
        while records and records[-1][0] >= step:
            records.pop()
        records.append((step, record))
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for step, record in records:
        for name, value in record.items():
            if value is None or isinstance(value, (int, float)):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(math.nan if value is None else float(value))
    return curves


def _drop_unfinished_line(path: Path) -> None:
    """Cuts off what a killed run could not write to its end."""
    written = path.read_bytes() if path.exists() else b""
    whole = written.rfind(b"\n") + 1
    if whole < len(written):
        with path.open("r+b") as file:
            file.truncate(whole)


def _event_writer(run_dir: Path) -> Any:
    global _told
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        if not _told:
            _told = True
            warnings.warn(
                "tensorboard is not installed, so only metrics.jsonl is written; "
                "pip install 'automagic-cameamp[dashboards]' brings it",
                stacklevel=4,
            )
        return None
    return EventFileWriter(str(run_dir))
