"""One thread for torch, programs compiled once in a run, and memory that does not grow with the number of tests."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

# The arrays are small, and the order of torch's sums should not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """The processes of a run share a folder of compiled programs, empty at its start.

    Operation by operation every operation on every shape is a program, and most tests need the same ones.
    """
    if hasattr(config, "workerinput"):
        return  # a worker, which has the environment of the process that began the run
    folder = tempfile.mkdtemp(prefix="compiled_programs_")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(autouse=True, scope="module")
def _no_programs_of_earlier_modules() -> Iterator[None]:
    """JAX keeps every compiled program, some 20 MB each: by the end of the suite a process would hold 8 GB of them."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """`make test` compiles the module's programs without optimization, `make test-all` as users do.

    For tests of what is computed and how often.  Bits, memory and time are those of optimized programs.
    """
    import jax

    if "not slow" not in request.config.getoption("markexpr"):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
