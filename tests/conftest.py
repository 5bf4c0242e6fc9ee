"""One thread for torch: the arrays are small, and the order of its sums should not depend on the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
