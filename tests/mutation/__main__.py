"""``python -m tests.mutation``: plants each fault in a copy of the tree and reports which test finds it.

A fault is looked for by its likely test modules, then by all tests of its package's side, then by all others, and the
first test that fails ends the search.  Tests marked as slow are left out unless ``--slow`` is given: `make test-all`
has every test of `make test`, so what this finds, that finds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

from tests.mutation.faults import CORE, FAULTS, JAX, TORCH, Fault

ROOT = Path(__file__).parents[2]
SIDES = {CORE: ("core_side",), TORCH: ("torch_side",), JAX: ("optax_side",)}
"""Folders of tests, wherever they stand below ``tests``."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--revision", help="test this commit and its tests, and not the working tree")
    parser.add_argument("--only", default="", help="faults with this text in their package or name")
    parser.add_argument("--slow", action="store_true", help="with the tests marked as slow")
    parser.add_argument("--workers", type=int, default=2, help="processes for the tests")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.only in f"{fault.package}: {fault.name}"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree, options.revision)
        likely = [module for module in modules(tree) if module.stem in {name for f in chosen for name in f.likely}]
        failed = first_failure(tree, likely, options)
        if failed:
            print(f"without any fault {failed} fails")
            return 2
        survivors = 0
        for fault in chosen:
            begun = time.monotonic()
            with planted(tree, fault):
                found = search(tree, fault, options)
            survivors += found is None
            seconds = time.monotonic() - begun
            print(f"{'found' if found else 'NOT FOUND'}  {fault.package}: {fault.name}  {seconds:.0f} s", flush=True)
            print(f"    {found or 'no test fails'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults are found")
    return 1 if survivors else 0


def copy_tree(target: Path, revision: str | None) -> None:
    """The files that git knows or would add, or those of a commit."""
    if revision is not None:
        packed = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(packed)) as archive:
            archive.extractall(target, filter="data")
        return
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@contextlib.contextmanager
def planted(tree: Path, fault: Fault) -> Iterator[None]:
    """The fault is in the tree while the context lasts."""
    file = file_of(tree, fault)
    whole = file.read_text()
    file.write_text(whole.replace(fault.old, fault.new))
    try:
        yield
    finally:
        file.write_text(whole)


def file_of(tree: Path, fault: Fault) -> Path:
    """The file in which the fault's text stands.

    Raises:
        ValueError: it is not in the package exactly once.
    """
    files = [path for path in sorted((tree / fault.package).rglob("*.py")) if fault.old in path.read_text()]
    if len(files) != 1 or files[0].read_text().count(fault.old) != 1:
        raise ValueError(f"{fault.package} does not have this text exactly once: {fault.old}")
    return files[0]


def modules(tree: Path) -> list[Path]:
    """Every test module but the one of these faults, which sees that a text is gone and not that something is wrong."""
    return sorted(path for path in (tree / "tests").rglob("test_*.py") if path.parent.name != "mutation")


def search(tree: Path, fault: Fault, options: argparse.Namespace) -> str | None:
    """The first test that fails; None where all pass."""
    for some in in_order(modules(tree), tree, fault):
        failed = first_failure(tree, some, options)
        if failed:
            return failed
    return None


def in_order(every: Sequence[Path], tree: Path, fault: Fault) -> Iterator[list[Path]]:
    """All test modules in three parts: the likely ones, those of the package's side, the others."""
    likely = [module for module in every if module.stem in fault.likely]
    side = [m for m in every if m not in likely and {*SIDES[fault.package]} & {*m.relative_to(tree).parts}]
    yield likely
    yield side
    yield [module for module in every if module not in likely and module not in side]


def first_failure(tree: Path, some: Sequence[Path], options: argparse.Namespace) -> str | None:
    """The name of the first test of some modules that fails, None where all pass.

    Raises:
        RuntimeError: pytest itself failed.
    """
    if not some:
        return None
    workers = min(options.workers, len(some))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    command += ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"] if workers > 1 else []
    command += [] if options.slow else ["-m", "not slow and not integrations"]
    # Processes that tests start import the tree too, and compile as `make test` does.
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    environment = {"XLA_FLAGS": flags, "OMP_NUM_THREADS": "1", **os.environ}
    environment["PYTHONPATH"] = str(tree)
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run([*command, *map(str, some)], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode in (0, 5):  # 5: every test of these is marked as slow
        return None
    match = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return match[1]


if __name__ == "__main__":
    sys.exit(main())
