"""Which runs there are: a pure function of the results so far."""

from __future__ import annotations

from benchmarks.evidence.plan import Losses, Places, Spec, best_rate, search
from benchmarks.evidence.variants import ADAMW, OURS, TUNED, VARIANTS

SEEDS = (0, 1)
STARTS = OURS.starts
PRODIGY = VARIANTS["prodigy"]


def plan(losses: Losses, places: Places, known: bool = True) -> list[Spec]:
    """All runs, each once, job by job; done ones too.

    Args:
        losses, places, known: as for `benchmarks.evidence.plan.plan`.
    """
    runs: list[Spec] = []
    for job, place in places.items():
        for variant in (ADAMW, TUNED):
            runs += search(losses, job, variant.name, place.rate)
            best = best_rate(losses, job, variant.name, place.rate)
            if best is None and not known:
                best = place.rate
            if best is not None:
                runs += [Spec(job, variant.name, best, seed) for seed in SEEDS]
        for variant in (OURS, PRODIGY):
            runs += [Spec(job, variant.name, start, seed) for start in variant.starts for seed in SEEDS]
    return list(dict.fromkeys(runs))
