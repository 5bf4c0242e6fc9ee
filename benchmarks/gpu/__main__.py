"""``make gpu``: checks and timings on one GPU, in minutes, without network

Writes results.json and log.txt after every part, into the folder `OUT` names or into out/gpu, and a table at the end.
A part that fails or takes too long changes nothing for the others.  Wheels in .whl (`make gpu-wheels`; git ignores the
folder, so take it along) are installed into a folder of their own for the time of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from benchmarks.gpu import parts, shown, wheels

ROOT = Path(__file__).parents[2]
TAIL = 8000
"""Characters of a part's output that the log keeps."""
GRACE = 20
"""Seconds that interrupted tests have to write their report, which comes last; pytest waits ten for workers before."""


class Run:
    """What has been found so far, written after every part."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self.results: dict[str, Any] = {"device": device, "parts": {}}
        self.started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").write_text("")

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.started

    def add(self, name: str, entry: dict[str, Any], output: str) -> None:
        """The end of a part."""
        self.results["parts"][name] = entry
        self.results["seconds"] = round(self.seconds(), 1)
        part = self.folder / "results.part"
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        part.replace(self.folder / "results.json")
        with (self.folder / "log.txt").open("a") as log:
            log.write(f"\n===== {name}: {entry['ended']} after {entry['seconds']} s\n{output[-TAIL:]}\n")
        print(f"[{self.seconds():5.0f} s] {name}: {entry['ended']} after {entry['seconds']} s", flush=True)


def environment(work: Path, site: Path, device: str) -> dict[str, str]:
    """Of all parts."""
    path = os.pathsep.join(p for p in (str(ROOT), str(site), os.environ.get("PYTHONPATH", "")) if p)
    fixed = {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        # Processes share the card.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
    }
    return {**os.environ, **fixed} | ({"JAX_PLATFORMS": "cpu"} if device == "cpu" else {})


def run_stage(run: Run, stage: tuple[parts.Part, ...], options: argparse.Namespace, work: Path, site: Path) -> None:
    """All parts of a stage side by side, each until it ends or its time is over."""
    left = options.limit - run.seconds()
    going: list[tuple[parts.Part, subprocess.Popen[bytes], float, float]] = []
    interrupted: set[str] = set()
    for part in stage:
        seconds = min(part.seconds, left)
        if options.only and not any(part.name.startswith(name) for name in options.only):
            continue
        if seconds < 5:
            run.add(part.name, {"ended": "not begun: no time left", "seconds": 0}, "")
            continue
        line = parts.command(part, sys.executable, work, options.device, options.small, seconds)
        own = {name: value.format(device=options.device) for name, value in part.environment.items()}
        with (work / f"{parts.slug(part.name)}.log").open("wb") as log:
            process = subprocess.Popen(
                line,
                cwd=ROOT,
                env=environment(work, site, options.device) | own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        begun = time.monotonic()
        going.append((part, process, begun, begun + seconds))
    while going:
        for entry in list(going):
            part, process, begun, end = entry
            if process.poll() is None and time.monotonic() <= end + GRACE * (part.name in interrupted):
                continue
            if process.returncode is None and part.arguments[0] == "pytest" and part.name not in interrupted:
                interrupted.add(part.name)
                process.send_signal(signal.SIGINT)
                continue
            is_over = process.returncode is None or part.name in interrupted
            ended = "out of time" if is_over else f"exit {process.returncode}"
            _end(process)
            going.remove(entry)
            output = (work / f"{parts.slug(part.name)}.log").read_text(errors="replace")
            run.add(
                part.name, {"ended": ended, "seconds": round(time.monotonic() - begun, 1)} | found(work, part), output
            )
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that is stuck in a driver does not end.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def found(work: Path, part: parts.Part) -> dict[str, Any]:
    """What a part left behind: its record, its parity report, its tests."""
    file, entry = work / parts.slug(part.name), {}
    try:
        if Path(f"{file}.json").exists():
            entry["found"] = json.loads(Path(f"{file}.json").read_text())
        if (file / "report.json").exists():
            entry["parity"] = json.loads((file / "report.json").read_text())
        if Path(f"{file}.xml").exists():
            entry["tests"] = tests(Path(f"{file}.xml"))
    except (OSError, ValueError, ElementTree.ParseError) as error:
        entry["unreadable"] = repr(error)
    return entry


def tests(report: Path) -> dict[str, Any]:
    """How many tests passed, and what went wrong in the others."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: dict[str, str] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.get("name") is None:  # was running in a worker when pytest was interrupted
            continue
        wrong = [child for child in case if child.tag in ("failure", "error")]
        skipped = any(child.tag == "skipped" for child in case)
        counts["failed" if wrong else "skipped" if skipped else "passed"] += 1
        for child in wrong:
            name = f"{case.get('classname')}.{case.get('name')}"
            failures[name] = f"{child.get('message', '')[:300]}\n{(child.text or '')[-1500:]}"
    return {**counts, "failures": failures}


def main() -> None:
    """Runs all stages; exits with 0 then, since what failed is part of what was found.

    Raises:
        SystemExit: a GPU is asked for, and there is no bitsandbytes.
    """
    # A shell that starts this in the background has interrupts ignored, by the parts too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the code")
    parser.add_argument("--limit", type=float, default=560, help="seconds for all; default: %(default)s")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "out" / "gpu"))
    parser.add_argument("--only", nargs="*", metavar="NAME", help="parts whose names begin so")
    options = parser.parse_args()
    run = Run(options.out.absolute(), options.device)
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        work, site = Path(folder), Path(folder) / "site"
        begun = run.seconds()
        errors = wheels.install(options.wheels, site)
        run.add("wheels", {"ended": errors or "installed", "seconds": round(run.seconds() - begun, 1)}, errors)
        if options.device == "cuda" and PathFinder.find_spec("bitsandbytes", [str(site), *sys.path]) is None:
            raise SystemExit(
                "bitsandbytes is missing, so states would have 32 bits: run `make gpu-wheels` where there is a "
                "network, and take the folder .whl along, which git ignores"
            )
        for stage in parts.STAGES:
            run_stage(run, stage, options, work, site)
    print(shown.table(run.results))


if __name__ == "__main__":
    main()
