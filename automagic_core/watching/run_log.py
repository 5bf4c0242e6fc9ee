"""Writes a run's statistics as JSON lines and as TensorBoard's event files, and reads them."""

from __future__ import annotations

import json
import math
import operator
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

FILE_NAME = "metrics.jsonl"

_told = False


class RunLog:
    """Adds records of scalars to the files in a run's folder.

    Args:
        run_dir: the folder; it is made if it is missing.  None writes nothing, but is due at the same steps.
        every: steps between two records.
        tensorboard: write event files too.  If the package `tensorboard` is missing, a warning says so once.

    Raises:
        ValueError: `every` is no integer of at least 1.
    """

    def __init__(self, run_dir: str | Path | None, every: int = 100, *, tensorboard: bool = True) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every = {every!r} is not valid; valid: an integer of at least 1")
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.every = every
        self._wrote = False
        self._events = None
        if self.run_dir is not None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            _drop_unfinished_line(self.run_dir / FILE_NAME)
            self._events = _event_writer(self.run_dir) if tensorboard else None

    def is_due(self, step: int) -> bool:
        """Whether `step` is the first one or a multiple of `every`."""
        return not self._wrote or step % self.every == 0

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Adds one record; it is on disk when this returns.

        Args:
            step: how many steps are over.  A run that goes back writes a step again; readers take the last record.
            record: scalars by name.  A value that is not finite is written as null.

        Raises:
            TypeError: `step` is no integer.
        """
        step = operator.index(step)  # may be a number of numpy or JAX
        self._wrote = True
        if self.run_dir is None:
            return
        plain = {name: value if math.isfinite(value) else None for name, value in record.items()}
        line = json.dumps({"step": step, **plain}, allow_nan=False) + "\n"
        with (self.run_dir / FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(line)
        if self._events is not None:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary

            values = [Summary.Value(tag=name, simple_value=value) for name, value in record.items()]
            self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._events.flush()

    def close(self) -> None:
        """Closes the event file; the file of JSON lines is never left open."""
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
    """Reads the records of a run as curves.

    Args:
        run: its folder, or the file in it.

    Returns:
        By name, the steps in rising order and the values; NaN for values that were not finite.  Where the run went back
        to an earlier step, the older records from there on are left out.  So is an incomplete last line.

    Raises:
        FileNotFoundError: there is no file of records.
        ValueError: the file is no text, or a line is no record; the message has its number.
    """
    path = Path(run)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a MetricsLogger writes it")
    records: list[tuple[int, dict[str, Any]]] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no log of a run, since it is no text in UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines):  # incomplete: no newline follows
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
    """Removes an incomplete last line, which a killed run may leave."""
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
