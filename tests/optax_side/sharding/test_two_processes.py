"""Two real processes with four devices each, against one with eight."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.optax_side.sharded_model import on_eight_devices


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    two, one = tmp_path / "two.npz", tmp_path / "one.npz"
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(on_eight_devices, "sharded_process", port, str(number), str(two), timeout=400, devices=4)
            for number in range(2)
        ]
        for done in runs:
            done.result()
    on_eight_devices("sharded_alone", str(one), timeout=400)
    ours, theirs = np.load(two), np.load(one)
    assert ours.files == theirs.files
    equal, codes = 0, 0
    for name in ours.files:
        a, b = ours[name], theirs[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dtype == np.uint8:
            equal, codes = equal + int((a == b).sum()), codes + a.size
            assert np.abs(a.astype(int) - b).max() <= 1, name
        elif a.dtype == np.float32:
            assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max(), name
    assert equal >= 0.9999 * codes
