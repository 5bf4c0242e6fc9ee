"""A step on a CPU teaches the C library to keep what is freed (docs/speed.md)."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from automagic_torch import AutomagicCameAMP8bit

p = torch.nn.Parameter(torch.ones(4, 4))
p.grad = torch.ones(4, 4)
optimizer = AutomagicCameAMP8bit([p])
optimizer.step()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    temporary = [torch.ones(2**20) for _ in range(12)]
    del temporary
    new_pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(new_pages)
"""


def new_pages():
    """Pages that a process takes anew for 48 MiB of temporary arrays, in the third round."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", PROGRAM]
    return int(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide otherwise")
def test_what_a_step_frees_is_kept_for_the_next_one():
    pages = 48 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    # Without a step most of the pages are new, or few, as the imports have left the heap.
    assert new_pages() < pages / 20
