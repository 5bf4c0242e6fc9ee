"""Does the missing runs and writes the report: ``python -m benchmarks.evidence``.

It can be stopped at any time and called again; a second call does only what is missing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.evidence.jobs import JOBS
from benchmarks.evidence.plan import chosen, plan
from benchmarks.evidence.running import run_missing
from benchmarks.evidence.store import FOLDER, Store, place_of, settings_of
from benchmarks.evidence.variants import VARIANTS

DOCS = Path("docs")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 when all went well, also where runs are still missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--jobs", default=",".join(JOBS), help="names with commas between them (default: %(default)s)")
    parser.add_argument("--variants", help="only these (default: the whole plan)")
    parser.add_argument("--seeds", help="with --variants: only these")
    parser.add_argument("--starts", help="with --variants: from these rates instead of those of the plan")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=240.0, help="no run begins later (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="only write the report of the results there are")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="results and base/ (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the report goes (default: %(default)s)")
    options = parser.parse_args(arguments)

    names = options.jobs.split(",")
    if unknown := [job for job in names if job not in JOBS]:
        parser.error(f"--jobs: unknown {', '.join(unknown)}; valid: {', '.join(JOBS)}")
    if options.workers < 1:
        parser.error(f"--workers = {options.workers} is not valid; valid: 1 or more")
    jobs = {name: JOBS[name] for name in JOBS if name in names}
    planner = plan
    if options.variants:
        wanted = options.variants.split(",")
        if unknown := [name for name in wanted if name not in VARIANTS]:
            parser.error(f"--variants: unknown {', '.join(unknown)}; valid: {', '.join(VARIANTS)}")
        seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else None
        starts = [float(start) for start in options.starts.split(",")] if options.starts else None
        planner = chosen({name: place_of(job) for name, job in jobs.items()}, wanted, seeds, starts)
    elif options.seeds or options.starts:
        parser.error("--seeds and --starts need --variants")

    store = Store(options.folder, {name: settings_of(job) for name, job in JOBS.items()})
    failures: list[str] = []
    if not options.report:
        # Asked to end, it ends its workers too, as on Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            outcome = run_missing(store, jobs, options.workers, options.minutes, planner)
        except KeyboardInterrupt:
            print("stopped; the next call goes on from here")
            return 130
        failures = outcome.failures
        print(f"{outcome.done} runs added, {outcome.missing} still missing, {len(failures)} failed")

    from benchmarks.evidence.report import write_report  # matplotlib is not needed by the workers, which import this

    path = write_report(store, list(JOBS), options.docs)
    print(f"wrote {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
