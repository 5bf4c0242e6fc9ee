"""Does the missing runs and writes the page: ``python -m benchmarks.outside``.

It can be stopped at any time and called again; a second call does only what is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.evidence.command import chosen_jobs, failures_of, parser_of
from benchmarks.evidence.store import Store, settings_of
from benchmarks.outside.jobs import JOBS
from benchmarks.outside.plan import plan
from benchmarks.outside.report import write_report

FOLDER = Path("benchmarks/results/outside")
"""Under version control, but for the bases."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 when all went well, also where runs are still missing."""
    parser = parser_of("python -m benchmarks.outside", __doc__, JOBS, 60.0, FOLDER)
    options = parser.parse_args(arguments)
    jobs = chosen_jobs(parser, options, JOBS)
    store = Store(options.folder, {name: settings_of(job) for name, job in JOBS.items()})
    failures = failures_of(store, jobs, options, plan)
    if failures is None:
        return 130
    print(f"wrote {write_report(store, options.docs)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
