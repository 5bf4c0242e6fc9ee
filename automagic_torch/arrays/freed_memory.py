"""Makes the C library keep what a step on a CPU frees, so that the next step needs no new pages (docs/speed.md)."""

from __future__ import annotations

from functools import cache

import numpy as np

LEARNT_SIZE = 2**25 - 2**16
"""Bytes: glibc learns from freed blocks of less than 32 MiB only."""


@cache
def keep_freed_memory() -> None:
    """Frees one block, whose pages nobody touches.  It counts once for a process.

    glibc takes large blocks from the system by themselves and gives them back when they are freed.  A freed one teaches
    it to take blocks up to that size from its heap, and to keep twice as much at the heap's end, so 62 MiB.  A process
    that did not free such a block by chance took 120,000 new pages in each step of 1,000 adapters, half of its time.
    Other C libraries, and thresholds that the user has set, stay as they are.
    """
    np.empty(LEARNT_SIZE, np.uint8)
