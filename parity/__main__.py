"""``python -m parity``: holds the PyTorch and the JAX optimizer against each other and writes a report."""

from __future__ import annotations

import os

# Small arrays: a second thread costs more than it brings, and the sums' order should not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import datetime
import platform
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import jax
import torch
from rich.console import Console
from rich.table import Table

from parity import teacher_forced
from parity.checks import Check, Report, show, show_bound, verdict


def _suite(module: str, device: str, **share: slice) -> Iterable[Check]:
    """The checks of a module, imported when its turn comes: only two of them need Flax."""
    checks: Iterable[Check] = import_module(f"parity.{module}").suite(device, **share)
    return checks


SUITES: dict[str, Callable[..., Iterable[Check]]] = {
    "codec": partial(_suite, "codec_suite"),
    "teacher": partial(_suite, "teacher_forced"),
    "stages": partial(_suite, "stages"),
    "free": partial(_suite, "free_running"),
    "model": partial(_suite, "model_runs"),
    "carried": partial(_suite, "carried_runs"),
}
SHARED = ("teacher", "stages")
"""Suites of several runs that several processes may share."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the suites; returns 0 if every bound holds, else 1."""
    parser = argparse.ArgumentParser(prog="python -m parity", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the torch side runs")
    parser.add_argument("--only", nargs="*", choices=tuple(SUITES), default=list(SUITES), help="suites to run")
    parser.add_argument("--out", type=Path, default=Path("out/parity"), help="folder of report.json and report.md")
    parser.add_argument(
        "--share", type=_share, default=slice(None), metavar="I/N", help=f"every N-th run of {' and '.join(SHARED)}"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")

    console = Console()
    report = Report(environment(options.device), notes=list(NOTES))
    for name in options.only:
        checks = []
        share = {"share": options.share} if name in SHARED else {}
        with console.status(f"{name} …"):
            for check in SUITES[name](options.device, **share):
                checks.append(check)
                report.checks.append(check)
                report.write(options.out)  # what is there counts where the rest is not waited for
        console.print(table(checks))
    report.write(options.out)
    failed = sum(not check.passed for check in report.checks)
    console.print(f"{len(report.checks) - failed} bounds kept, {failed} exceeded; {options.out / 'report.md'} written")
    return 0 if report.passed else 1


def _share(text: str) -> slice:
    """ "2/3" → the second, fifth, eighth … of the runs."""
    first, count = (int(number) for number in text.split("/"))
    if not 1 <= first <= count:
        raise argparse.ArgumentTypeError(f"{text}: valid: I/N with 1 ≤ I ≤ N")
    return slice(first - 1, None, count)


NOTES = [
    "Distances are ‖a − b‖ / ‖b‖ per array, the largest over all arrays and steps.",
    "Some float32 states are differences that cancel; they count relative to at least the size given here: "
    f"{teacher_forced.STATE_FLOORS}.",
    "On a CPU bitsandbytes rounds through a grid of 65,536 points; the JAX side then rounds by the same rule. Near "
    "zero that grid is coarser than the codes: pairs within two of its steps count as neighbours.",
]


def environment(device: str) -> dict[str, str]:
    """What a report was made on."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bitsandbytes": version("bitsandbytes"),
        "jax": f"{jax.__version__} on {jax.default_backend()}",
        "optax": version("optax"),
        "flax": version("flax"),
    }


def table(checks: list[Check]) -> Table:
    """One suite as a table for the terminal."""
    found = Table(title=checks[0].suite if checks else "", title_justify="left")
    for column, justify in (("measured", "left"), ("value", "right"), ("bound", "right"), ("", "left")):
        found.add_column(column, justify=justify)  # type: ignore[arg-type]
    for check in checks:
        style = None if check.passed else "bold red"
        found.add_row(check.name, show(check.value), show_bound(check), verdict(check), style=style)
    return found


if __name__ == "__main__":
    sys.exit(main())
