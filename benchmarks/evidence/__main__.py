"""Does the missing runs and writes the report: ``python -m benchmarks.evidence``.

It can be stopped at any time and called again; a second call does only what is missing.
"""

from __future__ import annotations

import sys

from benchmarks.evidence.command import chosen_jobs, failures_of, parser_of
from benchmarks.evidence.jobs import JOBS
from benchmarks.evidence.plan import chosen, plan
from benchmarks.evidence.store import FOLDER, Store, place_of, settings_of
from benchmarks.evidence.variants import VARIANTS


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 when all went well, also where runs are still missing."""
    parser = parser_of("python -m benchmarks.evidence", __doc__, JOBS, 240.0, FOLDER)
    parser.add_argument("--variants", help="only these (default: the whole plan)")
    parser.add_argument("--seeds", help="with --variants: only these")
    parser.add_argument("--starts", help="with --variants: from these rates instead of those of the plan")
    options = parser.parse_args(arguments)
    jobs = chosen_jobs(parser, options, JOBS)
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
    failures = failures_of(store, jobs, options, planner)
    if failures is None:
        return 130

    from benchmarks.evidence.report import write_report  # matplotlib is not needed by the workers, which import this

    path = write_report(store, list(JOBS), options.docs)
    print(f"wrote {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
