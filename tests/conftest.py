"""One thread for torch, and memory that does not grow with the number of tests."""

import os
import sys
from collections.abc import Iterator

import pytest

# The arrays are small, and the order of torch's sums should not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="module")
def _no_programs_of_earlier_modules() -> Iterator[None]:
    """JAX keeps every compiled program, some 20 MB each: by the end of the suite a process would hold 8 GB of them."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
