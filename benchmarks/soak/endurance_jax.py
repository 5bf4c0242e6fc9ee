"""The JAX side of the long run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_optax import ScaleByCameampState, automagic_8bit, finish_warmup, memory_report
from benchmarks.soak.endurance import FIELDS, Trained, batches, endure, warmup_steps, weights


def run(steps: int, optim_bits: int) -> dict[str, Any]:
    """The record of a run; this process should have done nothing else."""
    fields = {**FIELDS, "warmup_steps": warmup_steps(steps), "optim_bits": optim_bits}
    tx = automagic_8bit(fields.pop("lr"), layout="torch", **fields)
    params = {name: jnp.asarray(w) for name, w in weights().items()}
    inputs, targets = map(jnp.asarray, batches())

    @jax.jit
    def train_step(params: Any, state: Any, index: Any) -> Any:
        def loss_of(params: Any) -> jax.Array:
            return jnp.square(_output(params, inputs[index]) - targets[index]).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    held: dict[str, Any] = {"params": params, "state": tx.init(params)}

    def step(t: int) -> float:
        held["params"], held["state"], loss = train_step(held["params"], held["state"], t % len(inputs))
        if t == fields["warmup_steps"]:
            held["state"] = finish_warmup(held["state"])
        return float(loss)

    def all_finite() -> bool:
        return all(bool(np.isfinite(np.asarray(x)).all()) for x in jax.tree.leaves(held))

    record = endure(Trained(step, all_finite, lambda: _step_count(held["state"])), steps)
    report = memory_report(held["state"])
    return record | {"parameters": report["total_parameters"], "8bit_parameters": report["8bit_parameters"]}


def _step_count(state: Any) -> int:
    def is_state(x: Any) -> bool:
        return isinstance(x, ScaleByCameampState)

    (found,) = filter(is_state, jax.tree.leaves(state, is_leaf=is_state))
    return int(found.step)


def _output(params: Any, x: jax.Array) -> jax.Array:
    weight = params["layer"] + params["lora_b"] @ params["lora_a"].T
    return jnp.tanh(x @ weight.T + params["bias"])
