"""The report's first table: from every start at most 2 % above tuned AdamW, and at or below all rivals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from benchmarks.evidence import markdown
from benchmarks.evidence.markdown import MISSING
from benchmarks.evidence.results import Results
from benchmarks.evidence.variants import ADAMW, CAUTIOUS, OURS, RIVALS, STARTS, TUNED, Variant, seeds_of

MOST_ABOVE = 0.02
"""What a start may end above AdamW at its best rate."""
OVERFIT = 0.01
"""A last loss this far above the best one is told."""


def relative(results: Results, job: str, variant: Variant, lr: float | None = None) -> float | None:
    """Mean final loss over the seeds against tuned AdamW's: 0.01 is 1 % above; None while runs are missing."""
    found, reference = results.loss(job, variant.name, lr), results.loss(job, ADAMW.name)
    if found is None or reference is None:
        return None
    return found.mean / reference.mean - 1 if math.isfinite(found.mean) else math.inf


def from_starts(results: Results, job: str) -> dict[float, float]:
    """Ours by start, where it is known."""
    found = {lr: relative(results, job, OURS, lr) for lr in STARTS}
    return {lr: value for lr, value in found.items() if value is not None}


def claim_table(results: Results, jobs: Sequence[str]) -> str:
    """One row a job, all in percent against AdamW; what does not hold is bold."""
    headings = ["", "AdamW (rate)", *(f"{OURS.title} from {lr:g}" for lr in STARTS), *(rival.title for rival in RIVALS)]
    rows = []
    for job in jobs:
        reference, rate = results.loss(job, ADAMW.name), results.rate(job, ADAMW.name)
        said = MISSING if reference is None else f"{reference.mean:.4f} ({rate:g})"
        ours = from_starts(results, job)
        cells = [_cell(ours.get(lr), ours.get(lr, 0.0) > MOST_ABOVE) for lr in STARTS]
        for rival in RIVALS:
            theirs = relative(results, job, rival)
            cells.append(_cell(theirs, theirs is not None and bool(ours) and theirs < max(ours.values())))
        cautious, tuned = (relative(results, job, variant) for variant in (CAUTIOUS, TUNED))
        cells += [_cell(cautious, False), _cell(tuned, tuned is not None and tuned > min(0.0, cautious or 0.0))]
        rows.append([f"`{job}`", said, *cells])
    return markdown.table([*headings, CAUTIOUS.title, TUNED.title], rows)


def _cell(value: float | None, fails: bool) -> str:
    if value is None:
        return MISSING
    said = f"{100 * value:+.1f}" if math.isfinite(value) else "diverged"
    return f"**{said}**" if fails else said


def verdicts(results: Results, jobs: Sequence[str]) -> Iterator[str]:
    """What holds and what does not, in a sentence a part of the claim."""
    starts = {(job, lr): value for job in jobs for lr, value in from_starts(results, job).items()}
    if starts:
        beyond = [(job, f"{lr:g}") for (job, lr), value in starts.items() if value > MOST_ABOVE]
        said = {job: markdown.listed([lr for of, lr in beyond if of == job]) for job, _ in beyond}
        far = f"; not {markdown.listed([f'{job} from {rates}' for job, rates in said.items()])}" if beyond else ""
        yield f"At most 2 % above tuned AdamW: {len(starts) - len(beyond)} of {len(starts)} jobs and starts{far}."
    for rival in RIVALS:
        known = {job: relative(results, job, rival) for job in jobs}
        told = {job: value for job, value in known.items() if value is not None and from_starts(results, job)}
        lost = [job for job, value in told.items() if value < max(from_starts(results, job).values())]
        if told:
            below = f"; it is below our worst start on {_on(lost, len(told))}" if lost else ""
            yield f"At or below {rival.title} from every start: {len(told) - len(lost)} of {len(told)} jobs{below}."
    for other in (ADAMW, CAUTIOUS):
        both = {job: (relative(results, job, TUNED), relative(results, job, other)) for job in jobs}
        pairs = {job: ours - theirs for job, (ours, theirs) in both.items() if ours is not None and theirs is not None}
        lost = [job for job, difference in pairs.items() if difference > 0]
        if pairs:
            above = f"; not on {_on(lost, len(pairs))}" if lost else ""
            held = f"{len(pairs) - len(lost)} of {len(pairs)}"
            yield f"Tuned and without search at or below {other.title}: {held} jobs{above}."


def overfitting(results: Results, jobs: Sequence[str]) -> Iterator[str]:
    """Last and best losses where AdamW or ours ends above its best.

    There, and where a start of ours ends too high, ours with and without the search.
    """
    methods = (ADAMW, CAUTIOUS, TUNED, OURS, *RIVALS)
    found = {job: {variant.name: _last_and_best(results, job, variant) for variant in methods} for job in jobs}
    ours = (ADAMW.name, TUNED.name, OURS.name)
    chosen = [job for job, by_name in found.items() if any(_overfits(by_name[name]) for name in ours)]
    rows = []
    for variant in methods:
        pairs = [found[job][variant.name] for job in chosen]
        if any(pairs):
            cells = (MISSING if pair is None else f"{pair[0]:.4f} / {pair[1]:.4f}" for pair in pairs)
            rows.append([variant.title, *cells])
    if chosen:
        yield markdown.table(["last / best", *(f"`{job}`" for job in chosen)], rows)
    else:
        yield "On no job does AdamW or ours end more than 1 % above its best loss."
    for job in jobs:
        if job not in chosen and max(from_starts(results, job).values(), default=0.0) <= MOST_ABOVE:
            continue
        tuned, searched = relative(results, job, TUNED), relative(results, job, OURS)
        seeds, runs = seeds_of(job), results.by_seed(job, OURS.name)
        rates = [runs[seed]["found_rate"] for seed in seeds if seed in runs and runs[seed]["found_rate"] is not None]
        if tuned is not None and searched is not None and rates:
            yield (
                f"On `{job}`, in percent against AdamW at its best rate: ours at its own best rate, "
                f"{results.rate(job, TUNED.name):g}, without search {_cell(tuned, False)}; from the start "
                f"{results.rate(job, OURS.name):g}, where the search finds {min(rates):.2g} to {max(rates):.2g}, "
                f"{_cell(searched, False)}."
            )


def _last_and_best(results: Results, job: str, variant: Variant) -> tuple[float, float] | None:
    last, best = (results.loss(job, variant.name, which=which) for which in ("loss", "best"))
    return None if last is None or best is None or not math.isfinite(last.mean) else (last.mean, best.mean)


def _overfits(pair: tuple[float, float] | None) -> bool:
    return pair is not None and pair[0] > (1 + OVERFIT) * pair[1]


def _on(lost: Sequence[str], of: int) -> str:
    return "all" if len(lost) == of else markdown.listed(lost)
