"""The report's part on final losses: every variant at its best rate, and what its rate does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from benchmarks.evidence import markdown
from benchmarks.evidence.jobs import JOBS
from benchmarks.evidence.markdown import MISSING
from benchmarks.evidence.results import Results, final_loss
from benchmarks.evidence.statistics import differences, summary
from benchmarks.evidence.variants import EXTRA, MAIN, SEEDS, VARIANTS

REFERENCE = "adamw"


def loss_table(results: Results, jobs: Sequence[str]) -> str:
    """Mean ± spread of the final loss and the rate it was reached at, one row a variant, one column a job."""
    rows = []
    for variant in (*MAIN, *EXTRA):
        cells = []
        for job in jobs:
            rate, loss = results.rate(job, variant.name), results.loss(job, variant.name)
            cells.append(MISSING if rate is None or loss is None else f"{markdown.spread(loss)} ({rate:g})")
        rows.append([variant.title, *cells])
    return markdown.table(["", *(JOBS[job].title for job in jobs)], rows)


def against_adamw(results: Results, jobs: Sequence[str]) -> Iterator[str]:
    """A sentence a job: who ends below AdamW by more than the spread, who above, who neither."""
    for job in jobs:
        below, above, level = [], [], []
        for variant in (*MAIN, *EXTRA):
            ours, theirs = results.loss(job, variant.name), results.loss(job, REFERENCE)
            if variant.name == REFERENCE or ours is None or theirs is None:
                continue
            by_seed = (results.losses_by_seed(job, name) for name in (variant.name, REFERENCE))
            pairs = summary(differences(*({seed: found[seed] for seed in SEEDS} for found in by_seed)))
            limit = max(ours.spread, theirs.spread)
            # A variant that diverged has an infinite spread and must not count as level.
            if not math.isfinite(pairs.mean) or pairs.mean > limit:
                above.append(variant.title)
            elif pairs.mean < -limit:
                below.append(variant.title)
            else:
                level.append(variant.title)
        groups = (("below it", below), ("above it", above), ("within the spread", level))
        said = "; ".join(f"{where}: {markdown.listed(names)}" for where, names in groups if names)
        if said:
            yield f"**{JOBS[job].title}**, against AdamW at its best rate. {said[0].upper()}{said[1:]}."


def further(results: Results, jobs: Sequence[str]) -> Iterator[str]:
    """What else a job measured, mean over the seeds, in one sentence a job and figure."""
    for job in jobs:
        found: dict[str, list[str]] = {}
        for variant in MAIN:
            runs = [record["further"] for record in results.by_seed(job, variant.name).values()]
            for name in runs[0] if runs and all(runs) else ():
                mean = sum(run[name] for run in runs) / len(runs)
                found.setdefault(name, []).append(f"{variant.title} {mean:.3f}")
        for name, said in found.items():
            yield f"{JOBS[job].title}, held-out {name}: {', '.join(said)}."


def rates_at_ends(results: Results, jobs: Sequence[str]) -> Iterator[str]:
    """A sentence for each variant whose best rate is the last that was tried."""
    for job in jobs:
        for variant in (*MAIN, *EXTRA):
            if results.at_end(job, variant.name):
                rate = results.rate(job, variant.name)
                yield f"{variant.title} on {job}: the best rate, {rate:g}, is the last that was tried."


def rate_table(results: Results, job: str) -> str:
    """Loss of seed 0 against the starting rate for AdamW and `balanced`, and the rate that the mask found."""
    adamw, ours = results.over_rates(job, REFERENCE), results.over_rates(job, "balanced")
    rates = sorted(adamw.keys() | ours.keys())
    rows = [
        ["AdamW", *(markdown.number(final_loss(adamw[lr]), 3) if lr in adamw else MISSING for lr in rates)],
        ["`balanced`", *(markdown.number(final_loss(ours[lr]), 3) if lr in ours else MISSING for lr in rates)],
        ["the rate it found", *(f"{ours[lr]['found_rate']:.2g}" if lr in ours else MISSING for lr in rates)],
    ]
    return markdown.table([JOBS[job].title, *(f"{lr:g}" for lr in rates)], rows)


def robustness(results: Results, job: str) -> str | None:
    """From how many starting rates each ends close to the best of both, in words."""
    curves = {name: results.over_rates(job, name) for name in (REFERENCE, "balanced")}
    shared = sorted(curves[REFERENCE].keys() & curves["balanced"].keys())
    if not shared:
        return None
    found = {name: {lr: final_loss(curve[lr]) for lr in shared} for name, curve in curves.items()}
    best = min(loss for losses in found.values() for loss in losses.values())
    close = {name: sum(loss <= 1.05 * best for loss in losses.values()) for name, losses in found.items()}
    return (
        f"{JOBS[job].title}: within 5 % of the lowest loss of both ({best:.4f}) end {close['balanced']} of "
        f"{len(shared)} starting rates of `balanced` and {close[REFERENCE]} of AdamW's."
    )


def memory_table(results: Results, jobs: Sequence[str]) -> str:
    """State in percent of Adam's after the last step, and the share of the parameters with 8-bit states."""
    rows = []
    for variant in MAIN:
        if variant.name.startswith("balanced-"):
            continue
        cells = []
        for job in jobs:
            runs = list(results.by_seed(job, variant.name).values())
            cells.append(
                f"{100 * runs[0]['state_bytes'] / runs[0]['adam_bytes']:.0f} % ({100 * runs[0]['share_8bit']:.0f} %)"
                if runs
                else MISSING
            )
        rows.append([VARIANTS[variant.name].title, *cells])
    return markdown.table(["", *(JOBS[job].title for job in jobs)], rows)
