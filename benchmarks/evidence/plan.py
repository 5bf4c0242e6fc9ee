"""Which runs there are, the most important first: a pure function of the results so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.evidence.variants import (
    EXTRA,
    GRID,
    LADDER,
    MAIN,
    PAIRED_SEEDS,
    PROFILES,
    SEEDS,
    STAGES,
    STRONG_STAGES,
    THIRTY_TWO,
    WIDER,
)


class Spec(NamedTuple):
    """One run."""

    job: str
    variant: str
    lr: float
    seed: int

    @property
    def file_name(self) -> str:
        """Below the job's folder."""
        return f"{self.variant}-lr{self.lr:g}-s{self.seed}.json"


Losses = Mapping[Spec, float]
"""Final validation losses of the runs that are done; infinite where a run diverged."""


def search(losses: Losses, job: str, variant: str) -> list[Spec]:
    """The runs that find a variant's rate, as far as they are known: the grid on seed 0, and what extends it.

    While the best rate lies at an end, the search goes on beyond it along `LADDER`.
    """
    runs = [Spec(job, variant, lr, SEEDS[0]) for lr in GRID]
    while all(run in losses for run in runs):
        rates = [run.lr for run in runs]
        further = _beyond(rates, min(runs, key=lambda run: losses[run]).lr)
        if further is None:
            break
        runs.append(Spec(job, variant, further, SEEDS[0]))
    return runs


def best_rate(losses: Losses, job: str, variant: str) -> float | None:
    """The rate with the lowest loss on seed 0, or None while the search is not done."""
    runs = search(losses, job, variant)
    return min(runs, key=lambda run: losses[run]).lr if all(run in losses for run in runs) else None


def _beyond(rates: Sequence[float], best: float) -> float | None:
    """The next rate outside `rates` where `best` is one of their ends and there is one."""
    if best == min(rates):
        return max((lr for lr in LADDER if lr < best), default=None)
    if best == max(rates):
        return min((lr for lr in LADDER if lr > best), default=None)
    return None


def plan(losses: Losses, jobs: Sequence[str], guess: float | None = None) -> list[Spec]:
    """All runs that are known by now, each once, in order of importance; done ones too.

    Args:
        losses: of the runs that are done.
        jobs: by name, the cheapest first.
        guess: stands for best rates that are not known yet, so that the length of the plan says how much there is to
            do; None leaves out what depends on them.
    """

    def best(job: str, variant: str) -> Iterator[float]:
        found = best_rate(losses, job, variant)
        if found is not None or guess is not None:
            yield found if found is not None else guess  # type: ignore[misc]

    def each(names: Iterable[str], runs: Callable[[str, str], Iterable[Spec]]) -> Iterator[Spec]:
        for name in names:
            for job in jobs:
                yield from runs(job, name)

    def seeds(job: str, name: str) -> Iterator[Spec]:
        return (Spec(job, name, lr, seed) for lr in best(job, name) for seed in SEEDS)

    def pairs(job: str, profile: str) -> Iterator[Spec]:
        seeds = PAIRED_SEEDS if job == jobs[0] else SEEDS
        for lr in best(job, profile):
            for seed in seeds:
                yield from (Spec(job, name, lr, seed) for name in (profile, profile + THIRTY_TWO))

    def curve(job: str, name: str) -> Iterator[Spec]:
        return (Spec(job, name, lr, SEEDS[0]) for lr in WIDER)

    def at_rate_of_balanced(job: str, name: str) -> Iterator[Spec]:
        return (Spec(job, name, lr, seed) for lr in best(job, "balanced") for seed in SEEDS)

    main = [variant.name for variant in MAIN]
    extra = [variant.name for variant in EXTRA]
    stages = [f"balanced-no-{stage}" for stage in STAGES]
    strong = [variant.name for variant in STRONG_STAGES]
    runs = [
        *each(main, lambda job, name: search(losses, job, name)),
        *each(main, seeds),
        *each(PROFILES, pairs),
        *each(("balanced", "adamw"), curve),
        *each(stages, at_rate_of_balanced),
        *each(strong, at_rate_of_balanced),
        *each(extra, lambda job, name: search(losses, job, name)),
        *each(extra, seeds),
    ]
    return list(dict.fromkeys(runs))
