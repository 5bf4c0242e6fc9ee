"""The report's part on the gradient stages: what each does to what it is for, and to the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.evidence import markdown
from benchmarks.evidence.jobs import JOBS
from benchmarks.evidence.markdown import MISSING
from benchmarks.evidence.results import Results
from benchmarks.evidence.statistics import Summary, differences, summary
from benchmarks.evidence.variants import PLAIN, STAGED, Variant

WHITE_NOISE_SHARE = 1 - math.pi * 0.3**2
"""Of the unit square of frequencies, what lies outside the circle of radius 0.3."""
WHITE_NOISE_EDGES = math.sqrt(1 + 1 + 1 + 1 + 4**2)
"""A normal variable times the norm of the stencil (1, 1, 1, 1, −4)."""


class Measure(NamedTuple):
    """A figure of `measures.measures` that a stage is meant to lower."""

    name: str
    title: str
    digits: int


MEASURES: dict[str, tuple[Measure, ...]] = {
    "edges": (
        Measure("edge_factors", "edge strength of A and B", 3),
        Measure("edge_product", "edge strength of BA", 3),
    ),
    "frequency": (
        Measure("frequency_factors", "energy above the cutoff of A and B", 4),
        Measure("frequency_product", "energy above the cutoff of BA", 4),
    ),
    "low-rank": (Measure("effective_rank", "effective rank of BA", 2),),
}


def measured(results: Results, job: str, variant: Variant, measure: Measure) -> Summary | None:
    """Over the seeds; None where nothing ran."""
    found = results.measured(job, variant.name, measure.name)
    return summary(list(found.values())) if found else None


def effect_table(results: Results, jobs: Sequence[str], stage: str) -> str:
    """One row a job and measure: without any stage, with this one alone, and with it at its stronger setting."""
    alone, strong = STAGED[stage]
    rows = []
    for job in jobs:
        for measure in MEASURES[stage]:
            cells = [measured(results, job, variant, measure) for variant in (PLAIN, alone, strong)]
            rows.append([JOBS[job].title, measure.title, *(markdown.spread(cell, measure.digits) for cell in cells)])
        losses = [_loss_change(results, job, variant) for variant in (alone, strong)]
        rows.append([JOBS[job].title, "loss, against the run without", MISSING, *(map(markdown.signed, losses))])
    return markdown.table(["job", "measure", "off", "default", strong.title.removeprefix("with ")], rows, left=2)


def effects(results: Results, jobs: Sequence[str], stage: str) -> Iterator[str]:
    """A sentence a measure, and one on the loss: on which jobs the stage changes it by more than the spread."""
    alone = STAGED[stage][0]
    for measure in MEASURES[stage]:
        by_job = {job: _change(*(results.measured(job, v.name, measure.name) for v in (alone, PLAIN))) for job in jobs}
        yield from _told(measure.title, by_job)
    yield from _told("loss", {job: _loss_change(results, job, alone) for job in jobs})


def _told(what: str, by_job: Mapping[str, Summary | None]) -> Iterator[str]:
    """On which jobs something falls, rises or stays, in one sentence."""
    known = {JOBS[job].name: change for job, change in by_job.items() if change is not None}
    groups: dict[str, list[str]] = {}
    for job, change in known.items():
        groups.setdefault(direction(change), []).append(job)
    if groups:
        said = "; ".join(f"{words} on {markdown.listed(names)}" for words, names in groups.items())
        yield f"With it the {what} {said}."


def direction(change: Summary) -> str:
    """What the difference of the runs with a stage and without it, seed by seed, says in words."""
    if not math.isfinite(change.mean):
        return "cannot be compared, since a run diverged,"
    if change.seeds < 2 or abs(change.mean) <= change.spread:
        return "does not change by more than the spread"
    return "is lower" if change.mean < 0 else "is higher"


def _change(with_it: Mapping[int, float], without: Mapping[int, float]) -> Summary | None:
    found = differences(with_it, without)
    return summary(found) if found else None


def _loss_change(results: Results, job: str, variant: Variant) -> Summary | None:
    return _change(*(results.losses_by_seed(job, v.name) for v in (variant, PLAIN)))
