"""One thread for torch, programs of JAX compiled once in a run, and memory that does not grow with the tests."""

import functools
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# The arrays are small, and the order of torch's sums should not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MOST_MEMORY = 3 * 2**30
"""Bytes in use by a process above which it drops the programs that JAX keeps; `make test` takes half of that."""
OPTIMIZATIONS_OFF = "jax_disable_most_optimizations"


def pytest_configure(config: pytest.Config) -> None:
    """The processes of a run share a folder of compiled programs, empty at its start."""
    gc.disable()  # While modules are imported nothing becomes garbage: a third of that time goes to searching.
    if hasattr(config, "workerinput"):
        return  # a worker, which has the environment of the process that began the run
    folder = tempfile.mkdtemp(prefix="compiled_programs_")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is compiled quickly comes last, so that each process changes the way of compiling once."""
    items.sort(key=lambda item: item.get_closest_marker("compiled_quickly") is not None)


def pytest_collection_finish() -> None:
    """Programs share one context of MLIR: JAX makes one for each, in 6 ms, and 1 MB of it stays with the program."""
    mlir = sys.modules.get("jax._src.interpreters.mlir")
    if hasattr(mlir, "make_ir_context"):
        mlir.make_ir_context = functools.cache(mlir.make_ir_context)
    gc.freeze()  # What is imported stays, so no search goes through it again.
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs as the module wants them.

    Operation by operation every operation on every shape is a program, and most modules need the same ones.
    """
    jax = sys.modules.get("jax")
    if not jax:
        yield
        return
    marked = request.node.get_closest_marker("compiled_quickly") is not None
    quickly = marked and "not slow" in request.config.getoption("markexpr")
    if jax.config.values[OPTIMIZATIONS_OFF] != quickly:
        jax.config.update(OPTIMIZATIONS_OFF, quickly)
        jax.clear_caches()
    yield
    if bytes_in_use() > MOST_MEMORY:
        jax.clear_caches()


def bytes_in_use() -> float:
    """Of this process; infinity where the system does not tell."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if told.exists() else float("inf")
