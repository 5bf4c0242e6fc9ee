"""Where bases and results lie: files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.jobs import Base, Job
from benchmarks.evidence.plan import Losses, Place, Spec
from benchmarks.evidence.settings import MAX_LR, RAMP_SHARE, WARM_UP_SHARE, WEIGHT_DECAY
from benchmarks.evidence.variants import VARIANTS

FOLDER = Path("benchmarks/results/evidence")
"""Under version control, but for the bases, so that the report can be written anew without a run."""

Record = dict[str, Any]
"""What is kept of one run; `training.train` says what is in it."""


class Store:
    """Results below a folder.

    Args:
        folder: bases go to `base/`, results to `<job>.jsonl`, one line a run.
        settings: of each job by name, as `settings_of`; a result under others is as good as missing.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder = folder
        self.settings = settings

    def write(self, *records: Record) -> None:
        """Keeps results, each in place of an earlier one of the same run."""
        new = {spec_of(record): record for record in records}
        for job in sorted({spec.job for spec in new}):
            path = self.folder / f"{job}.jsonl"
            kept = {spec_of(old): old for old in _lines(path)}
            kept |= {spec: record for spec, record in new.items() if spec.job == job}
            lines = [json.dumps(kept[spec], allow_nan=False) + "\n" for spec in sorted(kept)]
            _whole(path, partial(Path.write_text, data="".join(lines)))

    def records(self) -> dict[Spec, Record]:
        """All results of variants as they are now, under the present settings."""
        found = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for record in _lines(path):
                variant = VARIANTS.get(record["variant"])
                same = record["settings"] == self.settings.get(record["job"])
                if same and variant is not None and record["fields"] == dict(variant.fields):
                    found[spec_of(record)] = record
        return found


def settings_of(job: Job) -> dict[str, Any]:
    """Every number, but for the variant's own, that decides a run's result."""
    common = {"weight_decay": WEIGHT_DECAY, "max_lr": MAX_LR, "warm_up": WARM_UP_SHARE, "ramp": RAMP_SHARE}
    return {**job.settings(), **common}


def place_of(job: Job) -> Place:
    """What the plan knows of a job."""
    return Place(job.rate, job.framework, core=not job.variation, pictured=job.pictured and not job.variation)


def spec_of(record: Record) -> Spec:
    """Which run a record is of."""
    return Spec(record["job"], record["variant"], record["lr"], record["seed"])


def losses(records: Mapping[Spec, Record]) -> Losses:
    """Final losses; a diverged run's is infinite."""
    return {spec: math.inf if record["loss"] is None else record["loss"] for spec, record in records.items()}


def base_of(job: Job, folder: Path) -> Base:
    """The job's base, made if it is not there under the job's present settings."""
    digest = hashlib.sha256(json.dumps(job.base_settings(), sort_keys=True).encode()).hexdigest()[:8]
    path = folder / "base" / f"{job.family}-{digest}.pt"
    if not path.exists():
        base = job.build_base()
        _whole(path, lambda temporary: torch.save(base, temporary))
    loaded: Base = torch.load(path, weights_only=True, mmap=True)
    return loaded


_RUNS = ("benchmarks/evidence/jobs", "benchmarks/evidence/rivals")


@cache
def code_version() -> str:
    """A digest of the sources that decide a result: the optimizer's, the jobs' and the others'."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _sources() -> Iterator[Path]:
    root = Path(__file__).parents[2]
    for folder in (*("automagic_" + name for name in ("core", "torch", "optax")), *_RUNS):
        yield from sorted((root / folder).rglob("*.py"))


def _lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """An interrupted run leaves no half file: what is written gets its name when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
