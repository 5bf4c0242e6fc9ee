"""The two ways to train the adapters: this project's optimizer, and AdamW at a given rate.

Both sit behind the same gradient clipping and have the same ramp, cosine schedule and weight decay.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from automagic_optax import automagic_8bit
from examples.digits_diffusion.settings import Settings

CLIP_NORM = 1.0


class Recipe(NamedTuple):
    """An optimizer to try.

    Attributes:
        name: for tables and legends.
        tx: the transformation.
        rate: the learning rate of a step (from 0), given the optimizer state before it.
        warmup_steps: after which `finish_warmup` applies, or None where there is no such thing.
    """

    name: str
    tx: optax.GradientTransformation
    rate: Callable[[int, Any], float]
    warmup_steps: int | None = None


def automagic(settings: Settings) -> Recipe:
    # The ramp is part of the optimizer, so the schedule is only the cosine.
    schedule = optax.cosine_decay_schedule(settings.starting_rate, settings.tuning_steps)
    ramp_steps = math.ceil(settings.search_steps / 4)
    tx = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        automagic_8bit(
            schedule,
            weight_decay=settings.weight_decay,
            warmup_steps=settings.search_steps,
            max_lr=settings.max_rate,
        ),
    )

    def rate(step: int, opt_state: Any) -> float:
        ramp = min(1.0, (step + 1) / ramp_steps)
        return float(schedule(step) * ramp * jnp.exp(found(opt_state)))

    return Recipe("Automagic 8-bit", tx, rate, settings.search_steps)


def found(opt_state: Any) -> Any:
    """The logarithm of the factor on the learning rate that the search has found so far."""
    return optax.tree_utils.tree_get(opt_state, "log_rate_scale")[...]


def adamw(rate: float, settings: Settings) -> Recipe:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, settings.warmup_steps, settings.tuning_steps)
    tx = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adamw(schedule, weight_decay=settings.weight_decay))
    return Recipe(f"AdamW {rate:g}", tx, lambda step, _: float(schedule(step)))
