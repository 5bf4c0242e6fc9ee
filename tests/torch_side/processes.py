"""Runs a function in several processes that talk through gloo."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WAIT = datetime.timedelta(seconds=60)


def run_processes(worker: Callable[..., Any], count: int, *arguments: Any, limit: float = 300.0) -> list[Any]:
    """``worker(rank, *arguments)`` in `count` processes; what each returned, by rank.

    Raises what the first process that failed raised; processes that hang are ended after `limit` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Processes of a server that has imported what takes seconds.  CUDA must not be there before it forks.
        method = "spawn" if torch.cuda.is_available() else "forkserver"
        multiprocessing.set_forkserver_preload(["torch", "bitsandbytes", "torch.distributed.fsdp"])
        context = mp.start_processes(_begin, (worker, count, folder, arguments), count, join=False, start_method=method)
        assert context is not None
        end = datetime.datetime.now() + datetime.timedelta(seconds=limit)
        while not context.join(timeout=5):
            if datetime.datetime.now() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{count} processes did not end within {limit} seconds")
        return [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in range(count)]


def _begin(rank: int, worker: Callable[..., Any], count: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count, timeout=WAIT)
    try:
        torch.save(worker(rank, *arguments), Path(folder) / f"result{rank}")
    finally:
        dist.destroy_process_group()
