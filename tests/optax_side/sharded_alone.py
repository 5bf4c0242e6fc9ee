"""What the two processes do, in one with eight devices: ``python -m ... FILE``."""

from __future__ import annotations

import sys

import numpy as np

from tests.optax_side.sharded_process import leaves_after_steps

if __name__ == "__main__":
    np.savez(sys.argv[1], **dict(leaves_after_steps()))
