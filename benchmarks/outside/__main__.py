"""Does the missing runs and writes the page: ``python -m benchmarks.outside``.

It can be stopped at any time and called again; a second call does only what is missing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.evidence.running import run_missing
from benchmarks.evidence.store import Store, settings_of
from benchmarks.outside.jobs import JOBS
from benchmarks.outside.plan import plan
from benchmarks.outside.report import write_report

FOLDER = Path("benchmarks/results/outside")
"""Under version control, but for the bases."""
DOCS = Path("docs")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 when all went well, also where runs are still missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outside", description=__doc__)
    parser.add_argument("--jobs", default=",".join(JOBS), help="names with commas between them (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="no run begins later (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="only write the page of the results there are")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="results and base/ (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page goes (default: %(default)s)")
    options = parser.parse_args(arguments)

    names = options.jobs.split(",")
    if unknown := [job for job in names if job not in JOBS]:
        parser.error(f"--jobs: unknown {', '.join(unknown)}; valid: {', '.join(JOBS)}")
    if options.workers < 1:
        parser.error(f"--workers = {options.workers} is not valid; valid: 1 or more")
    jobs = {name: JOBS[name] for name in JOBS if name in names}

    store = Store(options.folder, {name: settings_of(job) for name, job in JOBS.items()})
    failures: list[str] = []
    if not options.report:
        # Asked to end, it ends its workers too, as on Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            outcome = run_missing(store, jobs, options.workers, options.minutes, plan)
        except KeyboardInterrupt:
            print("stopped; the next call goes on from here")
            return 130
        failures = outcome.failures
        print(f"{outcome.done} runs added, {outcome.missing} still missing, {len(failures)} failed")

    print(f"wrote {write_report(store, options.docs)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
