"""Does the missing tasks and writes the report: ``python -m benchmarks.soak``.

It can be stopped at any time and called again; a second call does only what is missing,
has failed, or was done with other sources of the optimizer.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from benchmarks.soak import store
from benchmarks.soak.own_process import in_own_process
from benchmarks.soak.report import write_report
from benchmarks.soak.tasks import PARTS, TASKS

REPORT = Path("docs/reliability.md")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 when nothing failed, also where tasks are still missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas between them (default: %(default)s)")
    parser.add_argument("--sides", default="both,torch,jax", help="frameworks (default: %(default)s)")
    parser.add_argument("--tasks", default="", help="only these; valid: " + ", ".join(TASKS))
    parser.add_argument("--minutes", type=float, default=55.0, help="no task begins later (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="also what has passed with these sources")
    parser.add_argument("--report", action="store_true", help="only write the report of the records there are")
    parser.add_argument("--folder", type=Path, default=store.FOLDER, help="of the records (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=REPORT, help="the report (default: %(default)s)")
    options = parser.parse_args(arguments)
    chosen = {
        "--parts": (options.parts.split(","), PARTS),
        "--sides": (options.sides.split(","), ("both", "torch", "jax")),
        "--tasks": (options.tasks.split(",") if options.tasks else list(TASKS), tuple(TASKS)),
    }
    for option, (names, valid) in chosen.items():
        if unknown := sorted(set(names) - set(valid)):
            parser.error(f"{option}: unknown {', '.join(unknown)}; valid: {', '.join(valid)}")

    # Asked to end, it ends the task's process too, as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = time.monotonic() + 60 * options.minutes
    records = store.load(options.folder)
    wanted = [
        name
        for name in chosen["--tasks"][0]
        if TASKS[name].part in chosen["--parts"][0] and TASKS[name].side in chosen["--sides"][0]
    ]
    if not options.report:
        for name in wanted:
            if not options.again and store.has_passed(records.get(name)):
                continue
            if time.monotonic() >= end:
                print(f"{name}: left out, the time is up; the next call goes on here")
                continue
            record = in_own_process(TASKS[name].work)
            store.save(options.folder, name, record)
            print(f"{name}: {record.get('seconds', 0):.0f} s, {'; '.join(record['failures']) or 'passed'}", flush=True)
    records = store.load(options.folder)
    write_report(records, options.docs)
    print(f"wrote {options.docs}")
    return 1 if any(records[name]["failures"] for name in wanted if name in records) else 0


if __name__ == "__main__":
    sys.exit(main())
