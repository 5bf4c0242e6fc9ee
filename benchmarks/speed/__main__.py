"""What a step costs on a CPU, ours beside other optimizers: ``python -m benchmarks.speed``

Each case of each framework is a process of its own, in which all contestants take turns.  A case that is measured is
not measured again until the whole is done: what was cut off goes on where it stopped.  The whole writes
benchmarks/results/speed.json and, from it, the tables of docs/speed.md, rows of the README, docs/pictures/speed.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.soak.store import code_version
from benchmarks.speed import page, picture, tables
from benchmarks.speed.cases import CASES, JAX, NAMES, QUICK_CASES, QUICK_NAMES, TORCH, Case

ROOT = Path(__file__).parents[2]
OUT = ROOT / "out/speed"
FILE = results.FOLDER / "speed.json"
PEERS = ("torchao", "adafactor8bit", "came-pytorch", "prodigyopt")


def run_part(framework: str, case: Case, names: tuple[str, ...], folder: Path) -> list[dict[str, Any]]:
    """Measures one case unless it is measured already; returns its rows."""
    record = folder / f"{framework}-{case.name}.json".replace(" ", "-")
    if record.exists():
        rows: list[dict[str, Any]] = json.loads(record.read_text())
        if [row["name"] for row in rows] == list(names):
            return rows
    kept = folder / f"inductor-{'adapters' if case.adapters else 'one-array'}"
    if case.cold:
        shutil.rmtree(kept, ignore_errors=True)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(kept), "KINETO_LOG_LEVEL": "5"}
    command = [sys.executable, "-m", "benchmarks.speed.part", framework, case.name, str(record), *names]
    with (folder / "log.txt").open("a") as log:
        print("$", " ".join(command), file=log, flush=True)
        if subprocess.run(command, env=environment, cwd=ROOT, stdout=log, stderr=log, check=False).returncode:
            raise SystemExit(f"{framework}, {case.name} failed; {folder / 'log.txt'} says why")
    found: list[dict[str, Any]] = json.loads(record.read_text())
    return found


def conditions(folder: Path, threads: str) -> dict[str, Any]:
    """Of the run, those of a run that was cut off included: `seconds` on the clock, `others` of processor time."""
    file = folder / "conditions.json"
    now: dict[str, Any] = {"code": code_version(), "threads": threads, "seconds": 0.0, "others": 0.0}
    before: dict[str, Any] = json.loads(file.read_text()) if file.exists() else now
    if (before["code"], before["threads"]) != (now["code"], now["threads"]):
        shutil.rmtree(folder)
        folder.mkdir(parents=True)
        before = now
    return before


def used_by_others() -> float | None:
    """Seconds of processor time so far of all but this process and those that it has waited for; None if unknown."""
    if not Path("/proc/stat").exists():
        return None
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:8])
    return sum((user, nice, system, *interrupts)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def versions() -> dict[str, str]:
    """Of the optimizers compared with; what is not installed is left out, its rows say so."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table, writes the file, the page and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few contestants, small sizes; changes no page")
    parser.add_argument("--only", nargs="+", metavar="PART", help='cases such as "PyTorch, 8 M"; changes no page')
    parser.add_argument("--fresh", action="store_true", help="measure again what a run that was cut off has measured")
    parser.add_argument("--pages", action="store_true", help="measure nothing: page and picture from the file there is")
    options = parser.parse_args(arguments)
    if options.pages:
        write_pages(json.loads(FILE.read_text()))
        return
    folder = OUT / "quick" if options.quick else OUT
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    told = conditions(folder, os.environ.get("OMP_NUM_THREADS", "all"))
    cases, entered = (QUICK_CASES, QUICK_NAMES) if options.quick else (CASES, NAMES)
    chosen = [(framework, case) for case in cases for framework in (TORCH, JAX)]
    if options.only:
        chosen = [pair for pair in chosen if f"{pair[0]}, {pair[1].name}" in options.only]
    rows: list[dict[str, Any]] = []
    console = results.console()
    for framework, case in chosen:
        started, before = time.monotonic(), used_by_others()
        rows += run_part(framework, case, entered[framework], folder)
        told["seconds"] += time.monotonic() - started
        after = used_by_others()
        told["others"] = None if None in (told["others"], before, after) else told["others"] + after - before
        (folder / "conditions.json").write_text(json.dumps(told))
        console.print(f"{framework}, {case.name}: {time.monotonic() - started:.0f} s")
    rows.sort(key=lambda row: row["framework"] == JAX)
    whole = {**told, "peers": versions(), "rows": rows}
    console.print(tables.terminal(whole))
    if options.quick or options.only:
        results.write(folder / "speed.json", whole)
        picture.write(whole, folder / "speed.png")
        return
    results.write(FILE, whole)
    shutil.rmtree(folder)
    write_pages(json.loads(FILE.read_text()))


def write_pages(whole: dict[str, Any]) -> None:
    """The tables of docs/speed.md, the rows of the README, the picture."""
    for path, write in page.WRITERS.items():
        (ROOT / path).write_text(write((ROOT / path).read_text(), whole))
    picture.write(whole, ROOT / page.PICTURE)


if __name__ == "__main__":
    main()
