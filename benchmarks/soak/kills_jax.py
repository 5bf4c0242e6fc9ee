"""The run that is killed, in JAX: Orbax keeps the last three checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as orbax

from automagic_optax import automagic_8bit
from benchmarks.soak.digest import digest

TX = automagic_8bit(
    1e-4,
    max_lr=1e-2,
    warmup_steps=150,
    torque_decay=0.5,
    percentile_clipping=90,
    min_8bit_size=1024,
)


def _loss(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["first"] + params["bias"])
    return jnp.square((hidden.astype(jnp.bfloat16) @ params["second"]).astype(jnp.float32) - jnp.sin(x)).mean()


@jax.jit
def _train_step(held: Any) -> Any:
    key, now = jax.random.split(held["key"])
    x = jax.random.normal(now, (8, 32))
    updates, state = TX.update(jax.grad(_loss)(held["params"], x), held["state"], held["params"])
    return {"params": optax.apply_updates(held["params"], updates), "state": state, "key": key}


class JaxTraining:
    """Two kernels with 8-bit states, one of them in bfloat16, and a bias, on batches of a key that the run carries.

    Args:
        cache: where compiled steps are kept, so that a restart compiles nothing.
    """

    def __init__(self, cache: str) -> None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        rng = np.random.default_rng(0)
        params = {
            "first": jnp.asarray(0.2 * rng.standard_normal((32, 64)), jnp.float32),
            "bias": jnp.zeros(64),
            "second": jnp.asarray(0.2 * rng.standard_normal((64, 32)), jnp.bfloat16),
        }
        self.held: Any = {"params": params, "state": TX.init(params), "key": jnp.asarray([0, 7], jnp.uint32)}
        self.manager: orbax.CheckpointManager | None = None

    def _opened(self, folder: Path) -> orbax.CheckpointManager:
        if self.manager is None:
            options = orbax.CheckpointManagerOptions(max_to_keep=3, create=True)
            self.manager = orbax.CheckpointManager(folder.resolve(), options=options)
        return self.manager

    def step(self) -> None:
        """One batch."""
        self.held = _train_step(self.held)

    def save(self, folder: Path, step: int) -> None:
        """Returns when the checkpoint is whole."""
        manager = self._opened(folder)
        manager.save(step, args=orbax.args.StandardSave(self.held))
        manager.wait_until_finished()

    def restore(self, folder: Path) -> int:
        """The newest checkpoint that Orbax counts as whole."""
        manager = self._opened(folder)
        step = manager.latest_step()
        if step is None:
            return 0
        abstract = jax.tree.map(orbax.utils.to_shape_dtype_struct, self.held)
        self.held = manager.restore(step, args=orbax.args.StandardRestore(abstract))
        return int(step)

    def digest(self) -> str:
        """Of every leaf."""
        leaves = jax.tree_util.tree_leaves_with_path(self.held)
        return digest((jax.tree_util.keystr(path), np.asarray(x)) for path, x in leaves)

    def close(self) -> None:
        """Ends Orbax's threads."""
        if self.manager is not None:
            self.manager.close()


def maker(cache: Path) -> functools.partial[JaxTraining]:
    """Makes the run before its first step, in any process."""
    return functools.partial(JaxTraining, str(cache.resolve()))
