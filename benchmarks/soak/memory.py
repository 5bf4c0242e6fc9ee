"""The memory of this process while it trains, and whether it stays flat."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

LIMIT = 0.01
"""The largest growth that counts as flat, relative to the memory held when a quarter of the steps was over."""

_STATUS = Path("/proc/self/status")


class Sample(NamedTuple):
    """What the process held after `step` steps.

    Attributes:
        step: steps that were over.
        resident: bytes in memory, files that are mapped into it included.
        own: those of them that belong to no file, where a leak would be.
        objects: how many objects Python's garbage collector watches.
    """

    step: int
    resident: int
    own: int
    objects: int


def sample(step: int) -> Sample:
    """Measures now, after a garbage collection.  The C library keeps what it keeps: that is part of the memory held.

    Raises:
        OSError: there is no /proc, as outside Linux.
    """
    gc.collect()
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    resident, own = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
    return Sample(step, resident, own, len(gc.get_objects()))


class Drift(NamedTuple):
    """From the first quarter to the end of a run.

    Attributes:
        resident, own, objects: growth relative to the first quarter.
        resident_bytes: held at the end.
        own_bytes_per_step: growth of `own` between the two.
    """

    resident: float
    own: float
    objects: float
    resident_bytes: int
    own_bytes_per_step: float

    @property
    def flat(self) -> bool:
        """Neither the memory nor the objects grew by more than `LIMIT`."""
        return max(self.resident, self.own, self.objects) < LIMIT


def drift(samples: Sequence[Sample], steps: int) -> Drift:
    """Medians of the samples in the second eighth of the run against those in its last eighth.

    Args:
        samples: in rising order of steps; there are some in both parts.
        steps: the length of the run.

    Raises:
        ValueError: one of the parts has no sample.
    """
    early = [s for s in samples if steps / 8 < s.step <= steps / 4]
    late = [s for s in samples if steps * 7 / 8 < s.step <= steps]
    if not early or not late:
        raise ValueError(f"{len(samples)} samples of {steps} steps: none in the second eighth, or none in the last")
    before, after = ([median(values) for values in zip(*part, strict=True)] for part in (early, late))
    resident, own, objects = (b / a - 1 for a, b in zip(before[1:], after[1:], strict=True))
    per_step = (after[2] - before[2]) / (after[0] - before[0])
    return Drift(resident, own, objects, int(after[1]), per_step)
