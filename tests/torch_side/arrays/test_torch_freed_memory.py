"""A step on a CPU teaches the C library to keep what is freed (docs/speed.md)."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from automagic_torch import AutomagicCameAMP8bit

p = torch.nn.Parameter(torch.ones(4, 4))
p.grad = torch.ones(4, 4)
optimizer = AutomagicCameAMP8bit([p])
if sys.argv[1] == "after a step":
    optimizer.step()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    temporary = [torch.ones(2**20) for _ in range(12)]
    del temporary
    new_pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(new_pages)
"""


def new_pages(how):
    """Pages that a process takes anew for 48 MiB of temporary arrays, in the third round."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide otherwise")
def test_what_a_step_frees_is_kept_for_the_next_one():
    pages = 48 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert new_pages("without one") > pages / 2  # else this test says nothing
    assert new_pages("after a step") < pages / 20
