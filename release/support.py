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
from typing import Any, NamedTuple
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
RECORDS = ROOT / "benchmarks" / "results" / "support.json"
GPU = ROOT / "benchmarks" / "results" / "gpu.json"
COLUMNS = ("torch", "bitsandbytes", "jax", "optax", "flax", "numpy", "safetensors")
_ORACLE = "tests/optax_side/cameamp/test_oracle_single_features.py"
TESTS = {
    "numpy": ["tests/core_side/codec/test_random_bits_core.py", "tests/core_side/moving/test_state_file.py"],
    "torch": [
        "tests/core_side/codec/test_codebook_table.py",
        "tests/torch_side/codec/test_torch_codec.py",
        "tests/torch_side/cameamp/test_torch_oracle.py",
        "tests/torch_side/steps/test_torch_compiled.py",
        "tests/torch_side/moving/test_convert_command.py",
    ],
    "jax": [
        "tests/optax_side/codec/test_codec_in_numpy.py",
        *(f"{_ORACLE}::test_feature_alone[{case}]" for case in ("walk-second_moment-flax", "background-all-torch")),
        f"{_ORACLE}::test_rates_at_their_limits",
        "tests/optax_side/test_imports.py",
    ],
    "flax": ["tests/optax_side/optimizer/test_flax_nnx.py"],
    # The oracle of the codec has its codebook from bitsandbytes.
    "torch and jax": [
        "tests/optax_side/codec/test_codec_exact.py",
        "tests/parity_side/test_state_file_both_ways.py",
    ],
}
"""For every library of a row: the codec code by code, steps against the oracle in float64, compiled ones against eager
ones, files there and back."""


class Row(NamedTuple):
    """A version of Python and the versions of libraries that are not those of constraints.txt.

    A row without `torch` or without `jax` has none of it.
    """

    python: str
    versions: dict[str, str]

    @property
    def name(self) -> str:
        return f"Python {self.python}, " + ", ".join(f"{name} {version}" for name, version in self.versions.items())


# Only torch 2.13.0 for Python 3.11 is installed from a build for CPUs; the other versions bring gigabytes of CUDA.
ROWS = (
    Row("3.11", {"torch": "2.13.0", "bitsandbytes": "0.50.2", "jax": "0.10.2", "optax": "0.2.8", "flax": "0.12.8"}),
    # The oldest of pyproject.toml, on each side; JAX asks for a later numpy than PyTorch.
    Row("3.11", {"torch": "2.6.0", "bitsandbytes": "0.49.0", "numpy": "1.26.0", "safetensors": "0.5.0"}),
    # The oldest that compiles, and the latest.
    Row("3.11", {"torch": "2.9.1", "bitsandbytes": "0.50.2"}),
    Row("3.11", {"torch": "2.14.1", "bitsandbytes": "0.50.2"}),
    Row("3.11", {"jax": "0.10.0", "optax": "0.2.8", "flax": "0.12.8", "numpy": "2.0.0", "safetensors": "0.5.0"}),
    Row("3.12", {"jax": "0.10.2", "optax": "0.2.8", "flax": "0.12.8"}),
    Row("3.12", {"jax": "0.11.2", "optax": "0.2.8", "flax": "0.12.12"}),
    Row("3.13", {"jax": "0.10.2", "optax": "0.2.8", "flax": "0.12.8"}),
    Row("3.13", {"jax": "0.11.2", "optax": "0.2.8", "flax": "0.12.12"}),
    Row("3.13", {"torch": "2.13.0", "bitsandbytes": "0.50.2", "jax": "0.10.2", "optax": "0.2.8", "flax": "0.12.8"}),
)

HEADER = """# Versions tried

`make support` wrote this page, on Linux. For every row it made an empty environment, installed the wheel and these
versions, and took steps in each framework on a CPU. Then it ran tests: the codec code by code, steps against the oracle
in float64, from torch 2.9 on compiled steps against eager ones, state files there and back.

| Python | {columns} | passed | failed | on |
|---|{rules}|---|---|---|
"""

FOOTER = """
The last row is what `make gpu` found on one {device} (`benchmarks/results/gpu.json`): how many of its
comparisons of the two frameworks kept their bounds: of the codec with both on the card, of single steps with JAX on the
CPU, whose division is exact ([why](performance.md)).

Not tried: Windows, macOS, torch 2.12. pyproject.toml allows
{bounds}.

**torch 2.6 to 2.8** compute the eager step only: 2.6 and 2.7 cannot trace the compiled one, and 2.8 crashes with it on
a CPU. On CUDA the optimizer says so once by default and goes on; `compiled=True` is an error there. On a CPU,
`fully_shard` does not run with torch 2.6, and with 2.7 and 2.8 it does not divide gradients by the number of processes.
Both are faults of torch. 2.7 and 2.8 were tried by hand alone.

**bitsandbytes 0.49** rounds differently from 0.50 on a CPU. In one state 13 % of the codes of the eager step differed
by one from those of the compiled step; with 0.50.2 they are below 3 %. The slow test that found it is not part of the
rows.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m release.support", description="tries versions, writes a page")
    every = range(1, len(ROWS) + 1)
    parser.add_argument("--rows", nargs="*", type=int, default=every, choices=every, help="others keep their record")
    wanted = parser.parse_args().rows
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            wheel, _ = built(folder)
        except ReleaseError as told:
            sys.exit(f"support: {told}")
        for number in wanted:
            row = ROWS[number - 1]
            print(f"{number} of {len(ROWS)}: {row.name}", flush=True)
            python = python_of(row.python)
            if python is None:
                print(f"    no python{row.python} here: its record stays as it was", flush=True)
                continue
            start = time.monotonic()
            try:
                record = tried(row, python, wheel, folder)
            except ReleaseError as told:
                print(f"    {told}", flush=True)
                record = {"versions": {"python": row.python, **row.versions}, "passed": 0, "failed": 1}
            passed, failed = record["passed"], record["failed"]
            print(f"    {passed} tests passed, {failed} failed ({time.monotonic() - start:.0f} s)", flush=True)
            records[row.name] = {**record, "date": time.strftime("%Y-%m-%d")}
            faults += failed
            kept = {row.name: records[row.name] for row in ROWS if row.name in records}
            RECORDS.write_text(json.dumps(kept, indent=1) + "\n")
            PAGE.write_text(text(list(kept.values())))
    sys.exit(f"support: {faults} failed" if faults else 0)


def tried(row: Row, python: Path, wheel: Path, folder: Path) -> dict[str, Any]:
    """What was installed for a row, how many tests passed and how many failed.

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
    run(f"the first steps with {row.name}", [inside, "-I", FIRST_STEPS], folder)
    results = folder / "results.xml"
    results.unlink(missing_ok=True)
    tests = [path for needs, paths in TESTS.items() if _has(row, needs.split(" and ")) for path in paths]
    pytest: list[str | Path] = [inside, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow"]
    told = ""
    try:
        run(f"a test with {row.name}", [*pytest, f"--junitxml={results}", *tests], ROOT)
    except ReleaseError as error:
        told = str(error)
    if not results.exists():
        raise ReleaseError(told or f"no test ran with {row.name}")
    suites = list(ElementTree.parse(results).iter("testsuite"))
    count = {
        kind: sum(int(suite.get(kind, 0)) for suite in suites) for kind in ("tests", "failures", "errors", "skipped")
    }
    failed = count["failures"] + count["errors"]
    if failed:
        print(told, flush=True)
    installed = versions_of(inside)
    versions = {name: installed[name] for name in ("python", *COLUMNS) if name in installed}
    return {"versions": versions, "passed": count["tests"] - count["skipped"] - failed, "failed": failed}


def _has(row: Row, libraries: Sequence[str]) -> bool:
    return all(name == "numpy" or name in row.versions for name in libraries)


def _replaced(row: Row) -> set[str]:
    """The names whose pins give way: what libraries bring follows their version."""
    follow = {
        "torch": {"sympy"},
        "jax": {"jaxlib", "ml_dtypes"},
        "flax": {"orbax-checkpoint", "tensorstore", "treescope"},
    }
    return set(row.versions).union(*(names for name, names in follow.items() if name in row.versions))


def text(records: Sequence[dict[str, Any]]) -> str:
    """The page."""
    gpu = json.loads(GPU.read_text())
    facts = gpu["parts"]["facts"]["found"]
    reports = [part["parity"] for part in gpu["parts"].values() if "parity" in part]
    seen = facts["versions"] | {"torch": reports[0]["environment"]["torch"]}
    checks = [check for report in reports for check in report["checks"]]
    failed = [check for check in checks if not check["passed"]]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    allowed = [name for extra in ("torch", "jax", "files") for name in extras[extra]]
    last = {"versions": seen, "passed": len(checks) - len(failed), "failed": len(failed), "date": gpu["date"]}
    lines = []
    for record in (*records, last):
        cells = [record["versions"].get(name, "–") for name in ("python", *COLUMNS)]
        cells += [str(record[name]) for name in ("passed", "failed", "date")]
        lines.append(f"| {' | '.join(cells)} |\n")
    head = HEADER.format(columns=" | ".join(COLUMNS), rules="|".join(["---"] * len(COLUMNS)))
    foot = FOOTER.format(
        device=facts["card"]["name"],
        bounds=", ".join(f"`{name}`" for name in allowed),
    )
    return head + "".join(lines) + foot


if __name__ == "__main__":
    main()
