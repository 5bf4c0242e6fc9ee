"""Which runs there are, the most important first: a pure function of the results so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.evidence import variants
from benchmarks.evidence.variants import (
    ADAMW,
    CAUTIOUS,
    CLIPPED,
    CORRECTED,
    JAX,
    LADDER,
    OTHERS,
    OURS,
    PAIRED_SEEDS,
    PARTS,
    PLAIN,
    PROFILES,
    RIVALS,
    SEEDS,
    STAGED,
    START,
    THIRTY_TWO,
    TUNED,
    VARIANTS,
    Variant,
    seeds_of,
)


class Spec(NamedTuple):
    """One run; `lr` is the number that the variant starts from, `Variant.knob`."""

    job: str
    variant: str
    lr: float
    seed: int


class Place(NamedTuple):
    """What the plan knows of a job.

    Attributes:
        rate: around which its grids begin.
        framework: `variants.TORCH` or `variants.JAX`.
        core: whether it gets every comparison; the others get the claim alone.
        pictured: whether it is in the picture.
    """

    rate: float
    framework: str = variants.TORCH
    core: bool = True
    pictured: bool = False


Losses = Mapping[Spec, float]
"""Final validation losses of the runs that are done; infinite where a run diverged."""
Places = Mapping[str, Place]
"""By name, in the order of running."""


def search(losses: Losses, job: str, variant: str, centre: float) -> list[Spec]:
    """The runs that find a variant's rate, as far as they are known, all of seed 0.

    Three rungs of `LADDER` around `centre`; while the best rate lies at an end, one more beyond it.
    """
    middle = LADDER.index(centre)
    runs = [Spec(job, variant, lr, SEEDS[0]) for lr in LADDER[middle - 1 : middle + 2]]
    while all(run in losses for run in runs):
        rates = [run.lr for run in runs]
        further = _beyond(rates, min(runs, key=lambda run: losses[run]).lr)
        if further is None:
            break
        runs.append(Spec(job, variant, further, SEEDS[0]))
    return runs


def best_rate(losses: Losses, job: str, variant: str, centre: float) -> float | None:
    """The rate with the lowest loss on seed 0, or None while the search is not done.

    Runs of the ladder beyond the search count too: the picture has them.
    """
    if any(run not in losses for run in search(losses, job, variant, centre)):
        return None
    done = {lr: losses[run] for lr in LADDER if (run := Spec(job, variant, lr, SEEDS[0])) in losses}
    return min(done, key=lambda lr: done[lr])


def _beyond(rates: Sequence[float], best: float) -> float | None:
    """The next rate outside `rates` where `best` is one of their ends and there is one."""
    if best == min(rates):
        return max((lr for lr in LADDER if lr < best), default=None)
    if best == max(rates):
        return min((lr for lr in LADDER if lr > best), default=None)
    return None


def plan(losses: Losses, places: Places, known: bool = True) -> list[Spec]:
    """All runs, each once, in order of importance; done ones too.

    Args:
        losses: of the runs that are done.
        places: the jobs.
        known: leaves out what depends on a best rate that is not known yet; else the middle of the grid stands for it,
            so that the length of the plan says how much there is to do.
    """
    core = [job for job, place in places.items() if place.core]
    derived = [job for job, place in places.items() if not place.core]
    in_torch = [job for job in core if places[job].framework != JAX]

    def best(job: str, variant: Variant) -> Iterator[float]:
        found = best_rate(losses, job, variant.name, places[job].rate)
        if found is not None or not known:
            yield places[job].rate if found is None else found

    def tuned(job: str, variant: Variant) -> Iterator[Spec]:
        yield from search(losses, job, variant.name, places[job].rate)
        yield from (Spec(job, variant.name, lr, seed) for lr in best(job, variant) for seed in seeds_of(job))

    def started(job: str, variant: Variant) -> Iterator[Spec]:
        return (Spec(job, variant.name, lr, seed) for lr in variant.starts for seed in seeds_of(job))

    def as_meant(job: str, variant: Variant) -> Iterator[Spec]:
        return tuned(job, variant) if variant.tuned else started(job, variant)

    def at_tuned_rate(job: str, variant: Variant) -> Iterator[Spec]:
        return (Spec(job, variant.name, lr, seed) for lr in best(job, TUNED) for seed in SEEDS)

    def curve(job: str, variant: Variant) -> Iterator[Spec]:
        return (Spec(job, variant.name, lr, SEEDS[0]) for lr in variant.curve)

    def each(
        jobs: Iterable[str], some: Iterable[Variant], runs: Callable[[str, Variant], Iterator[Spec]]
    ) -> list[Spec]:
        return [
            spec
            for variant in some
            for job in jobs
            if places[job].framework != JAX or variant.in_jax
            for spec in runs(job, variant)
        ]

    def pairs(job: str, partner: Variant) -> Iterator[Spec]:
        name = partner.name.removesuffix(THIRTY_TWO)
        # What the interval needs on the cheapest job; on the others the default profile alone.
        seeds = PAIRED_SEEDS if job == core[0] else SEEDS if name == OURS.name else ()
        return (Spec(job, each_name, START, seed) for seed in seeds for each_name in (name, partner.name))

    staged = [PLAIN, *(variant for pair in STAGED.values() for variant in pair)]
    with_adapters = [job for job in in_torch if places[job].pictured]
    runs = [
        *each(core, (ADAMW, OURS, *RIVALS), as_meant),
        *each(core, (TUNED, CAUTIOUS), tuned),
        *each(in_torch, PARTS, at_tuned_rate),
        *each(derived, (ADAMW,), as_meant),
        *each(derived, (OURS,), started),
        *each(derived, [rival for rival in RIVALS if rival is not CORRECTED], as_meant),
        *each([job for job in core if places[job].pictured], (ADAMW, OURS, *RIVALS), curve),
        *each(derived, (TUNED, CAUTIOUS), tuned),
        *each(with_adapters, [VARIANTS[name + THIRTY_TWO] for name in PROFILES], pairs),
        *each(with_adapters, staged, at_tuned_rate),
        *each(with_adapters, (CLIPPED, *OTHERS), as_meant),
    ]
    return list(dict.fromkeys(runs))


def chosen(
    places: Places, names: Sequence[str], seeds: Sequence[int] | None, starts: Sequence[float] | None
) -> Callable[..., list[Spec]]:
    """A plan of some variants only, on the seeds and from the starts given; without them on those of the plan."""

    def some(losses: Losses, places: Places = places, known: bool = True) -> list[Spec]:
        if starts is not None:
            pairs = [(name, start) for name in names for start in starts]
            return [Spec(job, *pair, seed) for job in places for pair in pairs for seed in seeds or SEEDS]
        runs = plan(losses, places, known)
        return [run for run in runs if run.variant in names and (seeds is None or run.seed in seeds)]

    return some
