"""What the monitor reads from an optimizer state, and how it fetches losses.

A training step may donate its state.  So what is read later is computed from the state at once, without waiting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Config
from automagic_core.watching.suggestions import RunRates
from automagic_optax.cameamp.find_states import find_states


def losses_to_host(losses: Sequence[Any], names: Sequence[str] = ()) -> list[float]:
    """Losses as floats, fetched together; `names` are for errors, without them all are losses.

    Raises:
        ValueError: a loss that is not one number, or one that is still being traced.
    """
    fetched = jax.device_get([check_loss(loss, *names[i : i + 1]) for i, loss in enumerate(losses)])
    return [float(np.asarray(loss, np.float64).reshape(())) for loss in fetched]


def check_loss(loss: Any, name: str = "loss") -> Any:
    """Returns the loss, or the scalar of another name; raises a ValueError unless it is one number that exists."""
    what = "a loss" if name == "loss" else name
    if isinstance(loss, jax.core.Tracer):
        raise ValueError(f"{what} inside jit has no value yet; return it from the step and pass it here")
    if np.size(loss) != 1:
        raise ValueError(f"{what} of shape {np.shape(loss)} is not one number; give its mean")
    return loss


def progress(opt_state: Any) -> list[tuple[jax.Array, jax.Array]]:
    """t and ℓ of every `ScaleByCameampState`, as copies that remain when the state is donated."""
    states = find_states(opt_state)
    return [(jnp.max(jnp.asarray(state.step)), jnp.max(jnp.asarray(state.log_rate_scale))) for state in states]


def run_rates(progressed: Sequence[tuple[jax.Array, jax.Array]], config: Config | None) -> RunRates | None:
    """The rates of the transformation with the highest rate, among those that took a step if there are any.

    Without `config` None.

    Args:
        progressed: the result of `progress`.
        config: the hyperparameters with which the transformations were made.
    """
    if config is None:
        return None
    fetched = jax.device_get(list(progressed))
    began = [(step, ell) for step, ell in fetched if step > 0] or fetched
    return max((_rates(int(step), float(ell), config) for step, ell in began), key=lambda found: found.rate)


def _rates(step: int, ell: float, config: Config) -> RunRates:
    scheduled = callable(config.lr)
    lr = float(config.lr(step)) if callable(config.lr) else float(config.lr)
    rate = min(max(lr * math.exp(ell), min(config.min_lr, lr)), max(config.max_lr, lr))
    searching = config.searches and step < config.warmup_steps
    return RunRates(None if scheduled else lr, rate, config.min_lr, config.max_lr, searching)
