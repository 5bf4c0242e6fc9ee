"""The report's parts on single methods: losses by start, what each part brings, memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from benchmarks.evidence import markdown
from benchmarks.evidence.jobs import JOBS
from benchmarks.evidence.markdown import MISSING
from benchmarks.evidence.results import Results, final_loss
from benchmarks.evidence.statistics import differences, summary
from benchmarks.evidence.variants import (
    ADAMW,
    CAUTIOUS,
    CLIPPED,
    OTHERS,
    OURS,
    PARTS,
    PROFILED,
    RIVALS,
    STARTS,
    TUNED,
    VARIANTS,
    Variant,
)

PLACES = 3


def start_table(results: Results, job: str) -> str:
    """Loss of seed 0 by start, one row a method, and the rates that ours found."""
    methods = (ADAMW, OURS, *RIVALS)
    curves = {variant.name: results.over_starts(job, variant.name) for variant in methods}
    starts = sorted({lr for curve in curves.values() for lr in curve})
    rows = []
    for variant in methods:
        curve = curves[variant.name]
        cells = [markdown.number(final_loss(curve[lr]), PLACES) if lr in curve else MISSING for lr in starts]
        rows.append([variant.title, variant.knob, *cells])
        if variant is OURS:
            rows.append(["the rate it found", "", *(_found(curve[lr]) if lr in curve else MISSING for lr in starts)])
    return markdown.table([JOBS[job].title, "start", *(f"{lr:g}" for lr in starts)], rows, left=2)


def _found(record: dict[str, object]) -> str:
    return MISSING if record["found_rate"] is None else f"{record['found_rate']:.2g}"


def part_table(results: Results, jobs: Sequence[str]) -> str:
    """Each part switched: final loss against the run with the defaults, seed by seed, at the same rate."""
    rows = []
    for part in PARTS:
        cells = []
        for job in jobs:
            found = _pairs(results, job, part, TUNED)
            if not found:
                cells.append(MISSING)
                continue
            change = summary(found)
            said = f"{100 * change.mean:+.2f} ± {100 * change.spread:.2f}"
            clear = abs(change.mean) > change.spread and change.seeds > 1
            cells.append("diverged" if not math.isfinite(change.mean) else f"**{said}**" if clear else said)
        rows.append([part.title, *cells])
    return markdown.table(["", *(JOBS[job].title for job in jobs)], rows)


def _pairs(results: Results, job: str, variant: Variant, reference: Variant) -> list[float]:
    both = (results.losses_by_seed(job, each.name) for each in (variant, reference))
    return differences(*both, relative=True)


def others_table(results: Results, jobs: Sequence[str]) -> str:
    """Mean ± spread of what is not part of the claim."""
    rows = []
    for variant in (ADAMW, *OTHERS, OURS, *PROFILED, CLIPPED):
        cells = [markdown.spread(results.loss(job, variant.name)) for job in jobs]
        rows.append([variant.title, *cells])
    return markdown.table(["", *(JOBS[job].title for job in jobs)], rows)


def further(results: Results, jobs: Sequence[str]) -> Iterator[str]:
    """What else a job measured, mean over the seeds, in one sentence a job and figure."""
    for job in jobs:
        found: dict[str, list[str]] = {}
        for variant in (ADAMW, CAUTIOUS, TUNED, OURS, *RIVALS):
            runs = [record["further"] for record in results.by_seed(job, variant.name).values()]
            for name in runs[0] if runs and all(runs) else ():
                mean = sum(run[name] for run in runs) / len(runs)
                found.setdefault(name, []).append(f"{variant.title} {mean:.3f}")
        for name, said in found.items():
            yield f"{JOBS[job].title}, held-out {name}: {', '.join(said)}."


def rates_at_ends(results: Results, jobs: Sequence[str]) -> Iterator[str]:
    """A sentence for each variant whose best rate is the last that was tried."""
    for job in jobs:
        for variant in VARIANTS.values():
            if results.at_end(job, variant.name):
                rate = results.rate(job, variant.name)
                yield f"{variant.title} on {job}: the best rate, {rate:g}, is the last that was tried."


def memory_table(results: Results, jobs: Sequence[str]) -> str:
    """State in percent of Adam's after the last step, the share of 8-bit states, and the time of a run."""
    rows = []
    for variant in (ADAMW, *OTHERS, OURS, *PROFILED, CAUTIOUS, *RIVALS):
        cells = []
        for job in jobs:
            runs = list(results.by_seed(job, variant.name, STARTS[0] if variant is OURS else None).values())
            cells.append(_memory(runs[0]) if runs else MISSING)
        rows.append([variant.title, *cells])
    return markdown.table(["", *(JOBS[job].title for job in jobs)], rows)


def _memory(record: dict[str, float]) -> str:
    held = f"{100 * record['state_bytes'] / record['adam_bytes']:.0f} %"
    return held + (f" ({100 * record['share_8bit']:.0f} %)" if record["share_8bit"] else "")
