"""`make support`: which versions of Python and of libraries were tried, into docs/support.md.

Every row gets an empty environment, the wheel, its versions and `first_steps.py`, then the tests of `TESTS`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from release.dist_check import built
from release.environments import (
    CONSTRAINTS,
    FIRST_STEPS,
    ROOT,
    ReleaseError,
    empty_environment,
    install,
    python_of,
    run,
    versions_of,
)

PAGE = ROOT / "docs" / "support.md"
GPU = ROOT / "benchmarks" / "results" / "gpu.json"
COLUMNS = ("torch", "bitsandbytes", "jax", "optax", "flax", "numpy", "safetensors")
TESTS = {
    "numpy": ["tests/core_side/codec/test_random_bits_core.py", "tests/core_side/moving/test_state_file.py"],
    "torch": [
        "tests/core_side/codec/test_codebook_table.py",
        "tests/torch_side/codec/test_torch_codec.py",
        "tests/torch_side/cameamp/test_torch_oracle.py",
        "tests/torch_side/moving/test_convert_command.py",
    ],
    "jax": [
        "tests/optax_side/codec/test_codec_exact.py",
        "tests/optax_side/cameamp/test_oracle_single_features.py",
        "tests/optax_side/test_imports.py",
    ],
    "flax": ["tests/optax_side/optimizer/test_flax_nnx.py"],
    "torch and jax": ["tests/parity_side/test_state_file_both_ways.py"],
}
"""For every library of a row: the codec code by code, steps against the oracle in float64, files there and back."""


class Row(NamedTuple):
    """A version of Python and the versions of libraries that are not those of constraints.txt.

    A row without `torch` or without `jax` has none of it.
    """

    python: str
    versions: dict[str, str]


# Of torch only 2.13.0 for Python 3.11 is at hand as a build for CPUs; others bring gigabytes of CUDA.
ROWS = (
    Row("3.11", {"torch": "2.13.0", "bitsandbytes": "0.50.2", "jax": "0.10.2", "optax": "0.2.8", "flax": "0.12.8"}),
    # The oldest of pyproject.toml, on each side; JAX asks for a later numpy than PyTorch.
    Row("3.11", {"torch": "2.13.0", "bitsandbytes": "0.46.0", "numpy": "1.26.0", "safetensors": "0.5.0"}),
    Row("3.11", {"jax": "0.10.0", "optax": "0.2.8", "flax": "0.12.0", "numpy": "2.0.0", "safetensors": "0.5.0"}),
    Row("3.11", {"torch": "2.13.0", "bitsandbytes": "0.48.2", "jax": "0.10.1", "optax": "0.2.8", "flax": "0.12.4"}),
    Row("3.12", {"jax": "0.10.2", "optax": "0.2.8", "flax": "0.12.8"}),
    Row("3.12", {"jax": "0.11.2", "optax": "0.2.8", "flax": "0.12.12"}),
    Row("3.13", {"jax": "0.10.2", "optax": "0.2.8", "flax": "0.12.8"}),
    Row("3.13", {"jax": "0.11.0", "optax": "0.2.8", "flax": "0.12.10"}),
    Row("3.13", {"jax": "0.11.2", "optax": "0.2.8", "flax": "0.12.12"}),
)

HEADER = """# Versions tried

`make support` wrote this page on {date}, on Linux. For every row it made an empty environment, installed the wheel of
version {version} and these versions, and took steps in each framework on a CPU. Then it ran tests: the codec code by
code, steps against the oracle in float64, state files there and back.

| Python | {columns} | passed | failed |
|---|{rules}|---|---|
"""

FOOTER = """
{left_out}The last row is what `make gpu` found on {gpu_date} on one {device} (`benchmarks/results/gpu.json`):
so many of its comparisons of the two frameworks kept the bounds that hold on a CPU. The others were up to {worst:.1e}
apart ([what that means](performance.md)).

What is not in the table was not tried: no earlier torch, no PyTorch with Python 3.13, no Windows and no macOS.
pyproject.toml allows {bounds}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m release.support", description="tries versions, writes a page")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    page = parser.parse_args().page
    lines, left_out, faults = [], set(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            wheel, _ = built(folder)
        except ReleaseError as told:
            sys.exit(f"support: {told}")
        for number, row in enumerate(ROWS, start=1):
            named = ", ".join(f"{name} {version}" for name, version in row.versions.items())
            print(f"{number} of {len(ROWS)}: Python {row.python}, {named}", flush=True)
            python = python_of(row.python)
            if python is None:
                print(f"    no python{row.python} here: left out", flush=True)
                left_out.add(row.python)
                continue
            start = time.monotonic()
            try:
                versions, passed, failed = tried(row, python, wheel, folder)
            except ReleaseError as told:
                print(f"    {told}", flush=True)
                versions, passed, failed = {"python": row.python, **row.versions}, 0, 1
            print(f"    {passed} tests passed, {failed} failed ({time.monotonic() - start:.0f} s)", flush=True)
            cells = [versions.get(name, "–") for name in ("python", *COLUMNS)]
            lines.append(f"| {' | '.join(cells)} | {passed} | {failed} |\n")
            faults += failed
    page.write_text(text(lines, sorted(left_out), wheel.name.split("-")[1]))
    sys.exit(f"support: {faults} failed" if faults else 0)


def tried(row: Row, python: Path, wheel: Path, folder: Path) -> tuple[dict[str, str], int, int]:
    """(what was installed, tests passed, tests failed) of one row.

    Raises:
        ReleaseError: it cannot be installed, a first step failed, or no test ran.
    """
    inside = empty_environment(folder / "environment", python)
    others = [line for line in CONSTRAINTS.read_text().splitlines() if line.partition("==")[0] not in _replaced(row)]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join([*others, *(f"{name}=={version}" for name, version in row.versions.items())]))
    extras = ["files", *({"torch", "jax"} & row.versions.keys())]
    flax = ["flax"] if "flax" in row.versions else []
    install(inside, [f"{wheel}[{','.join(extras)}]", *flax, "pytest", "hypothesis"], constraints)
    run(f"the first steps with {row}", [inside, "-I", FIRST_STEPS], folder)
    results = folder / "results.xml"
    results.unlink(missing_ok=True)
    tests = [path for needs, paths in TESTS.items() if _has(row, needs.split(" and ")) for path in paths]
    pytest: list[str | Path] = [inside, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow"]
    told = ""
    try:
        run(f"a test with {row}", [*pytest, f"--junitxml={results}", *tests], ROOT)
    except ReleaseError as error:
        told = str(error)
    if not results.exists():
        raise ReleaseError(told or f"no test ran with {row}")
    suites = list(ElementTree.parse(results).iter("testsuite"))
    count = {
        kind: sum(int(suite.get(kind, 0)) for suite in suites) for kind in ("tests", "failures", "errors", "skipped")
    }
    failed = count["failures"] + count["errors"]
    if failed:
        print(told, flush=True)
    return versions_of(inside), count["tests"] - failed - count["skipped"], failed


def _has(row: Row, libraries: Sequence[str]) -> bool:
    return all(name == "numpy" or name in row.versions for name in libraries)


def _replaced(row: Row) -> set[str]:
    """The names whose pins give way: jaxlib and what libraries bring follow the version of jax or flax."""
    follow = {"jax": {"jaxlib", "ml_dtypes"}, "flax": {"orbax-checkpoint", "tensorstore", "treescope"}}
    return set(row.versions).union(*(names for name, names in follow.items() if name in row.versions))


def text(lines: Sequence[str], left_out: Sequence[str], version: str) -> str:
    """The page."""
    gpu = json.loads(GPU.read_text())
    facts = gpu["parts"]["facts"]["found"]
    reports = [part["parity"] for part in gpu["parts"].values() if "parity" in part]
    seen = facts["versions"] | {"torch": reports[0]["environment"]["torch"]}
    checks = [check for report in reports for check in report["checks"]]
    failed = [check for check in checks if not check["passed"]]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    allowed = [name for extra in ("torch", "jax", "files") for name in extras[extra]]
    cells = [seen["python"], *(seen.get(name, "–") for name in COLUMNS)]
    last = f"| {' | '.join(cells)} | {len(checks) - len(failed)} comparisons | {len(failed)} |\n"
    head = HEADER.format(
        date=time.strftime("%Y-%m-%d"),
        version=version,
        columns=" | ".join(COLUMNS),
        rules="|".join(["---"] * len(COLUMNS)),
    )
    foot = FOOTER.format(
        left_out=f"No Python {', '.join(left_out)} was there: its rows are left out.\n\n" if left_out else "",
        gpu_date=gpu["date"],
        device=facts["card"]["name"],
        worst=max((check["value"] for check in failed), default=0.0),
        bounds=", ".join(f"`{name}`" for name in allowed),
    )
    return head + "".join(lines) + last + foot


if __name__ == "__main__":
    main()
