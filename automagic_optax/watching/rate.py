"""`learning_rate`: the rate in force, which the search found (`docs/algorithm.md`, section 5.6)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from automagic_optax.arrays.containers import pure
from automagic_optax.cameamp.find_states import find_states, opt_state_of


def learning_rate(opt_state: Any) -> jax.Array:
    """η̂ of the last step: the schedule's rate after the ramp, times the factor that the search found.

    It works inside and outside of ``jax.jit`` and waits for nothing.  The rates of single rows lie around it
    (`metrics`).  ``optax.inject_hyperparams`` keeps in ``opt_state.hyperparams["learning_rate"]`` what the caller gave.

    Args:
        opt_state: any state that contains a `ScaleByCameampState`, however it is wrapped, an ``nnx.Optimizer`` or a
            ``TrainState``.

    Returns:
        float32 scalar; 0 before the first step.  Of several transformations (``optax.partition``) the highest rate; for
        the rate of one give its state alone.  With a leading axis for a state that ``jax.vmap`` made.

    Raises:
        ValueError: the state holds none of this optimizer's states.

    Example:
        >>> updates, opt_state = tx.update(grads, opt_state, params)
        >>> log = {"loss": loss, "learning_rate": learning_rate(opt_state)}
    """
    states = find_states(opt_state_of(opt_state))
    return functools.reduce(jnp.maximum, [jnp.asarray(pure(state.learning_rate)) for state in states])
