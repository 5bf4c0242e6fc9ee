"""The records as the report asks for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.evidence.plan import Places, Spec, best_rate
from benchmarks.evidence.statistics import Summary, summary
from benchmarks.evidence.store import Record, losses
from benchmarks.evidence.variants import LADDER, PARTS, PLAIN, SEEDS, STAGED, START, TUNED, VARIANTS, seeds_of

AT_TUNED_RATE = {v.name for v in (*PARTS, PLAIN, *(variant for pair in STAGED.values() for variant in pair))}
"""Variants that run at the rate of another."""


class Results:
    """All records, by job, variant, start and seed."""

    def __init__(self, records: Mapping[Spec, Record], places: Places) -> None:
        self.records = records
        self.places = places
        self.losses = losses(records)

    def rate(self, job: str, variant: str) -> float | None:
        """The rate at which a variant is compared: the best of its grid, or its default start."""
        starts = VARIANTS[variant].starts
        if starts:
            return START if START in starts else starts[0]
        name = TUNED.name if variant in AT_TUNED_RATE else variant
        return best_rate(self.losses, job, name, self.places[job].rate)

    def at_end(self, job: str, variant: str) -> bool:
        """Whether the best rate is the last one of the ladder, so that there may be better ones beyond it."""
        return VARIANTS[variant].tuned and self.rate(job, variant) in (LADDER[0], LADDER[-1])

    def by_seed(self, job: str, variant: str, lr: float | None = None) -> dict[int, Record]:
        """Records from a start, by default that of `rate`; empty where it is not known yet."""
        rate = self.rate(job, variant) if lr is None else lr
        found = {spec.seed: record for spec, record in self.records.items() if spec[:3] == (job, variant, rate)}
        return dict(sorted(found.items()))

    def losses_by_seed(
        self, job: str, variant: str, lr: float | None = None, which: str = "loss", seeds: Sequence[int] = SEEDS
    ) -> dict[int, float]:
        """Final losses as `by_seed`, of the seeds given; infinite where a run diverged."""
        found = self.by_seed(job, variant, lr)
        return {seed: final_loss(record, which) for seed, record in found.items() if seed in seeds}

    def loss(self, job: str, variant: str, lr: float | None = None, which: str = "loss") -> Summary | None:
        """Over `seeds_of` the job, of the last or (`which` "best") the lowest loss; None while a seed is missing."""
        seeds = seeds_of(job)
        found = self.losses_by_seed(job, variant, lr, which, seeds)
        return summary([found[seed] for seed in seeds]) if found.keys() == set(seeds) else None

    def measured(self, job: str, variant: str, name: str) -> dict[int, float]:
        """One of `measures.measures`, by seed; runs that diverged have none."""
        found = self.by_seed(job, variant)
        return {seed: record["measures"][name] for seed, record in found.items() if record["measures"]}

    def over_starts(self, job: str, variant: str) -> dict[float, Record]:
        """The records of seed 0 by start, rising."""
        found = {
            spec.lr: record for spec, record in self.records.items() if spec[:2] + spec[3:] == (job, variant, SEEDS[0])
        }
        return dict(sorted(found.items()))


def final_loss(record: Record, which: str = "loss") -> float:
    """Infinite where the run diverged."""
    return math.inf if record["loss"] is None else float(record[which])
