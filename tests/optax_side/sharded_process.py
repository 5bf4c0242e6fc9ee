"""One of two processes with four devices each: ``python -m ... PORT NUMBER FILE``; the first saves what came out."""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np

from tests.optax_side.sharded_model import CLEAN, ODD, STAGES_OFF, mesh_of, runner

DESCRIBED = {"up": CLEAN["layers"][0]["up"], "norm": CLEAN["layers"][0]["norm"], "rows": ODD["rows"]}


def leaves_after_steps(shape: tuple[int, ...] = (4, 2)) -> list[tuple[str, Any]]:
    """Names and global values after eight steps."""
    done = runner(DESCRIBED, mesh_of(shape), "full", **STAGES_OFF)(8)
    return [
        (jax.tree_util.keystr(path), np.asarray(_everywhere(x)))
        for path, x in jax.tree_util.tree_leaves_with_path(done)
    ]


def _everywhere(x: Any) -> Any:
    if x.is_fully_addressable or x.is_fully_replicated:
        return x
    whole = jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
    return jax.jit(lambda y: y, out_shardings=whole)(x)


if __name__ == "__main__":
    port, number, file = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    found = leaves_after_steps()
    if number == "0":
        np.savez(file, **dict(found))
    jax.distributed.shutdown()
