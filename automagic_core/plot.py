"""`python -m automagic_core.plot RUN...` draws the metrics that runs logged on one page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from automagic_core.watching.plot_names import short_names
from automagic_core.watching.plot_page import draw_page
from automagic_core.watching.run_log import read_run

DEFAULT_NAME = "metrics.png"


def plot(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Draws several runs into the same panels of one PNG.

    Args:
        runs: folders that a `MetricsLogger` wrote, or the files in them.
        out: the PNG; by default ``metrics.png`` in the folder of a single run, or in the current folder for several.

    Returns:
        The path of the PNG.

    Raises:
        FileNotFoundError: a run has no file of records.
        OSError: `out` cannot be written.
        ValueError: no run, a run without values, a file that holds something else, or an `out` that is no PNG.
        ImportError: matplotlib is missing; the message says how to get it.
    """
    if not runs:
        raise ValueError("there is no run to draw; give at least one folder with a metrics.jsonl")
    paths = [Path(run) for run in runs]
    folders = [path if path.is_dir() else path.parent for path in paths]
    target = Path(out) if out is not None else (folders[0] if len(paths) == 1 else Path()) / DEFAULT_NAME
    if target.suffix.lower() != ".png":
        raise ValueError(f"out = {str(target)!r} is not valid; valid: a name that ends in .png")
    curves = [read_run(path) for path in paths]
    if empty := [str(path) for path, of_run in zip(paths, curves, strict=True) if not of_run]:
        raise ValueError(f"there is nothing to draw yet in {', '.join(empty)}")
    names = short_names([str(folder.resolve()) for folder in folders])
    figure = draw_page(list(zip(names, curves, strict=True)))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m automagic_core.plot", description="Draws logged runs as one PNG.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder with a metrics.jsonl; several are overlaid")
    parser.add_argument("--out", metavar="FILE.png", help=f"by default {DEFAULT_NAME} in the folder of a single run")
    options = parser.parse_args(arguments)
    try:
        print(plot(options.runs, options.out))
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
