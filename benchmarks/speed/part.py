"""One case of one framework, in a process of its own: its rows go to a file."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path

from benchmarks.speed.cases import CASES, NOT_HERE, QUICK_CASES, TORCH


def main() -> None:
    """Measures; what cannot run here stands among the rows with its reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework")
    parser.add_argument("case")
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    options = parser.parse_args()
    (case,) = (case for case in CASES + QUICK_CASES if case.name == options.case)
    module = import_module("benchmarks.speed.in_torch" if options.framework == TORCH else "benchmarks.speed.in_jax")
    measured = {row["name"]: row for row in module.measure(case, [n for n in options.names if n not in NOT_HERE])}
    parameters = sum(height * width for height, width in case.shapes)
    about = {"framework": options.framework, "case": case.name, "adapters": case.adapters}
    about |= {"arrays": len(case.shapes), "parameters": parameters}
    # Only Inductor keeps what it has compiled.
    about["cold"] = case.cold or options.framework != TORCH
    rows = [{**about, **measured.get(name, {"name": name, "error": NOT_HERE.get(name)})} for name in options.names]
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
