"""What commands that do training runs have in common: their options, and how they do what is missing."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.jobs import Job
from benchmarks.evidence.running import run_missing
from benchmarks.evidence.store import Store

DOCS = Path("docs")


def parser_of(prog: str, text: str | None, jobs: Mapping[str, Job], minutes: float, folder: Path) -> Any:
    """A parser with the options of all such commands; `minutes` and `folder` are defaults."""
    parser = argparse.ArgumentParser(prog=prog, description=text)
    parser.add_argument("--jobs", default=",".join(jobs), help="names with commas between them (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=minutes, help="no run begins later (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="only write the report of the results there are")
    parser.add_argument("--folder", type=Path, default=folder, help="results and base/ (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the report goes (default: %(default)s)")
    return parser


def chosen_jobs(parser: Any, options: Any, jobs: Mapping[str, Job]) -> dict[str, Job]:
    """The jobs asked for, in their own order; ends the command where an option is not valid."""
    names = options.jobs.split(",")
    if unknown := [job for job in names if job not in jobs]:
        parser.error(f"--jobs: unknown {', '.join(unknown)}; valid: {', '.join(jobs)}")
    if options.workers < 1:
        parser.error(f"--workers = {options.workers} is not valid; valid: 1 or more")
    return {name: job for name, job in jobs.items() if name in names}


def failures_of(store: Store, jobs: dict[str, Job], options: Any, planner: Callable[..., Any]) -> list[str] | None:
    """Does the missing runs, unless only a report is wanted: what failed, or None where somebody stopped them."""
    if options.report:
        return []
    # Asked to end, it ends its workers too, as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcome = run_missing(store, jobs, options.workers, options.minutes, planner)
    except KeyboardInterrupt:
        print("stopped; the next call goes on from here")
        return None
    print(f"{outcome.done} runs added, {outcome.missing} still missing, {len(outcome.failures)} failed")
    return outcome.failures
