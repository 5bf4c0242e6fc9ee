"""Writes docs/outside.md from the records: every figure in it is computed."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.evidence import markdown
from benchmarks.evidence.plan import Spec, best_rate
from benchmarks.evidence.results import final_loss
from benchmarks.evidence.settings import WARM_UP_SHARE
from benchmarks.evidence.statistics import summary
from benchmarks.evidence.store import Record, Store, losses, place_of
from benchmarks.evidence.training import CHECK_EVERY
from benchmarks.evidence.variants import ADAMW, LADDER, OURS, TUNED
from benchmarks.outside.jobs import JOBS, NEW
from benchmarks.outside.plan import PRODIGY, SEEDS, STARTS, plan

NEAR, FAR = 0.02, 0.05
"""Shares above AdamW's loss: up to the first the claim holds, above the second it fails clearly."""


class Outcome(NamedTuple):
    """What came of a job.

    Attributes:
        rate: AdamW's best.
        loss: AdamW's there, mean over the seeds.
        above: by start, ours against it: a share, infinite where a run diverged.  Starts with missing runs are absent.
        tuned: ours at its best rate, without a search; None: not run.
        prodigy: Prodigy's; None: not run.
        factor: the rate that ours found as a multiple of `rate`, geometric mean over starts and seeds; None: unknown.
        lowest: the lowest loss on the way, ours, mean over starts and seeds, against AdamW's; None: unknown.
    """

    rate: float
    loss: float
    above: Mapping[float, float]
    tuned: float | None
    prodigy: float | None
    factor: float | None
    lowest: float | None

    @property
    def worst(self) -> float | None:
        """From the worst start; None while one is missing."""
        return max(self.above.values()) if self.above.keys() == set(STARTS) else None


def outcome(records: Mapping[Spec, Record], job: str) -> Outcome | None:
    """The outcome of a job, or None while AdamW's runs are missing."""
    rate, theirs = _tuned(records, job, ADAMW.name)
    if rate is None or not theirs:
        return None
    loss = _mean(theirs)
    _, tuned = _tuned(records, job, TUNED.name)
    prodigy = _runs(records, job, PRODIGY.name, PRODIGY.starts[0])
    ours = {start: runs for start in STARTS if (runs := _runs(records, job, OURS.name, start))}
    every = [record for runs in ours.values() for record in runs]
    found = [record["found_rate"] for record in every if record["found_rate"]]
    whole = len(every) == len(STARTS) * len(SEEDS)
    return Outcome(
        rate,
        loss,
        {start: _mean(runs) / loss - 1 for start, runs in ours.items()},
        _mean(tuned) / loss - 1 if tuned else None,
        _mean(prodigy) / loss - 1 if prodigy else None,
        math.exp(sum(math.log(each / rate) for each in found) / len(found)) if whole and found else None,
        _mean(every, "best") / _mean(theirs, "best") - 1 if whole else None,
    )


def _tuned(records: Mapping[Spec, Record], job: str, variant: str) -> tuple[float | None, list[Record]]:
    """A variant's best rate, and its runs there."""
    rate = best_rate(losses(records), job, variant, JOBS[job].rate)
    return rate, [] if rate is None else _runs(records, job, variant, rate)


def _runs(records: Mapping[Spec, Record], job: str, variant: str, lr: float) -> list[Record]:
    """Those of all seeds, or none while one is missing."""
    specs = [Spec(job, variant, lr, seed) for seed in SEEDS]
    return [records[spec] for spec in specs] if all(spec in records for spec in specs) else []


def _mean(runs: Sequence[Record], which: str = "loss") -> float:
    return summary([final_loss(record, which) for record in runs]).mean


def write_report(store: Store, folder: Path) -> Path:
    """Writes outside.md; what has not run yet shows as a dash."""
    folder.mkdir(parents=True, exist_ok=True)
    records = {spec: record for spec, record in store.records().items() if spec.job in JOBS}
    outcomes = {job: outcome(records, job) for job in JOBS}
    parts = ["# Other jobs", *_introduction()]
    for title, jobs in (("Jobs that chose nothing", NEW), ("Jobs that were looked at", set(JOBS) - set(NEW))):
        of_part = {job: found for job, found in outcomes.items() if job in jobs}
        parts += [f"## {title}", *_verdicts(of_part), _table(of_part)]
    parts += ["## Notes", *_notes(), _generated(records)]
    path = folder / "outside.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _introduction() -> Iterator[str]:
    yield (
        f"The search for the rate was chosen on the jobs of [Evidence](evidence.md). These {len(JOBS)} are others. "
        f"They are small, and some are unlike what it is made for. {len(NEW)} of them chose nothing: they were written "
        "after the last change of the search, which was left as it was whatever they showed. The others were written "
        "before, and two rules of the search came from them: the least agreement from `train-on`, and what counts "
        "where gradients have shrunk from `vit`, `vae`, `lstm`, `few-images` and the two tables "
        "([what was tried](evidence.md#what-was-tried-and-rejected))."
    )
    seeds = markdown.listed([str(seed) for seed in SEEDS])
    yield (
        f"AdamW has the best of the rates {', '.join(f'{lr:g}' for lr in LADDER)}: three around a guess on seed "
        f"{SEEDS[0]}, and further ones while the best is at an end. Ours (`{OURS.name}`) finds its rate in the first "
        f"{100 * WARM_UP_SHARE:g} % of the steps; nothing is tuned. “Tuned” is ours with its own best rate "
        f"of that list and no search. All then run with seeds {seeds}. All else is set as for Evidence, but gradients "
        "are clipped where the list of jobs says so."
    )


def _notes() -> Iterator[str]:
    yield (
        "- A loss is the last validation loss, mean of the seeds. Ours is in percent above (+) or below (−) AdamW's; "
        f"**bold: above +{100 * NEAR:g} %**.\n"
        "- *Found* is the rate that ours found divided by AdamW's best, over all starts and seeds.\n"
        "- *Lowest* compares the lowest validation losses on the way, looked at before the first step and every "
        f"{CHECK_EVERY} steps. Where it is far below the starts' columns, ours was better on the way than at the end: "
        "the model overfits, or the rate is too high.\n"
        "- The loss of `policy` cannot end below 1: its percentages are of a number at its floor.\n"
        "- A dash was not run."
    )
    yield "\n".join(["The jobs:", "", *(f"- `{name}`: {job.description}" for name, job in JOBS.items())])


def _table(outcomes: Mapping[str, Outcome | None]) -> str:
    headings = [
        "job",
        "AdamW (rate)",
        *(f"from {start:g}" for start in STARTS),
        "tuned",
        "Prodigy",
        "found",
        "lowest",
    ]
    rows = [[f"`{job}`", *_cells(found)] for job, found in outcomes.items()]
    return markdown.table(headings, rows, left=1)


def _cells(found: Outcome | None) -> Iterator[str]:
    if found is None:
        yield from [markdown.MISSING] * (len(STARTS) + 5)
        return
    yield f"{markdown.number(found.loss)} ({found.rate:g})"
    for start in STARTS:
        yield _percent(found.above.get(start), bold=True)
    yield _percent(found.tuned, bold=True)
    yield _percent(found.prodigy, bold=True)
    yield markdown.MISSING if found.factor is None else f"× {found.factor:.2g}"
    yield _percent(found.lowest)


def _percent(value: float | None, bold: bool = False) -> str:
    if value is None:
        return markdown.MISSING
    text = markdown.percent(value, 1)
    return f"**{text}**" if bold and value > NEAR else text


def _verdicts(outcomes: Mapping[str, Outcome | None]) -> Iterator[str]:
    done = {job: found for job, found in outcomes.items() if found is not None and found.worst is not None}
    if not done:
        return
    near = [job for job, found in done.items() if (found.worst or 0) <= NEAR]
    far = [job for job, found in done.items() if (found.worst or 0) > FAR]
    ends = [job for job, found in done.items() if found.rate in (LADDER[0], LADDER[-1])]
    sentences = [
        f"At most {100 * NEAR:g} % above AdamW from every start: {_named(near, len(done))}",
        f"More than {100 * FAR:g} % above it from at least one start: {_named(far, len(done))}",
    ]
    better = [job for job, found in done.items() if found.prodigy is not None and found.prodigy < (found.worst or 0)]
    sentences.append(f"Prodigy is better than ours from its worst start: {_named(better, len(done))}")
    lost = [job for job, found in done.items() if found.tuned is not None and found.tuned > NEAR]
    sentences.append(f"With a tuned rate ours is more than {100 * NEAR:g} % above AdamW: {_named(lost, len(done))}")
    if ends:
        sentences.append(f"AdamW's best rate is an end of what was tried on {markdown.listed(_coded(ends))}")
    yield "\n".join(f"- {sentence}." for sentence in sentences)


def _named(jobs: Sequence[str], total: int) -> str:
    return f"{len(jobs)} of {total} jobs" + (f" ({markdown.listed(_coded(jobs))})" if jobs else "")


def _coded(names: Sequence[str]) -> list[str]:
    return [f"`{name}`" for name in names]


def _generated(records: Mapping[Spec, Record]) -> str:
    if not records:
        return "Nothing has run yet."
    latest = list(records.values())[-1]["versions"]
    versions = ", ".join(f"{name} {latest[name]}" for name in ("python", "torch", "numpy") if name in latest)
    hours = sum(record["cpu_seconds"] for record in records.values()) / 3600
    whole = plan(losses(records), {name: place_of(job) for name, job in JOBS.items()}, known=False)
    missing = sum(spec not in records for spec in whole)
    return (
        f"Generated by `make outside`, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}; one thread a run; {versions}. "
        f"{len(records)} runs, {hours:.1f} hours of processor time"
        + (f"; {missing} runs of the plan are missing." if missing else ".")
    )
