"""A small transformer's parameters on meshes of eight devices, split in the usual ways, and steps on them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from automagic_optax import automagic_8bit

# Shape, and the specs of a tensor-parallel and of a fully sharded model; a data-parallel one keeps every array whole.
CLEAN: dict[str, Any] = {
    "embed": ((512, 256), P("model", None), P("data", None)),
    "layers": [
        {
            "query": ((256, 512), P(None, "model"), P("data", None)),
            "out": ((512, 256), P("model", None), P(("data", "model"), None)),
            "up": ((256, 1024), P(None, "model"), P("data", None)),
            "norm": ((256,), P(), P("data")),
        }
        for _ in range(2)
    ],
    "head_bias": ((4096,), P("model"), P(("data", "model"))),
}
# Blocks over the ends of rows, blocks and bytes of sign bits cut by device borders, heads of attention, a convolution,
# adapters, a scalar.
ODD: dict[str, Any] = {
    "cut": ((64, 256), P(None, "model"), P("data", "model")),
    "rows": ((96, 104), P("model", None), P("data", "model")),
    "heads": ((64, 8, 128), P(None, "model"), P("data", "model")),
    "conv": ((3, 3, 16, 64), P(None, None, None, "model"), P(None, None, "data", "model")),
    "lora_a": ((256, 8), P("model", None), P("data", None)),
    "lora_b": ((8, 256), P(None, "model"), P(None, ("data", "model"))),
    "scale": ((), P(), P()),
}
WAYS = {"data": 0, "tensor": 1, "full": 2}
FIELDS: dict[str, Any] = {"warmup_steps": 5, "torque_decay": 0.5, "weight_decay": 0.1, "min_8bit_size": 2048}
# The search finds something in five steps.
FIELDS |= {"max_lr": 1e-2, "straightness": 0.5, "lr_mask_gain": 0.2, "spatial_scope": "all"}
STAGES_OFF: dict[str, Any] = {"edge_suppression": False, "frequency_penalty": 0.0, "lora_rank_penalty": False}


def is_described(x: Any) -> bool:
    """Whether this is the description of one array."""
    return isinstance(x, tuple) and len(x) == 3


def mesh_of(shape: tuple[int, ...], axis_type: AxisType = AxisType.Auto) -> Mesh:
    """The first devices as a mesh: (8,) over "data" alone, (4, 2) over "data" and "model"."""
    shape = tuple(shape)
    names = ("data", "model")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


def specs(described: Any, way: str, mesh: Mesh) -> Any:
    """A PartitionSpec for each array; axes that the mesh lacks are left out."""

    def entry(e: Any) -> Any:
        kept = tuple(name for name in (e if isinstance(e, tuple) else (e,)) if name in mesh.axis_names)
        return kept if len(kept) > 1 else (kept[0] if kept else None)

    def one(description: Any) -> P:
        return P() if way == "data" else P(*map(entry, description[WAYS[way]]))

    return jax.tree.map(one, described, is_leaf=is_described)


def values(described: Any, seed: int, dtype: Any = np.float32) -> Any:
    """Normally distributed arrays."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda d: rng.standard_normal(d[0]).astype(dtype), described, is_leaf=is_described)


def gradients(described: Any, step: int) -> Any:
    """Gradients that mostly agree in sign from step to step."""
    return jax.tree.map(
        lambda drift, noise: 0.5 * drift + 0.2 * noise, values(described, 100), values(described, 200 + step)
    )


def placed(tree: Any, described: Any, mesh: Mesh | None, way: str) -> Any:
    """The tree on the mesh; None: on the default device."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(described, way, mesh))
    return jax.tree.map(jax.device_put, tree, where)


def runner(described: Any, mesh: Mesh | None, way: str, **fields: Any) -> Callable[..., tuple[Any, Any]]:
    """`run(steps, spoilt)`: parameters and state after some compiled steps from the start, compiled once.

    At step `spoilt` the embedding's gradient has a NaN.
    """
    tx = automagic_8bit(1e-3, **{**FIELDS, **fields})

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    def run(steps: int, spoilt: int = -1) -> tuple[Any, Any]:
        params = placed(values(described, 0), described, mesh, way)
        state = tx.init(params)
        for t in range(steps):
            grads = gradients(described, t)
            if t == spoilt:
                grads["embed"][3, 5] = np.nan
            params, state = step(params, state, placed(grads, described, mesh, way))
        return params, state

    return run


def on_eight_devices(module: str, *arguments: str, timeout: int = 300, devices: int = 8) -> str:
    """Runs a module of the tests in a process of its own, which sees that many devices; what it prints."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # On several threads XLA's FFT is now and then one unit in the last place off what it was before.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices} "
        "--xla_cpu_multi_thread_eigen=false",
    }
    done = subprocess.run(
        [sys.executable, "-m", f"tests.optax_side.{module}", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout
