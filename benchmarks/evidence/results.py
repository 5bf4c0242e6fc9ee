"""The records as the report asks for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.evidence.plan import Spec, best_rate
from benchmarks.evidence.statistics import Summary, summary
from benchmarks.evidence.store import Record, losses
from benchmarks.evidence.variants import LADDER, SEEDS, STRONG, THIRTY_TWO


class Results:
    """All records, by job, variant, rate and seed."""

    def __init__(self, records: Mapping[Spec, Record]) -> None:
        self.records = records
        self.losses = losses(records)

    def rate(self, job: str, variant: str) -> float | None:
        """The rate at which a variant is compared: its best, or that of the variant it is a partner of."""
        if variant.endswith(STRONG):
            variant = "balanced"
        return best_rate(self.losses, job, variant.removesuffix(THIRTY_TWO))

    def at_end(self, job: str, variant: str) -> bool:
        """Whether the best rate is the last one of the ladder, so that there may be better ones beyond it."""
        return self.rate(job, variant) in (LADDER[0], LADDER[-1])

    def by_seed(self, job: str, variant: str, lr: float | None = None) -> dict[int, Record]:
        """Records at a rate, by default that of `rate`; empty where it is not known yet."""
        rate = self.rate(job, variant) if lr is None else lr
        found = {spec.seed: record for spec, record in self.records.items() if spec[:3] == (job, variant, rate)}
        return dict(sorted(found.items()))

    def losses_by_seed(self, job: str, variant: str, lr: float | None = None) -> dict[int, float]:
        """Final losses as `by_seed`; infinite where a run diverged."""
        return {seed: final_loss(record) for seed, record in self.by_seed(job, variant, lr).items()}

    def loss(self, job: str, variant: str, seeds: Sequence[int] = SEEDS) -> Summary | None:
        """Over the seeds, or None while one of them is missing."""
        found = self.losses_by_seed(job, variant)
        return summary([found[seed] for seed in seeds]) if found.keys() >= set(seeds) else None

    def measured(self, job: str, variant: str, name: str, lr: float | None = None) -> dict[int, float]:
        """One of `measures.measures`, by seed; runs that diverged have none."""
        found = self.by_seed(job, variant, lr)
        return {seed: record["measures"][name] for seed, record in found.items() if record["measures"]}

    def over_rates(self, job: str, variant: str) -> dict[float, Record]:
        """The records of seed 0 by rate, rising."""
        found = {
            spec.lr: record for spec, record in self.records.items() if spec[:2] + spec[3:] == (job, variant, SEEDS[0])
        }
        return dict(sorted(found.items()))


def final_loss(record: Record) -> float:
    """Infinite where the run diverged."""
    return math.inf if record["loss"] is None else float(record["loss"])
